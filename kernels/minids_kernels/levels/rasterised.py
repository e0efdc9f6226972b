"""Level 3: rasterised - tiles made at the same time lie in a square, not in a row.

Gains    where c is wide, a square of tiles needs fewer rows of a and b than a line of
         as many: the L2 cache answers more of the loads, memory fewer. `traffic.loads`
         counts both.
Bound    by waiting, as level 2, if less long.
Letters  M and N rows of the operands, K the summed axis.
Memory   a [M, K], b [N, K], c [M, N]: row-major.
Grid     one program for each tile of c: GROUP_M tiles down, then one to the right.
Book     book/12_kernels.ipynb
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minids_kernels.levels import matrices
from minids_kernels.levels.tiled import BLOCK, WARPS, product, put
from minids_kernels.tiles import ceil_div, place

GROUP = 8  # tiles


@triton.jit
def kernel(
    a, b, c, M, N, K, a_row, b_row, c_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    row, column = place(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    m, n = row * BLOCK_M, column * BLOCK_N
    sums = product(a, b, m, n, M, N, K, a_row, b_row, BLOCK_M, BLOCK_N, BLOCK_K)
    put(c, sums, m, n, M, N, c_row)


def launch(a: Tensor, b: Tensor, c: Tensor, stages: int) -> Tensor:
    """Write a b^T to c and return it."""
    (M, K), N = a.shape, len(b)
    with torch.cuda.device_of(c):  # Triton launches on the current GPU
        kernel[(ceil_div(M, BLOCK) * ceil_div(N, BLOCK),)](
            a, b, c, M, N, K, a.stride(0), b.stride(0), c.stride(0),
            BLOCK, BLOCK, matrices.LINE // a.itemsize, GROUP,
            num_warps=WARPS, num_stages=stages,
        )  # fmt: skip
    return c


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Return a b^T [M, N] in the operands' dtype, summed in FP32."""
    a, b, c, _ = matrices.plain("levels.rasterised", a, b)
    return launch(a, b, c, stages=1)
