"""What kernels of attention share: a softmax that grows tile by tile, and operands' memory.

    o = sum over s of w_s v_s / sum over s of w_s,    w_s = 2^(c x_s - m),    c = scale log2(e)

m is the largest c x_s so far. Where a tile brings a larger one, older sums are multiplied by
2^(old m - new m): no number overflows, and no row of scores is ever stored.

Layout  operands: rows along the last axis, every step between rows in multiples of 16 bytes, as
        descriptors want it; any other layout is copied into rows that are padded.
Grid    none: this file holds no kernel.
Paper   FlashAttention-2, arXiv:2307.08691.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2_E = 1.4426950408889634
_LN_2 = tl.constexpr(0.6931471805599453)
_LEAST_BLOCK = 16  # of `tl.dot`, and 16 bytes of any dtype
_ALIGNED = 16  # bytes: what a descriptor's base and strides are multiples of


Widths = tuple[int, int, int]  # N, R, V: of attention that is not absorbed


@triton.jit
def grow(score, most, total, c, SEES: tl.constexpr):
    """Return a tile's weights, the factor of older sums, and largest and total with this tile.

    Scores not yet scaled, -inf where not seen. `SEES` promises that each row has seen something;
    without it, a row that has not keeps -inf and 0.
    """
    larger = tl.maximum(most, tl.max(score, 1) * c)
    base = larger if SEES else tl.where(larger == -float("inf"), 0.0, larger)
    weight = tl.exp2(score * c - base[:, None])
    factor = tl.exp2(most - base)
    return weight, factor, larger, total * factor + tl.sum(weight, 1)


@triton.jit
def finish(most, total):
    """Return what sums are divided by, and the natural log-sum-exp; -inf where nothing was seen."""
    return tl.where(total == 0.0, 1.0, total), (most + tl.log2(total)) * _LN_2


def padded(width: int) -> int:
    """Return how wide a block must be for rows of this width."""
    return max(_LEAST_BLOCK, 1 << (width - 1).bit_length())


def describable(x: Tensor) -> bool:
    """Say whether descriptors can describe x as it lies."""
    steps = x.stride()[:-1]  # a step of 0 would be legal, but is promised by nobody
    even = all(step > 0 and step * x.itemsize % _ALIGNED == 0 for step in steps)
    return even and x.stride(-1) == 1 and x.data_ptr() % _ALIGNED == 0


def described(x: Tensor) -> Tensor:
    """Return x if descriptors can describe it, else a copy that they can."""
    return x if describable(x) else empty(tuple(x.shape), x).copy_(x)


def empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return memory without values that descriptors can describe: its rows may be padded."""
    *outer, width = shape
    stored = width + -width % (_ALIGNED // like.itemsize)
    return torch.empty((*outer, stored), dtype=like.dtype, device=like.device)[..., :width]


def by_head(x: Tensor, rows: int) -> TensorDescriptor:
    """Describe [B, T, H, N] for loads of so many rows of one head."""
    x = described(x).transpose(1, 2)
    return TensorDescriptor.from_tensor(x, [1, 1, rows, padded(x.shape[-1])])
