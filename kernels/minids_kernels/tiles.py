"""What products of scaled matrices share: where a tile lies, its scales, its operands' memory.

    out[m, n] = sum over groups g   scale_a[m, g] scale_b[n, g]   sum over k in g   a[m, k] b[n, k]

The inner sum is one `tl.dot` over 128 that starts from zero, on the tensor cores; the outer one is
kept in FP32 registers ("promotion", DeepSeek-V3 section 3.3.2, Figure 7b): Hopper's tensor cores
add FP8 products with about 14 bits, too few for a chain over all of K.

Layout  values: both operands row-major along K, rows 16 bytes aligned, read through descriptors,
        which fill what lies outside of the matrix with zeros. Scales: any strides.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from minids_kernels.cards import Card
from minids_kernels.e4m3 import stored
from minids_kernels.scaled import Scaled

DEPTH = 128  # N_C: products that are summed before their scale is applied
_ALIGNED = 16  # bytes: what a descriptor's base and row stride are multiples of


@triton.jit
def place(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Return row and column of the tile with this number: down GROUP_M rows, then to the right.

    Tiles that run at the same time then share rows of A and B, which the L2 cache holds.
    """
    stripe = GROUP_M * tiles_n
    first = tile // stripe * GROUP_M
    height = min(tiles_m - first, GROUP_M)
    inside = tile % stripe
    return first + inside % height, inside // height


@triton.jit
def scales(pointer, first, n_rows, stride, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """Return the scales of BLOCK rows from `first` on, which lie in one group if GROUP is 128.

    One number for all is loaded as a vector too: a scalar load in a pipelined loop has raced on
    newer cards, and a thread of wgmma's layout holds no more than a few rows.
    """
    rows = first + tl.arange(0, BLOCK)
    where = rows.to(tl.int64) if GROUP == 1 else tl.zeros((BLOCK,), tl.int64) + first // GROUP
    return tl.load(pointer + where * stride, mask=rows < n_rows, other=0.0)


@triton.jit
def scale_of_tile(
    a_scale, b_scale, m, n, M, N, a_row, b_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, A_GROUP: tl.constexpr, B_GROUP: tl.constexpr,
):  # fmt: skip
    """Return what a tile's sum over one group is multiplied with: a column, or a whole tile."""
    rows = scales(a_scale, m, M, a_row, BLOCK_M, A_GROUP)
    if B_GROUP == 1:
        scale = rows[:, None] * scales(b_scale, n, N, b_row, BLOCK_N, 1)[None, :]
    else:
        block = tl.zeros((BLOCK_M,), tl.int64) + n // B_GROUP
        scale = (rows * tl.load(b_scale + block * b_row, mask=n < N, other=0.0))[:, None]
    return scale


class Operand(NamedTuple):
    """A matrix as the kernels read it."""

    values: Tensor  # [rows, K], row-major and aligned; bytes on cards without FP8
    scale: Tensor  # [groups of rows, groups of K]
    group: int  # rows that share a scale: 1 or 128

    def descriptor(self, rows: int) -> TensorDescriptor:
        """Describe the values for loads of `rows` x 128."""
        return TensorDescriptor.from_tensor(self.values, [rows, DEPTH])


def operand(x: Scaled, card: Card) -> Operand:
    """Return the operand's memory as descriptors need it, copied only where it is not so."""
    values = x.values
    rows, cols = values.shape
    if values.stride(1) != 1 or values.stride(0) < cols or not is_aligned(values):
        width = cols + -cols % _ALIGNED
        padded = torch.empty((rows, width), dtype=torch.uint8, device=values.device)[:, :cols]
        values = padded.copy_(values.view(torch.uint8)).view(values.dtype)
    return Operand(stored(values, card.fp8), x.scale, x.group[0])


def by_four_warps(card: Card) -> bool:
    """Say whether products are made out of shared memory, by four warps together or for them.

    So are Hopper's, and Blackwell's in the data centre; elsewhere each warp has its own product,
    out of its registers, which large tiles overflow.
    """
    return 9 <= card.capability[0] <= 11


def ceil_div(n: int, size: int) -> int:
    """Return how many tiles or groups of this size cover n."""
    return -(-n // size)


def is_aligned(x: Tensor) -> bool:
    """Say whether a descriptor can describe rows of x: base and stride in steps of 16 bytes."""
    return x.data_ptr() % _ALIGNED == 0 and x.stride(0) * x.itemsize % _ALIGNED == 0
