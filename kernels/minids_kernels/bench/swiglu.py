"""Job `swiglu`: what stands between the products of dense layers and of experts."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minids.formats import groups
from minids.formats.groups import ACTIVATION_FLOOR, COLUMN, TILE, Scaled
from minids.fused import swiglu as fused
from minids_kernels import ffn_swiglu
from minids_kernels.bench import pass_peers as others
from minids_kernels.bench import passes, peers
from minids_kernels.bench.case import OURS, Case, Goal, Prepare
from minids_kernels.bench.floors import Work, quantisation
from minids_kernels.bench.shapes import TOKENS, V3_EXPERTS

JOB = "swiglu"
GOALS = (Goal("percent_of_copy", 90),)
_QUANTISED = (None, ACTIVATION_FLOOR)
_WAITING = (None, None, ACTIVATION_FLOOR)

Size = tuple[int, int]
SIZES: tuple[Size, ...] = (
    (TOKENS * V3_EXPERTS.k, V3_EXPERTS.hidden),  # visits to experts
    (TOKENS, 18432),  # a dense layer
)


def cases(sizes: tuple[Size, ...] = SIZES) -> Iterator[Case]:
    """Yield them by what they move; compiling takes seconds: only for the last size."""
    for size in sizes:
        last = size == sizes[-1]
        yield from _quantised(size, last)
    for size in sizes:
        yield from _plain(size, size == sizes[-1])


def _quantised(size: Size, compiled: bool) -> Iterator[Case]:
    """Yield what is FP8 at once; what training keeps, and what it makes of that."""
    rows, width = size
    numbers = rows * width

    def codes(group: Size) -> int:
        return quantisation(rows, width, group, read_bytes=0).moved_bytes

    function = partial(_in_fp32, fused.swiglu_quantise, _QUANTISED)
    sides: dict[str, Prepare] = {OURS: passes.forward(ffn_swiglu.swiglu_quantise, *_QUANTISED)}
    if compiled:
        sides[peers.COMPILED] = passes.forward(fused.swiglu_quantise, *_QUANTISED, compiled=True)
        sides[others.TORCHAO] = others.then_torchao(fused.swiglu)
    yield Case(JOB, _name("quantised", size), Work(4 * numbers + codes(TILE)),
               partial(halves, size), sides,
               partial(passes.codes_are_near, function), GOALS)  # fmt: skip
    function = partial(_in_fp32, fused.gated_quantise, _WAITING)
    yield Case(JOB, _name("quantised thrice", size), Work(4 * numbers + 3 * codes(TILE)),
               partial(halves, size),
               {OURS: passes.forward(ffn_swiglu.gated_quantise, *_WAITING)},
               partial(passes.codes_are_near, function), GOALS)  # fmt: skip
    settings = (None, torch.bfloat16)
    function = partial(_settled, fused.gated_backward, settings)
    moved = (4 + 2 * 2) * numbers + 2 * codes(TILE) + codes(COLUMN)
    yield Case(JOB, _name("gradients of FP8", size), Work(moved), partial(waiting, size),
               {OURS: passes.forward(ffn_swiglu.gated_backward, *settings)},
               partial(passes.codes_are_near, function), GOALS)  # fmt: skip


def _plain(size: Size, compiled: bool) -> Iterator[Case]:
    """Yield it in BF16, forward, then forward and backward."""
    numbers = size[0] * size[1]
    for name, way, moved, check in (
        ("forward", passes.forward, 6, passes.is_near),
        ("forward and backward", passes.trained, 6 + 10, passes.gradients_are_near),
    ):
        trained = way is passes.trained
        sides: dict[str, Prepare] = {OURS: way(ffn_swiglu.swiglu)}
        if compiled:
            sides[peers.COMPILED] = way(fused.swiglu, compiled=True)
        sides[others.LIGER] = others.liger("swiglu", trained=trained)
        yield Case(JOB, _name(name, size), Work(moved * numbers),
                   partial(with_gradient if trained else halves, size), sides,
                   partial(check, fused.swiglu, passes.ROUNDED), GOALS)  # fmt: skip


def _name(what: str, size: Size) -> str:
    return f"{what}, {size[0]} x {size[1]}"


def _settled(function: passes.Function, settings: tuple, *inputs: Any) -> Any:
    return function(*inputs, *settings)


def _in_fp32(function: passes.Function, settings: tuple, gate: Tensor, up: Tensor) -> Any:
    """What kernels do: the product is quantised as it is, not rounded to BF16 before."""
    return function(gate.float(), up.float(), *settings)


def halves(size: Size, device: str) -> tuple[Tensor, Tensor]:
    """Draw gate and up as one product leaves them."""
    rows, width = size
    gate, up = torch.randn(rows, 2 * width, device=device).bfloat16().chunk(2, dim=-1)
    return gate, up


def with_gradient(size: Size, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Draw gate, up and the gradient of their product."""
    return *halves(size, device), torch.randn(size, device=device).bfloat16()


def waiting(size: Size, device: str) -> tuple[Tensor, Scaled, Scaled]:
    """Draw the gradient in FP32, and gate and up as they wait in FP8."""
    gate, up = (groups.quantise(half, TILE) for half in halves(size, device))
    return torch.randn(size, device=device), gate, up
