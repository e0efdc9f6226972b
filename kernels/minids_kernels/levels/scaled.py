"""Level 7: scaled - FP8 products, whose sums over 128 are scaled and added in FP32.

Gains    half the bytes, and twice the products in a cycle.
Bound    by the sums: every 128 products the tensor cores hand them over (the promotion
         of DeepSeek-V3), and adding them up costs the other units as many cycles as a
         fourth of the products. Cards before Hopper multiply out of registers, of which
         this tile needs too many: right, but slow.
Letters  M and N rows of the operands, K the summed axis.
Memory   a [M, K], b [N, K] in E4M3, c [M, N]: row-major, rows 16 bytes aligned; scales
         for 128 numbers of a row of a, and for 128 x 128 of b.
Grid     one program for each multiprocessor; it takes every so-many-th tile.
Paper    DeepSeek-V3 (arXiv:2412.19437), section 3.3.2, Figure 7.
Book     book/12_kernels.ipynb
Kernel   minids_kernels/fp8_matmul.py: this one with a choice of tiles, and gradients
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from minids_kernels.e4m3 import operand as in_dot
from minids_kernels.levels import matrices
from minids_kernels.levels.pipelined import STAGES
from minids_kernels.levels.rasterised import GROUP
from minids_kernels.levels.tiled import BLOCK, WARPS
from minids_kernels.scaled import Scaled
from minids_kernels.tiles import DEPTH, ceil_div, place, scale_of_tile


@triton.jit
def kernel(
    a, b, c, a_scale, b_scale, M, N, K, a_row, a_k, b_row, b_k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr,
    FP8: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first, step = tl.program_id(0), tl.num_programs(0)
    tl.assume(K > 0)
    for tile in tl.range(first, tiles_m * tiles_n, step, flatten=True):
        row, column = place(tile, tiles_m, tiles_n, GROUP_M)
        m, n = row * BLOCK_M, column * BLOCK_N
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        a_scales, b_scales = a_scale, b_scale
        for k in range(0, K, 128):
            scale = scale_of_tile(
                a_scales, b_scales, m, n, M, N, a_row, b_row, BLOCK_M, BLOCK_N, 1, 128
            )
            left, right = in_dot(a.load([m, k]), FP8), in_dot(b.load([n, k]), FP8)
            sums += tl.dot(left, right.T) * scale
            a_scales += a_k
            b_scales += b_k
        c.store([m, n], sums.to(c.dtype))


def multiply(a: Scaled, b: Scaled, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a b^T [M, N], summed in FP32 and rounded to `dtype`."""
    left, right, c, card = matrices.scaled("levels.scaled", a, b, dtype)
    (M, K), N = left.values.shape, len(right.values)
    stored_bytes = BLOCK * BLOCK * c.itemsize
    with torch.cuda.device_of(c):  # Triton launches on the current GPU
        kernel[(min(ceil_div(M, BLOCK) * ceil_div(N, BLOCK), card.n_sm),)](
            left.descriptor(BLOCK), right.descriptor(BLOCK),
            TensorDescriptor.from_tensor(c, [BLOCK, BLOCK]), left.scale, right.scale,
            M, N, K, *left.scale.stride(), *right.scale.stride(),
            BLOCK, BLOCK, GROUP, card.fp8, num_warps=WARPS,
            num_stages=matrices.stages(card, STAGES, 2 * BLOCK * DEPTH, stored_bytes),
        )  # fmt: skip
    return c
