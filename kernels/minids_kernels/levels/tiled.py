"""Level 2: tiles - a program makes 128 x 128 sums, and the tensor cores multiply.

Gains    every number that is read takes part in 128 products, not in one; a warpgroup's
         instruction makes 64 x 128 x 16 of them.
Bound    by waiting: a step loads, then multiplies what it loaded, and half of the
         program is idle at any time.
Letters  M and N rows of the operands, K the summed axis.
Memory   a [M, K], b [N, K], c [M, N]: row-major; outside of them lie zeros.
Grid     one program for each tile of c: along its rows.
Book     book/12_kernels.ipynb
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minids_kernels.levels import matrices
from minids_kernels.tiles import ceil_div

BLOCK = 128  # rows of a and rows of b
WARPS = 8


@triton.jit
def kernel(
    a, b, c, M, N, K, a_row, b_row, c_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BLOCK_N)
    m = tl.program_id(0) // tiles_n * BLOCK_M
    n = tl.program_id(0) % tiles_n * BLOCK_N
    sums = product(a, b, m, n, M, N, K, a_row, b_row, BLOCK_M, BLOCK_N, BLOCK_K)
    put(c, sums, m, n, M, N, c_row)


@triton.jit
def product(
    a, b, m, n, M, N, K, a_row, b_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return the sums of the tile whose first number is c[m, n]."""
    k = tl.arange(0, BLOCK_K)[None, :]
    left_rows = m + tl.arange(0, BLOCK_M)[:, None]
    right_rows = n + tl.arange(0, BLOCK_N)[:, None]
    a += left_rows.to(tl.int64) * a_row + k
    b += right_rows.to(tl.int64) * b_row + k
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, K, BLOCK_K):
        inside = first + k < K
        left = tl.load(a + first, mask=inside & (left_rows < M), other=0.0)
        right = tl.load(b + first, mask=inside & (right_rows < N), other=0.0)
        sums = tl.dot(left, right.T, sums, input_precision="ieee")
    return sums


@triton.jit
def put(c, sums, m, n, M, N, c_row):
    """Round a tile and store what lies inside of c."""
    rows = m + tl.arange(0, sums.shape[0])[:, None]
    cols = n + tl.arange(0, sums.shape[1])[None, :]
    pointers = c + rows.to(tl.int64) * c_row + cols
    tl.store(pointers, sums.to(c.dtype.element_ty), mask=(rows < M) & (cols < N))


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Return a b^T [M, N] in the operands' dtype, summed in FP32."""
    a, b, c, _ = matrices.plain("levels.tiled", a, b)
    (M, K), N = a.shape, len(b)
    with torch.cuda.device_of(c):  # Triton launches on the current GPU
        kernel[(ceil_div(M, BLOCK) * ceil_div(N, BLOCK),)](
            a, b, c, M, N, K, a.stride(0), b.stride(0), c.stride(0),
            BLOCK, BLOCK, matrices.LINE // a.itemsize, num_warps=WARPS, num_stages=1,
        )  # fmt: skip
    return c
