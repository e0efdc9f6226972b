"""FP8 products of few rows: the weight streams through the tensor cores, cut along K too.

    out = a b^T, each 128 products scaled by both operands' scales and added in FP32 (tiles.py)

The sides change places. Rows of the weight b take the side of the tensor core's tile that is never
below 64, tokens (rows of a) the one that may be 16. Tiles of b alone are too few to keep a GPU
busy, so K is cut into SPLITS runs of groups; their sums wait in FP32 side by side until a second
kernel adds them in order: no atomics, the same bits in every run.

Up to 64 tokens the cut depends on N, K and the card alone: a token's result does not change with
the number of tokens beside it.

Letters  M tokens, N rows of the weight, K the summed axis.
Memory   a [M, K], b [N, K]: row-major; sums of the splits [SPLITS, M, N]; out [M, N]: any strides.
Grid     (tiles of b's rows, SPLITS); the second kernel takes the output in stretches.
Paper    DeepSeek-V3 (arXiv:2412.19437), section 3.3.2, Figure 7b.    Book  book/11_fp8.ipynb
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from minids_kernels import configs
from minids_kernels.cards import Card
from minids_kernels.e4m3 import operand as in_dot
from minids_kernels.tiles import DEPTH, Operand, by_four_warps, ceil_div, scale_of_tile

_FEW_TOKENS = 64  # up to here reading the weight is all the work
_MOST_TOKENS = 128
_LEAST_GROUPS = 4  # of a run: shorter ones fill the pipeline and are over
_FILL, _HAND_OVER = 4, 8  # what a program costs beside its groups, in groups; the latter for splits
_STRETCH = 1024  # numbers of the output that one program adds up


class Decode(NamedTuple):
    """How the weight is cut: BLOCK_N rows at a time, K in SPLITS runs."""

    BLOCK_N: int
    SPLITS: int
    warps: int
    stages: int


_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
# BLOCK_N, warps, stages; the last one where each warp multiplies out of registers
_FEW, _FEW_SHALLOW, _MANY, _OF_REGISTERS = (64, 4, 6), (64, 4, 4), (128, 8, 4), (32, 4, 3)
CANDIDATES = tuple(
    Decode(rows, splits, warps, stages)
    for rows, warps, stages in (_FEW, _FEW_SHALLOW, _MANY, _OF_REGISTERS)
    for splits in _SPLITS
)


def most_tokens(card: Card) -> int:
    """Return up to how many rows of `a` this kernel is the better one, and its sums fit."""
    return _MOST_TOKENS if by_four_warps(card) else _FEW_TOKENS


def rule_of_thumb(M: int, N: int, K: int, card: Card) -> Decode:
    """Return a config by counting: for few tokens, two programs on every multiprocessor.

    For more, the cut with the shortest time: rounds of programs times groups a program works on.
    """
    few = M <= _FEW_TOKENS
    rows, warps, stages = (_FEW if few else _MANY) if by_four_warps(card) else _OF_REGISTERS
    tiles, groups = ceil_div(N, rows), ceil_div(K, DEPTH)
    legal = [splits for splits in _SPLITS if splits == 1 or groups >= _LEAST_GROUPS * splits]

    def time(splits: int) -> int:
        rounds = ceil_div(tiles * splits, card.n_sm)
        return rounds * (ceil_div(groups, splits) + _FILL + _HAND_OVER * (splits > 1))

    if few:
        enough = [splits for splits in legal if tiles * splits >= 2 * card.n_sm]
        return Decode(rows, (enough or legal[-1:])[0], warps, stages)
    return Decode(rows, min(legal, key=time), warps, stages)


@triton.jit(do_not_specialize=["M", "K", "a_k"])
def decode(
    a_desc, b_desc, out, a_scale, b_scale,
    M, N, K, a_row, a_k, b_row, b_k, out_split, out_row, out_col,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, A_GROUP: tl.constexpr, B_GROUP: tl.constexpr,
    ADD: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    n, split = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    n_groups = tl.cdiv(K, 128)
    first = split * n_groups // tl.num_programs(1)  # runs differ by one group at most
    end = (split + 1) * n_groups // tl.num_programs(1)
    a_scale += first.to(tl.int64) * a_k
    b_scale += first.to(tl.int64) * b_k
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(first, end):
        scale = scale_of_tile(
            b_scale, a_scale, n, 0, N, M, b_row, a_row, BLOCK_N, BLOCK_M, B_GROUP, A_GROUP
        )
        b = in_dot(b_desc.load([n, k * 128]), FP8)
        a = in_dot(a_desc.load([0, k * 128]), FP8)
        sums += tl.dot(b, a.T) * scale
        a_scale += a_k
        b_scale += b_k
    tokens = tl.arange(0, BLOCK_M)[None, :]
    rows = (n + tl.arange(0, BLOCK_N))[:, None]
    inside = (tokens < M) & (rows < N)
    out += split.to(tl.int64) * out_split
    pointers = out + tokens.to(tl.int64) * out_row + rows.to(tl.int64) * out_col
    if ADD:
        sums += tl.load(pointers, mask=inside)
    tl.store(pointers, sums.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def add_up(
    splits, out, M, N, out_row, out_col,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Add the sums of the splits in order; with ADD, to what is in `out`."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < M.to(tl.int64) * N
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(splits + split * M.to(tl.int64) * N + at, mask=inside)
    pointers = out + at // N * out_row + at % N * out_col
    if ADD:
        total += tl.load(pointers, mask=inside)
    tl.store(pointers, total.to(out.dtype.element_ty), mask=inside)


def launch(a: Operand, b: Operand, out: Tensor, add: bool, card: Card) -> None:
    """Write a b^T to `out`, or add it to what is there."""
    (M, K), N = a.values.shape, len(b.values)
    tuned = configs.find("fp8_decode.Decode", (max(M, _FEW_TOKENS), N, K), card)
    config = Decode(**tuned) if tuned else rule_of_thumb(M, N, K, card)
    block_m, n_splits = max(16, 1 << (M - 1).bit_length()), config.SPLITS
    partial = torch.empty((n_splits, M, N), device=out.device) if n_splits > 1 else out[None]
    decode[(ceil_div(N, config.BLOCK_N), n_splits)](
        a.descriptor(block_m), b.descriptor(config.BLOCK_N), partial, a.scale, b.scale,
        M, N, K, *a.scale.stride(), *b.scale.stride(), *partial.stride(),
        block_m, config.BLOCK_N, a.group, b.group, add and n_splits == 1, card.fp8,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if n_splits > 1:
        add_up[(ceil_div(M * N, _STRETCH),)](
            partial, out, M, N, *out.stride(), n_splits, _STRETCH, add, num_warps=4
        )
