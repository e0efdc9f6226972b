"""Level 8: swapped - for few rows of a, rows of b take the tensor core's long side.

A warpgroup's tile is 64 high, but may be as narrow as 8. With 16 tokens for its height
three fourths of the products would be of zeros; Triton then leaves FP8 products, and
multiplies in 16 bits.

Gains    few products of zeros, and programs so small that several run on a
         multiprocessor and keep more of the weight on its way.
Bound    by the bytes of b, where it has tiles for all multiprocessors. Where it has
         not, K is cut too: see fp8_decode.py.
Letters  M and N rows of the operands, K the summed axis.
Memory   as level 7.
Grid     (tiles of b's rows, tiles of a's rows).
Paper    DeepSeek-V3 (arXiv:2412.19437), section 3.3.2, Figure 7.
Book     book/12_kernels.ipynb
Kernel   minids_kernels/fp8_decode.py: this one with K cut into runs
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
    with torch.cuda.device_of(c):  # Triton launches on the current GPU
        kernel[(ceil_div(N, ROWS), ceil_div(M, FEW))](
            left.descriptor(FEW), right.descriptor(ROWS), c, left.scale, right.scale,
            M, N, K, *left.scale.stride(), *right.scale.stride(), c.stride(0),
            FEW, ROWS, card.fp8, num_warps=WARPS,
            num_stages=matrices.stages(card, STAGES, (FEW + ROWS) * DEPTH),
        )  # fmt: skip
    return c
