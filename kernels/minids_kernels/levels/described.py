"""Level 5: descriptors - the copy engine fetches whole tiles; threads only ask.

A descriptor, made on the host, says where a matrix lies, its sizes, and how large a
tile is. One thread asks for a tile by its corner; the engine (TMA, on Hopper and later)
computes addresses, fills up with zeros what lies outside of the matrix, and stores
nothing there.

Gains    no addresses and no masks in the loop: their instructions and registers are
         free.
Bound    by both ends of a tile: while it is stored and the next program starts, nothing
         is multiplied.
Letters  M and N rows of the operands, K the summed axis.
Memory   a [M, K], b [N, K], c [M, N]: row-major, rows 16 bytes aligned.
Grid     one program for each tile of c: GROUP_M tiles down, then one to the right.
Book     book/12_kernels.ipynb
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from minids_kernels.levels import matrices
from minids_kernels.levels.matrices import LINE
from minids_kernels.levels.pipelined import STAGES
from minids_kernels.levels.rasterised import GROUP
from minids_kernels.levels.tiled import BLOCK, WARPS
from minids_kernels.tiles import ceil_div, place


@triton.jit
def kernel(
    a, b, c, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    row, column = place(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    m, n = row * BLOCK_M, column * BLOCK_N
    sums = product(a, b, m, n, K, BLOCK_M, BLOCK_N, BLOCK_K)
    c.store([m, n], sums.to(c.dtype))


@triton.jit
def product(
    a, b, m, n, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return the sums of the tile whose first number is c[m, n]."""
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        left, right = a.load([m, k]), b.load([n, k])
        sums = tl.dot(left, right.T, sums, input_precision="ieee")
    return sums


def describe(a: Tensor, b: Tensor, c: Tensor) -> tuple[TensorDescriptor, ...]:
    """Return descriptors of the three matrices, by the tiles that a program moves."""
    depth = LINE // a.itemsize
    blocks = ([BLOCK, depth], [BLOCK, depth], [BLOCK, BLOCK])
    return tuple(map(TensorDescriptor.from_tensor, (a, b, c), blocks))


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Return a b^T [M, N] in the operands' dtype, summed in FP32."""
    a, b, c, card = matrices.plain("levels.described", a, b)
    (M, K), N = a.shape, len(b)
    with torch.cuda.device_of(c):  # Triton launches on the current GPU
        kernel[(ceil_div(M, BLOCK) * ceil_div(N, BLOCK),)](
            *describe(a, b, c), M, N, K, BLOCK, BLOCK, LINE // a.itemsize, GROUP,
            num_warps=WARPS, num_stages=matrices.stages(card, STAGES, 2 * BLOCK * LINE),
        )  # fmt: skip
    return c
