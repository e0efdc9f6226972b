"""FP8 products of many rows: persistent programs walk over the tiles of the output.

    out = a b^T, each 128 products scaled by both operands' scales and added in FP32 (tiles.py)

Serves reading a prompt and training: forward and input gradient (tiles of 1 x 128 against blocks)
and weight gradient (1 x 128 on both sides, K the tokens, added to `out` over micro-batches). Up to
128 rows of `a` are the work of fp8_decode.py.

A program fetches the first groups of its next tile while it stores the last one. What the tensor
cores hand over costs as many cycles as a fourth of the product: two small programs on a
multiprocessor do that in turns; one with a large tile reads less from the L2 cache.

Letters  M and N rows of the operands, K the summed axis.
Memory   a [M, K], b [N, K]: row-major; their scales best with neighbouring rows side by side.
Grid     as many programs as run at once; each takes every so-many-th tile, in stripes of GROUP_M.
Paper    DeepSeek-V3 (arXiv:2412.19437), sections 3.3.1-3.3.2, Figures 6 and 7.
Book     book/11_fp8.ipynb
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from minids_kernels import cards, configs, fp8_decode
from minids_kernels.cards import Card
from minids_kernels.e4m3 import operand as in_dot
from minids_kernels.scaled import Scaled
from minids_kernels.tiles import (
    DEPTH,
    Operand,
    by_four_warps,
    ceil_div,
    is_aligned,
    operand,
    place,
    scale_of_tile,
)

_NAME = "scaled_matmul"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Prefill(NamedTuple):
    """How the output is cut: a tile is BLOCK_M x (PARTS BLOCK_N), one `tl.dot` a part."""

    BLOCK_M: int
    BLOCK_N: int
    PARTS: int
    GROUP_M: int
    programs: int  # on one multiprocessor
    warps: int
    stages: int


CANDIDATES = (
    Prefill(128, 128, 1, 8, programs=1, warps=8, stages=4),
    Prefill(128, 64, 3, 8, programs=1, warps=8, stages=4),  # 192 wide
    Prefill(64, 128, 1, 16, programs=2, warps=4, stages=3),
    Prefill(128, 64, 1, 8, programs=2, warps=4, stages=3),
    Prefill(64, 64, 1, 16, programs=3, warps=4, stages=3),
    Prefill(64, 32, 1, 16, programs=2, warps=4, stages=2),
)
_OF_REGISTERS = CANDIDATES[-1]  # where each warp multiplies out of registers


def rule_of_thumb(M: int, N: int, K: int, b_group: int, card: Card) -> Prefill:
    """Return the config that leaves the least of the card idle in its last round of tiles.

    A tile costs its products and, beside them, the bytes that it reads from the L2 cache and that
    its parts read from shared memory. How they are weighed was counted, not timed.
    """

    def time(config: Prefill) -> float:
        width = config.PARTS * config.BLOCK_N
        tiles = ceil_div(M, config.BLOCK_M) * ceil_div(N, width)
        rounds = ceil_div(tiles, card.n_sm * config.programs)
        read = 64 / config.BLOCK_M + 64 / width + 16 / config.BLOCK_N
        return rounds * config.programs * config.BLOCK_M * width * (1 + read)

    if not by_four_warps(card):
        return _OF_REGISTERS
    return min((config for config in CANDIDATES if in_registers(config, b_group)), key=time)


def in_registers(config: Prefill, b_group: int) -> bool:
    """Say whether the sums stay in registers: beside three parts, not with a scale a column."""
    return config.PARTS == 1 or b_group == DEPTH


@triton.jit(do_not_specialize=["M", "K", "a_k"])
def prefill(
    a_desc, b_desc, out_desc, out, a_scale, b_scale,
    M, N, K, a_row, a_k, b_row, b_k, out_row, out_col,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr, GROUP_M: tl.constexpr,
    A_GROUP: tl.constexpr, B_GROUP: tl.constexpr,
    ADD: tl.constexpr, DESCRIBED: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    tl.static_assert(BLOCK_M <= 128 and BLOCK_N <= 128)  # a tile's rows lie in one group of 128
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N * PARTS)
    tl.assume(K > 0)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        row, column = place(tile, tiles_m, tiles_n, GROUP_M)
        m, n = row * BLOCK_M, column * BLOCK_N * PARTS
        sums = (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),) * PARTS
        a_scales, b_scales = a_scale, b_scale
        for k in range(tl.cdiv(K, 128)):
            a = in_dot(a_desc.load([m, k * 128]), FP8)
            longer = ()
            for part in tl.static_range(PARTS):
                first = n + part * BLOCK_N
                scale = scale_of_tile(
                    a_scales, b_scales, m, first, M, N, a_row, b_row,
                    BLOCK_M, BLOCK_N, A_GROUP, B_GROUP,
                )  # fmt: skip
                b = in_dot(b_desc.load([first, k * 128]), FP8)
                longer += (sums[part] + tl.dot(a, b.T) * scale,)
            sums = longer
            a_scales += a_k
            b_scales += b_k
        for part in tl.static_range(PARTS):
            first = n + part * BLOCK_N
            if DESCRIBED:
                out_desc.store([m, first], tl.cast(sums[part], out.dtype.element_ty))
            else:
                put(out, sums[part], m, first, M, N, out_row, out_col, ADD)


@triton.jit
def put(out, x, m, n, M, N, row, col, ADD: tl.constexpr):
    """Store a tile, or add it to what is there, where the matrix has rows and columns."""
    rows = m + tl.arange(0, x.shape[0])[:, None]
    cols = n + tl.arange(0, x.shape[1])[None, :]
    pointers = out + rows.to(tl.int64) * row + cols.to(tl.int64) * col
    inside = (rows < M) & (cols < N)
    if ADD:
        x += tl.load(pointers, mask=inside)
    tl.store(pointers, x.to(out.dtype.element_ty), mask=inside)


def launch(a: Operand, b: Operand, out: Tensor, add: bool, card: Card) -> None:
    """Write a b^T to `out`, or add it to what is there."""
    (M, K), N = a.values.shape, len(b.values)
    tuned = configs.find("fp8_matmul.Prefill", (M, N, K, b.group), card)
    config = Prefill(**tuned) if tuned else rule_of_thumb(M, N, K, b.group, card)
    tiles = ceil_div(M, config.BLOCK_M) * ceil_div(N, config.BLOCK_N * config.PARTS)
    described = not add and out.stride(1) == 1 and is_aligned(out)
    block = [config.BLOCK_M, config.BLOCK_N]
    prefill[(min(tiles, card.n_sm * config.programs),)](
        a.descriptor(config.BLOCK_M), b.descriptor(config.BLOCK_N),
        TensorDescriptor.from_tensor(out, block) if described else None, out,
        a.scale, b.scale, M, N, K, *a.scale.stride(), *b.scale.stride(), *out.stride(),
        config.BLOCK_M, config.BLOCK_N, config.PARTS, config.GROUP_M, a.group, b.group,
        add, described, card.fp8, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def scaled_matmul(
    a: Scaled, b: Scaled, dtype: torch.dtype = torch.float32, out: Tensor | None = None
) -> Tensor:
    """Return a b^T [M, N]; where `out`, in FP32, is given, the product is added to it in place.

    Both operands have 1 or 128 rows a scale and groups of 128 along K. Values whose rows do not lie
    along K in steps of 16 bytes are copied first. Raises ValueError for anything else.
    """
    card = cards.card(_NAME, a.values, a.scale, b.values, b.scale, *([] if out is None else [out]))
    _check(a, b, dtype, out)
    (M, K), N = a.values.shape, len(b.values)
    add = out is not None
    if out is None:
        out = torch.empty((M, N), dtype=dtype, device=a.values.device)
    if 0 in (M, N, K):
        return out if add else out.zero_()
    few = M <= fp8_decode.most_tokens(card)
    with torch.cuda.device_of(out):  # Triton launches on the current GPU
        (fp8_decode.launch if few else launch)(operand(a, card), operand(b, card), out, add, card)
    return out


def _check(a: Scaled, b: Scaled, dtype: torch.dtype, out: Tensor | None) -> None:
    for name, x in (("a", a), ("b", b)):
        shape, group = tuple(x.values.shape), tuple(x.group)
        if len(shape) != 2 or group not in ((1, DEPTH), (DEPTH, DEPTH)):
            raise ValueError(
                f"{_NAME}: {name} must be a matrix in groups of (1, {DEPTH}) or ({DEPTH}, {DEPTH}),"
                f" got {shape} by {group}: quantise it along the summed axis"
            )
        if x.values.dtype != torch.float8_e4m3fn or x.scale.dtype != torch.float32:
            raise ValueError(
                f"{_NAME}: {name} must hold float8_e4m3fn and scales in float32, got "
                f"{x.values.dtype} and {x.scale.dtype}: quantise it"
            )
        scales = tuple(ceil_div(n, size) for n, size in zip(shape, group, strict=True))
        if tuple(x.scale.shape) != scales:
            got = tuple(x.scale.shape)
            raise ValueError(f"{_NAME}: {name} {shape} by {group} has scales {scales}, got {got}")
    if a.values.shape[1] != b.values.shape[1]:
        got = f"{tuple(a.values.shape)} and {tuple(b.values.shape)}"
        raise ValueError(f"{_NAME}: operands must share their last axis, got {got}: transpose one")
    if dtype not in DTYPES:
        raise ValueError(f"{_NAME}: dtype must be one of {DTYPES}, got {dtype}: cast the result")
    shape = (len(a.values), len(b.values))
    if out is not None and (tuple(out.shape) != shape or {out.dtype, dtype} != {torch.float32}):
        raise ValueError(
            f"{_NAME}: out must be {shape} in float32, as dtype, got {tuple(out.shape)} in "
            f"{out.dtype} with dtype {dtype}: sums over micro-batches need FP32"
        )
