"""Job `adamw`: one step of a billion weights in FP32, moments as V3 keeps them, or in FP32.

A step reads and writes weights and moments, reads gradients, and writes the copy that products
take. Each side keeps moments of its own; the weights are the same for all, and walk on.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from minids.train import _cast_moments
from minids_kernels import train_adamw
from minids_kernels.bench.attention import Gap
from minids_kernels.bench.case import OURS, Call, Case, Goal, Prepare, Verdict
from minids_kernels.bench.checks import BF16_ERROR
from minids_kernels.bench.floors import Work

JOB = "adamw"
GOALS = (Goal("percent_of_copy", 90),)
FUSED, HOOKS = "torch fused", "torch fused, moments cast"
RATE, BETAS, EPS, DECAY = 1e-3, (0.9, 0.95), 1e-8, 0.1
SIZES = ((8192, 7168), (7168,)) * 17  # 998 million
_STEPS = 10  # that were taken before
_STEP_ERROR = 1e-4  # relative norm of what a step adds: an FP32 weight has as many digits less
_CHECKED = 4096  # numbers at either end of a tensor


class Weights(NamedTuple):
    """What all sides begin with."""

    weights: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    first: tuple[Tensor, ...]
    second: tuple[Tensor, ...]


def cases(sizes: tuple[tuple[int, ...], ...] = SIZES) -> Iterator[Case]:
    """Yield V3's way, moments in BF16 between steps, weights copied in BF16; then all in FP32."""
    numbers = sum(torch.Size(size).numel() for size in sizes)
    for name, moments, sides in (
        ("BF16 moments and copy", torch.bfloat16, {HOOKS: by_hooks}),
        ("FP32", torch.float32, {FUSED: by_torch}),
    ):
        half = moments == torch.bfloat16
        moved = 4 + 4 + 4 + 2 * 2 * moments.itemsize + (2 if half else 0)
        ours: dict[str, Prepare] = {OURS: partial(by_us, moments, half)}
        yield Case(JOB, f"{name}, {numbers:.2e} weights", Work(moved * numbers),
                   partial(drawn, sizes, moments), ours | sides, is_near, GOALS)  # fmt: skip


def drawn(sizes: tuple[tuple[int, ...], ...], moments: torch.dtype, device: str) -> tuple[Weights]:
    """Draw weights, gradients and moments."""

    def several(scale: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        return tuple(scale * torch.randn(size, dtype=dtype, device=device) for size in sizes)

    second = tuple(x.square_() for x in several(0.1, moments))
    return (Weights(several(0.02), several(0.1), several(0.03, moments), second),)


def by_us(moments: torch.dtype, copied: bool, of: Weights) -> Call:
    """The kernel, and weights in BF16 beside."""
    parameters = _parameters(of)
    copies: dict[Tensor, Tensor] = {}
    if copied:
        copies = {x: torch.empty_like(x, dtype=torch.bfloat16) for x in parameters}
    optimiser = train_adamw.AdamW(
        parameters, RATE, BETAS, EPS, DECAY, moments=moments, copies=copies
    )
    return _stepping(optimiser, parameters, of, tuple(copies.values()))


def by_torch(of: Weights) -> Call:
    """torch's fused AdamW, whose moments have the dtype of the weights."""
    parameters = _parameters(of)
    return _stepping(AdamW(parameters, RATE, BETAS, EPS, DECAY, fused=True), parameters, of)


def by_hooks(of: Weights) -> Call:
    """The same with moments in BF16 between steps, as minids.train has it; no copy is written."""
    parameters = _parameters(of)
    optimiser = AdamW(parameters, RATE, BETAS, EPS, DECAY, fused=True)
    optimiser.register_step_pre_hook(lambda self, *_: _cast_moments(self, torch.float32))
    optimiser.register_step_post_hook(lambda self, *_: _cast_moments(self, torch.bfloat16))
    return _stepping(optimiser, parameters, of)


def _parameters(of: Weights) -> list[nn.Parameter]:
    parameters = [nn.Parameter(x) for x in of.weights]
    for x, gradient in zip(parameters, of.gradients, strict=True):
        x.grad = gradient
    return parameters


def _stepping(
    optimiser: Any, parameters: list[nn.Parameter], of: Weights, copies: tuple[Tensor, ...] = ()
) -> Call:
    """Give an optimiser its state, and return its step."""
    for x, first, second in zip(parameters, of.first, of.second, strict=True):
        step = torch.full((), float(_STEPS), device=x.device)
        optimiser.state[x] = {"step": step, "exp_avg": first.clone(), "exp_avg_sq": second.clone()}

    def run() -> tuple[tuple[Tensor, ...], ...]:
        optimiser.step()
        moments = (
            tuple(optimiser.state[x][name] for x in parameters)
            for name in ("exp_avg", "exp_avg_sq")
        )
        return tuple(x.detach() for x in parameters), *moments, copies

    return run


def is_near(result: tuple, of: Weights) -> Verdict:
    """Compare the ends of all tensors with FP64: what the step added, moments, copies."""
    steps, others = Gap(), Gap()
    weights, first, second, copies = result
    for n, given in enumerate(zip(*of, strict=True)):
        before, gradient, m, v = (_ends(x) for x in given)
        m = BETAS[0] * m + (1 - BETAS[0]) * gradient
        v = BETAS[1] * v + (1 - BETAS[1]) * gradient**2
        rate = RATE / (1 - BETAS[0] ** (_STEPS + 1))
        root = (v / (1 - BETAS[1] ** (_STEPS + 1))).sqrt()
        exact = before * (1 - RATE * DECAY) - rate * m / (root + EPS)
        found = _ends(weights[n])
        steps.add("the step", found - before, exact - before)
        others.add("first moment", _ends(first[n]), m)
        others.add("second moment", _ends(second[n]), v)
        if copies:
            others.add("copy", _ends(copies[n]), exact)
    verdict, beside = steps.judge(_STEP_ERROR), others.judge(BF16_ERROR)
    return verdict if beside.right else beside


def _ends(x: Tensor) -> Tensor:
    flat = x.detach().flatten()
    return torch.cat([flat[:_CHECKED], flat[-_CHECKED:]]).double()
