"""E4M3 in a kernel: by the card's instructions, or by its bits on cards that have none.

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
_SUBNORMAL_ULPS = tl.constexpr(16384.0)  # FP32 numbers around 2^14 lie 2^-9 apart


@triton.jit
def to_e4m3(x, FP8: tl.constexpr):
    """Round FP32 to nearest even; larger numbers become +-448, NaN becomes 0x7F."""
    x = tl.clamp(x, -MAX, MAX, propagate_nan=tl.PropagateNan.ALL)
    if FP8:
        code = x.to(tl.float8e4nv)
    else:
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


def stored(values: Tensor, fp8: bool) -> Tensor:
    """Return E4M3 values as a kernel takes them: cards without FP8 see bytes."""
    return values if fp8 else values.view(torch.uint8)
