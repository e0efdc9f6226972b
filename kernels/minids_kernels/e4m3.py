"""E4M3 in a kernel: by the card's instructions, or by its bits on cards that have none; its scales.

S.EEEE.MMM, value 2^(E-7) (1 + M/8), subnormals M 2^-9, largest 448, no infinity, NaN 0x7F and 0xFF.
`FP8` says which way: blocks are then tl.float8e4nv, else tl.uint8 with the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX = tl.constexpr(448.0)
_HALF_AN_ULP = tl.constexpr(0x7FFFF)  # of E4M3, in the 20 digits of FP32 that it lacks, less one
_BIAS = tl.constexpr((127 - 7) << 3)
_INFINITY = tl.constexpr(0x7F800000)  # bits of FP32; those of NaN are larger
_448TH = tl.constexpr(1 / 448)
_LEAST_RECIPROCAL = tl.constexpr(0.5 + 2**-24)  # of the last number before 2
_SUBNORMAL_ULPS = tl.constexpr(16384.0)  # FP32 numbers around 2^14 lie 2^-9 apart


@triton.jit
def to_e4m3(x, FP8: tl.constexpr):
    """Round FP32 to nearest even; larger numbers become +-448, NaN becomes 0x7F."""
    if FP8:
        code = x.to(tl.float8e4nv)  # cvt.rn.satfinite
    else:
        x = tl.clamp(x, -MAX, MAX, propagate_nan=tl.PropagateNan.ALL)
        bits = x.to(tl.uint32, bitcast=True)
        low = bits & 0x7FFFFFFF
        normal = ((low + _HALF_AN_ULP + ((low >> 20) & 1)) >> 20) - _BIAS
        ulps = (tl.abs(x) + _SUBNORMAL_ULPS).to(tl.uint32, bitcast=True)
        small = ulps - tl.full([], 16384.0, tl.float32).to(tl.uint32, bitcast=True)
        code = tl.where(tl.abs(x) < 0.015625, small, normal) | ((bits >> 31) << 7)
        code = tl.where(x == x, code, 0x7F).to(tl.uint8)
    return code


@triton.jit
def from_e4m3(x, FP8: tl.constexpr):
    """Return E4M3 as FP32, exact; NaN codes stay NaN."""
    if FP8:
        wide = x.to(tl.float32)
    else:
        bits = x.to(tl.uint16)
        # seven bits moved up to the exponent of a half: the same number divided by 256
        half = (((bits & 0x7F) << 7) | ((bits & 0x80) << 8)).to(tl.float16, bitcast=True)
        wide = half.to(tl.float32) * 256.0
        wide = tl.where((bits & 0x7F) == 0x7F, float("nan"), wide)
    return wide


@triton.jit
def operand(x, FP8: tl.constexpr):
    """Return a block of E4M3 as `tl.dot` takes it here: itself, or the same numbers in BF16."""
    if FP8:
        taken = x
    else:
        taken = from_e4m3(x, FP8).to(tl.bfloat16)
    return taken


@triton.jit
def magnitude(x):
    """Return the bits of |x|: they order as the numbers do, and NaN is above them all."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(largest, least, UE8M0: tl.constexpr):
    """Return max / 448, rounded to nearest, from the largest `magnitude` of a group.

    The product with 1 / 448 is put right by what fma says is missing: exact for all mantissas. A
    max below `least` counts as `least`, at least 448 x 2^-126; NaN and infinities stay.
    """
    most = largest.to(tl.float32, bitcast=True)
    most = tl.maximum(most, least, propagate_nan=tl.PropagateNan.ALL)
    scale = most * _448TH
    scale = tl.fma(tl.fma(scale, MAX, -most), -_448TH, scale)
    if UE8M0:  # up to the next power of two
        up = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & _INFINITY
        scale = up.to(tl.float32, bitcast=True)
    scale = tl.where(most < float("inf"), scale, most)
    return scale


@triton.jit
def reciprocal(m):
    """Return 1 / m rounded to nearest, for m in [1, 2): a parabola, 1 % off, and Newton's steps."""
    y = tl.fma(m, tl.fma(m, 0.3232, -1.4545), 2.1212)
    for _ in tl.static_range(3):
        y = tl.fma(y, tl.fma(-m, y, 1.0), y)
    return tl.maximum(y, _LEAST_RECIPROCAL)  # of the last m alone, Newton's is 0.5


@triton.jit
def divide(x, scale, STEPS: tl.constexpr):
    """Return x / scale, as E4M3 sees it after IEEE's division; for scales from 2^-126 upwards.

    A division is a branch and tens of instructions. Here scale = 2^e m, m in [1, 2): x 2^-e is
    exact, and its product with 1 / m is put right by what fma says is missing. After STEPS = 2 it
    is the quotient rounded to nearest (Markstein 1990); for x of 16 bits one step gets every tie
    of E4M3 right; powers of two need none. Only quotients near 2^-126, zeros here, may differ.
    """
    bits = scale.to(tl.int32, bitcast=True)
    exponent = bits & _INFINITY
    down = (0x7F000000 - exponent).to(tl.float32, bitcast=True)  # 2^-e
    down = tl.where(exponent == _INFINITY, tl.where(scale == scale, 0.0, scale), down)
    x = x * down
    y = x
    if STEPS > 0:
        m = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
        inverse = reciprocal(m)
        y = x * inverse
        for _ in tl.static_range(STEPS):
            y = tl.fma(tl.fma(y, m, -x), -inverse, y)  # signs so that -0 stays -0
    return y


def stored(values: Tensor, fp8: bool) -> Tensor:
    """Return E4M3 values as a kernel takes them: cards without FP8 see bytes."""
    return values if fp8 else values.view(torch.uint8)
