"""Level 8: swapped - for few rows of a, the rows of b take the tensor core's longer side.

Its tile is 64 high or higher, but may be 8 wide: 16 tokens as its height would leave three fourths
of the products to zeros, and Triton then gives up FP8 products altogether.

Gains   no product is wasted; a program is small enough for several on a multiprocessor, which
        together keep more loads of the weight on their way.
Bound   by the bytes of b, where it has tiles for all multiprocessors; else by their number: then K
        is cut too (fp8_decode.py).
Letters  M and N rows of the operands, K the summed axis.
Memory   as level 7.
Grid     (tiles of b's rows, tiles of a's rows).
Book     book/12_kernels.ipynb        Kernel  minids_kernels/fp8_decode.py
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minids_kernels.e4m3 import operand as in_dot
from minids_kernels.levels import matrices
from minids_kernels.levels.tiled import put
from minids_kernels.scaled import Scaled
from minids_kernels.tiles import DEPTH, ceil_div, scale_of_tile

FEW, ROWS = 16, 64  # rows of a, and of b
STAGES, WARPS = 6, 4


@triton.jit
def kernel(
    a, b, c, a_scale, b_scale, M, N, K, a_row, a_k, b_row, b_k, c_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    n, m = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_M
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, K, 128):
        scale = scale_of_tile(
            b_scale, a_scale, n, m, N, M, b_row, a_row, BLOCK_N, BLOCK_M, 128, 1
        )  # fmt: skip
        left, right = in_dot(b.load([n, k]), FP8), in_dot(a.load([m, k]), FP8)
        sums += tl.dot(left, right.T) * scale
        a_scale += a_k
        b_scale += b_k
    put(c, sums.T, m, n, M, N, c_row)


def multiply(a: Scaled, b: Scaled, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a b^T [M, N], summed in FP32 and rounded to `dtype`."""
    left, right, c, card = matrices.scaled("levels.swapped", a, b, dtype)
    (M, K), N = left.values.shape, len(right.values)
    kernel[(ceil_div(N, ROWS), ceil_div(M, FEW))](
        left.descriptor(FEW), right.descriptor(ROWS), c, left.scale, right.scale,
        M, N, K, *left.scale.stride(), *right.scale.stride(), c.stride(0), FEW, ROWS, card.fp8,
        num_warps=WARPS, num_stages=matrices.stages(card, STAGES, (FEW + ROWS) * DEPTH),
    )  # fmt: skip
    return c
