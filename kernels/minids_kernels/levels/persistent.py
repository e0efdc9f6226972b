"""Level 6: persistent - one program a multiprocessor walks over tiles, fetching ahead.

Gains    nothing starts or ends between two tiles: the loads of the next one run while
         the last one is stored, because both loops are made one (flatten).
Bound    by the tensor cores, and by what feeds them: products of 128 x 128 tiles take
         three fourths of what shared memory can deliver. After that, narrower numbers.
Letters  M and N rows of the operands, K the summed axis.
Memory   a [M, K], b [N, K], c [M, N]: row-major, rows 16 bytes aligned.
Grid     one program for each multiprocessor; it takes every so-many-th tile.
Book     book/12_kernels.ipynb
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minids_kernels.levels import matrices
from minids_kernels.levels.described import describe, product
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
    first, step = tl.program_id(0), tl.num_programs(0)
    tl.assume(K > 0)
    for tile in tl.range(first, tiles_m * tiles_n, step, flatten=True):
        row, column = place(tile, tiles_m, tiles_n, GROUP_M)
        m, n = row * BLOCK_M, column * BLOCK_N
        sums = product(a, b, m, n, K, BLOCK_M, BLOCK_N, BLOCK_K)
        c.store([m, n], sums.to(c.dtype))


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Return a b^T [M, N] in the operands' dtype, summed in FP32."""
    a, b, c, card = matrices.plain("levels.persistent", a, b)
    (M, K), N = a.shape, len(b)
    stored_bytes = BLOCK * BLOCK * c.itemsize  # while the next tile comes in
    with torch.cuda.device_of(c):  # Triton launches on the current GPU
        kernel[(min(ceil_div(M, BLOCK) * ceil_div(N, BLOCK), card.n_sm),)](
            *describe(a, b, c), M, N, K, BLOCK, BLOCK, LINE // a.itemsize, GROUP,
            num_warps=WARPS,
            num_stages=matrices.stages(card, STAGES, 2 * BLOCK * LINE, stored_bytes),
        )  # fmt: skip
    return c
