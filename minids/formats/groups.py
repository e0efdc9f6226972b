"""Groups that share a scale: tiles of 1 x 128 for activations, blocks of 128 x 128 for weights.

Paper   DeepSeek-V3 (arXiv:2412.19437), section 3.3.2, Figure 7a; floor and rounding of scales:
        inference/kernel.py of the release; layout of scales: README_WEIGHTS.md.
Dims    rows and cols of the matrices, G and J groups along them (the last ones may be ragged).
Book    book/11_fp8.ipynb               Kernel  minids_kernels/fp8_quantise.py
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from jaxtyping import Float
from torch import Tensor

from minids.formats.bits import E4M3
from minids.impl import kernels

TILE, BLOCK, COLUMN = (1, 128), (128, 128), (128, 1)  # rows x cols of a group
ACTIVATION_FLOOR = 1e-4  # least max-abs of an activation's tile
_CACHED_ROWS = 64  # divides 128
_SMALLEST = E4M3.max * torch.finfo(torch.float32).tiny  # below it a scale would not be normal


class Scaled(NamedTuple):
    """A quantised matrix; one scale multiplies every value of its group (`weight_scale_inv`)."""

    values: Float[Tensor, "*batch rows cols"]  # torch.float8_e4m3fn
    scale: Float[Tensor, "*batch G J"]  # FP32
    group: tuple[int, int]

    @property
    def mT(self) -> "Scaled":
        """The transposed matrix; no value is rounded again."""
        rows, cols = self.group
        return Scaled(self.values.mT, self.scale.mT, (cols, rows))


def quantise(
    x: Float[Tensor, "*batch rows cols"],
    group: tuple[int, int] = TILE,
    scale_fmt: str | None = None,
    floor: float = 0.0,
    impl: str = "torch",
) -> Scaled:
    """Round to E4M3, each group's largest number to 448; "ue8m0" scales are powers of two.

    A max-abs below `floor` counts as `floor`: zeros get a positive scale. A group that holds NaN or
    an infinity comes back as NaN, all of it; "ue8m0" may round numbers above 3.29e38 to infinity.
    Ragged groups are scaled by what they hold.
    """
    if scale_fmt not in (None, "ue8m0"):
        raise ValueError(f"scale_fmt must be None or 'ue8m0', got {scale_fmt!r}")
    if impl == "triton":
        return Scaled(*kernels().quantise(x, group, scale_fmt, floor))
    wide = x.float()
    amax = reduce(_grouped(wide.abs(), group), "... g r j c -> ... g j", "max")
    most = amax.new_full((), E4M3.max)  # torch on CUDA would multiply by a plain number's inverse
    scale = amax.clamp(min=max(floor, _SMALLEST)) / most
    if scale_fmt == "ue8m0":
        scale = next_power_of_two(scale)
    values = wide / _spread(scale, group, wide)
    return Scaled(values.clamp(-E4M3.max, E4M3.max).to(torch.float8_e4m3fn), scale, group)


def quantise_twice(
    x: Float[Tensor, "*batch rows cols"],
    group: tuple[int, int],
    turned: tuple[int, int],
    scale_fmt: str | None = None,
    floor: float = 0.0,
    impl: str = "torch",
) -> tuple[Scaled, Scaled]:
    """Return x in groups of `group` and its transpose, x in groups of `turned`; kernels read once.

    The operands of two products: dY for both gradients, W for the output and the input's gradient.
    """
    if impl == "triton":
        first, second = kernels().quantise_twice(x, group, turned, scale_fmt, floor)
        return Scaled(*first), Scaled(*second)
    first = quantise(x, group, scale_fmt, floor)
    same = first if turned == group else quantise(x, turned, scale_fmt, floor)
    return first, same.mT


def requantise(
    x: Scaled,
    group: tuple[int, int],
    scale_fmt: str | None = None,
    floor: float = 0.0,
    impl: str = "torch",
) -> Scaled:
    """Return a quantised matrix in other groups; its values are rounded a second time."""
    if impl == "triton":
        return Scaled(*kernels().requantise(x, group, scale_fmt, floor))
    return quantise(dequantise(x), group, scale_fmt, floor)


def dequantise(
    x: Scaled, dtype: torch.dtype = torch.float32, out: Tensor | None = None, impl: str = "torch"
) -> Float[Tensor, "*batch rows cols"]:
    """Return value times scale, computed in FP32 and rounded once, to `dtype`.

    Blocks on a CPU are written to `out` if it is given: fresh memory takes longer than they do.
    """
    if impl == "triton":
        return kernels().dequantise(x, dtype, out)
    in_bits = x.values.is_cpu and x.values.dtype == torch.float8_e4m3fn and x.values.numel()
    if not in_bits or _is_special(x):
        wide = x.values.float()
    elif x.group == BLOCK:
        out = torch.empty(x.values.shape, dtype=dtype) if out is None else out
        _expand(x.values, x.scale, out)
        return out
    else:
        wide = widen(x.values)
    return (wide * _spread(x.scale, x.group, x.values)).to(dtype)


def widen(values: Float[Tensor, "*batch rows cols"]) -> Float[Tensor, "*batch rows cols"]:
    """Return E4M3 values as FP32, on a CPU three times as fast as torch's cast; NaN codes as 480.

    The groups of `quantise` hold NaN codes only where their scale is not finite either.
    """
    return 256 * _as_half(values).float() if values.is_cpu else values.float()


def _as_half(values: Float[Tensor, "*batch rows cols"]) -> Float[Tensor, "*batch rows cols"]:
    """Move the seven low bits up to the exponent of a half: the same number divided by 256."""
    return ((values.view(torch.int8).to(torch.int16) << 7) & ~0x407F).view(torch.float16)


def _is_special(x: Scaled) -> bool:
    """Say whether `_expand` would miss a NaN code or overflow in a scale times 256."""
    return holds_nan(x.values) or bool((x.scale >= 2.0**120).any())


def holds_nan(values: Float[Tensor, "*batch rows cols"]) -> bool:
    """Say whether one of E4M3's two NaN codes is among the values: 0x7F, 0xFF.

    The largest codes of either sign tell: a maximum is found a hundred times as fast as a NaN.
    """
    return bool(values.view(torch.int8).max() == 0x7F or values.view(torch.uint8).max() == 0xFF)


def _expand(
    values: Float[Tensor, "*batch rows cols"], scale: Float[Tensor, "*batch G J"], out: Tensor
) -> None:
    """Fill `out` with value times scale; on a CPU about 30 times as fast as torch's own cast.

    A few rows at a time stay in the processor's cache.
    """
    if values.ndim > 2:
        for parts in zip(values, scale, out, strict=True):
            _expand(*parts)
        return
    rows, cols = values.shape
    wide = 256 * repeat(scale, "g j -> g (j c)", c=BLOCK[1])[:, :cols]
    for start in range(0, rows, _CACHED_ROWS):
        small = _as_half(values[start : start + _CACHED_ROWS])
        out[start : start + _CACHED_ROWS] = small * wide[start // BLOCK[0]]


def next_power_of_two(scale: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return 2^ceil(log2(scale)), exact: UE8M0 stores no digit of a scale, only its exponent."""
    mantissa, exponent = torch.frexp(scale)  # mantissa in [1/2, 1)
    rounded = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    return torch.where(scale.isfinite(), rounded, scale)


def scale_shape(shape: tuple[int, ...], group: tuple[int, int]) -> tuple[int, ...]:
    """Return the shape of a matrix's scales: whole groups and the ragged ones behind them."""
    *batch, rows, cols = shape
    return (*batch, math.ceil(rows / group[0]), math.ceil(cols / group[1]))


def _grouped(
    x: Float[Tensor, "*batch rows cols"], group: tuple[int, int]
) -> Float[Tensor, "*batch G r J c"]:
    """Cut into groups; ragged ones are filled up with zeros."""
    rows, cols = group
    x = F.pad(x, (0, -x.shape[-1] % cols, 0, -x.shape[-2] % rows))
    return rearrange(x, "... (g r) (j c) -> ... g r j c", r=rows, c=cols)


def _spread(
    scale: Float[Tensor, "*batch G J"], group: tuple[int, int], like: Tensor
) -> Float[Tensor, "*batch rows cols"]:
    """Give every element of `like` its group's scale."""
    spread = repeat(scale, "... g j -> ... (g r) (j c)", r=group[0], c=group[1])
    return spread[..., : like.shape[-2], : like.shape[-1]]
