"""Level 1: one loop - a program for each number of the output: a row times a row.

Gains    as many programs at a time as the card has room for, and 32 products in a step
         of each.
Bound    by loads: 2 operations for every 2 numbers read. Each row of a is read N times,
         each row of b M times, and the tensor cores are idle.
Letters  M and N rows of the operands, K the summed axis.
Memory   a [M, K], b [N, K], c [M, N]: row-major.
Grid     one program, of one warp, for each number of c: along its rows.
Book     book/12_kernels.ipynb
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minids_kernels.levels import matrices


@triton.jit
def kernel(a, b, c, N, K, a_row, b_row, c_row, BLOCK_K: tl.constexpr):
    m = (tl.program_id(0) // N).to(tl.int64)
    n = (tl.program_id(0) % N).to(tl.int64)
    sums = tl.zeros((BLOCK_K,), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        left = tl.load(a + m * a_row + k, mask=k < K, other=0.0)
        right = tl.load(b + n * b_row + k, mask=k < K, other=0.0)
        sums += left.to(tl.float32) * right.to(tl.float32)
    tl.store(c + m * c_row + n, tl.sum(sums).to(c.dtype.element_ty))


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Return a b^T [M, N] in the operands' dtype, summed in FP32."""
    M, N = a.shape[:1].numel(), b.shape[:1].numel()
    if M * N >= 2**31:
        raise ValueError(f"levels.loop: at most 2^31 - 1 sums, got {M} x {N}: cut a")
    a, b, c, _ = matrices.plain("levels.loop", a, b)
    with torch.cuda.device_of(c):  # Triton launches on the current GPU
        kernel[(M * N,)](
            a, b, c, N, a.shape[1], a.stride(0), b.stride(0), c.stride(0),
            BLOCK_K=matrices.LINE, num_warps=1,
        )  # fmt: skip
    return c
