"""Job `norm`: RMSNorm alone, with the residual path before it, with the FP8 product behind it."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minids import norm
from minids.formats.groups import ACTIVATION_FLOOR, TILE
from minids.fused import norm as fused
from minids_kernels import norm_rms
from minids_kernels.bench import pass_peers as others
from minids_kernels.bench import passes, peers
from minids_kernels.bench.case import OURS, Call, Case, Goal, Prepare, Verdict
from minids_kernels.bench.floors import Work, quantisation
from minids_kernels.bench.shapes import TOKENS, V3_EXPERTS

JOB = "norm"
GOALS = (Goal("percent_of_copy", 90),)
EPS = 1e-6
_QUANTISED = (EPS, None, ACTIVATION_FLOOR)

Size = tuple[int, int]


def cases(size: Size = (TOKENS, V3_EXPERTS.dim)) -> Iterator[Case]:
    """Yield them by what they move; the gain is next to nothing."""
    rows, width = size
    states = rows * width
    gain = 2 * width
    codes = quantisation(rows, width, TILE, read_bytes=0).moved_bytes
    forward, trained = passes.forward, passes.trained

    def case(name: str, moved: int, inputs: str, check: Any, sides: dict[str, Prepare]) -> Case:
        return Case(JOB, f"{name}, {rows} x {width}", Work(moved), partial(drawn, size, inputs),
                    sides, check, GOALS)  # fmt: skip

    yield case("quantised", 2 * states + gain + codes, "xg",
               partial(passes.codes_are_near, _with(fused.rms_norm_quantise, *_QUANTISED)),
               {OURS: forward(norm_rms.rms_norm_quantise, *_QUANTISED),
                peers.COMPILED: forward(fused.rms_norm_quantise, *_QUANTISED, compiled=True),
                others.TORCHAO: others.then_torchao(others.rms_norm, EPS)})  # fmt: skip
    yield case("forward", 4 * states + gain, "xg", _near(norm.rms_norm),
               {OURS: forward(norm_rms.rms_norm, EPS),
                peers.COMPILED: forward(norm.rms_norm, EPS, compiled=True),
                others.TORCH: forward(others.rms_norm, EPS),
                others.LIGER: others.liger("rms_norm", EPS)})  # fmt: skip
    yield case("gradients", 6 * states + 2 * gain, "xgd", backward_is_near, {OURS: backward})
    yield case("added and quantised", 6 * states + gain + codes, "xyg",
               partial(passes.codes_are_near, _with(fused.add_rms_norm_quantise, *_QUANTISED)),
               {OURS: forward(norm_rms.add_rms_norm_quantise, *_QUANTISED),
                peers.COMPILED: forward(fused.add_rms_norm_quantise, *_QUANTISED,
                                        compiled=True)})  # fmt: skip
    yield case("added", 8 * states + gain, "xyg", _near(fused.add_rms_norm),
               {OURS: forward(norm_rms.add_rms_norm, EPS),
                peers.COMPILED: forward(fused.add_rms_norm, EPS, compiled=True),
                others.LIGER: forward(others.liger_added, EPS)})  # fmt: skip
    yield case("forward and backward", 10 * states + 3 * gain, "xgd",
               partial(passes.gradients_are_near, _with(norm.rms_norm, EPS), passes.ROUNDED_AGAIN),
               {OURS: trained(norm_rms.rms_norm, EPS),
                peers.COMPILED: trained(norm.rms_norm, EPS, compiled=True),
                others.TORCH: trained(others.rms_norm, EPS),
                others.LIGER: others.liger("rms_norm", EPS, trained=True)})  # fmt: skip


def drawn(size: Size, letters: str, device: str) -> tuple[Tensor, ...]:
    """Draw states x, y, a gradient d; a gain g near 1."""

    def one(letter: str) -> Tensor:
        if letter == "g":
            return (1 + 0.1 * torch.randn(size[1], device=device)).bfloat16()
        return torch.randn(size, device=device).bfloat16()

    return tuple(map(one, letters))


def backward(x: Tensor, gain: Tensor, dy: Tensor) -> Call:
    """The gradients alone."""
    return partial(norm_rms.gradients, dy, None, x, gain, EPS)


def backward_is_near(result: Any, x: Tensor, gain: Tensor, dy: Tensor) -> Verdict:
    """Compare both gradients with FP64."""
    rounded = norm.rms_norm(x, gain, EPS)  # known to be near enough: no part of what is timed
    check = partial(passes.gradients_are_near, _with(norm.rms_norm, EPS), passes.ROUNDED_AGAIN)
    return check((rounded, *result), x, gain, dy)


def _with(function: Any, *settings: Any) -> Any:
    return lambda *inputs: function(*inputs, *settings)


def _near(function: Any) -> Any:
    return partial(passes.is_near, _with(function, EPS), passes.ROUNDED_AGAIN)
