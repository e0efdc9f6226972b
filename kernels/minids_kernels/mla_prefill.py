"""Attention over many new tokens: each head's keys beside one rotary key that all heads share.

    o[t] = sum over s seen of softmax_s(scale (q_nope[t] k_nope[s] + q_rope[t] k_rope[s])) v[s]

A program holds a tile of one head's queries and walks over keys and values tile by tile; sums and
softmax are in FP32 (softmax.py). The two products of a score are one chain of the tensor cores, so
192 need not be padded to 256, and the rotary key is read as it lies in the latent, not once a head.

Tiles that all queries of the program see whole come first and carry no mask. Then come those on the
diagonal, or where the row ends: only there may slots of a cache hold NaN; their values become 0.
Documents put one comparison into every tile, and let the walk begin where the first of them does.

A token's result does not depend on the rows beside it in the batch: no config is chosen by B.

Letters  T queries, S keys, H heads, N, R and V widths, as in minids.mla; BLOCK_M queries, BLOCK_N
         keys a tile.
Memory   q [B, T, H, N | R], k_nope and v [B, S, H, N | V], k_rope [B, S, R], o [B, T, H, V], all in
         one dtype; log-sum-exp FP32 [B, H, T]. Rows of o are padded to 16 bytes.
Grid     (tiles of queries, H, B); the longest walks of a head start first, and its programs run
         side by side: the L2 cache holds one head's keys, not all heads'.
Paper    FlashAttention-2, arXiv:2307.08691; DeepSeek-V3 (arXiv:2412.19437), Eq. 10.
Book     book/04_mla.ipynb
"""

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from minids_kernels import cards, configs, mla_prefill_backward
from minids_kernels.cards import Card
from minids_kernels.latent import Causal, Step, Traffic, spans
from minids_kernels.softmax import (
    LOG2_E,
    Widths,
    by_head,
    described,
    empty,
    finish,
    grow,
    padded,
)
from minids_kernels.tiles import by_four_warps, ceil_div

_NAME = "attend_expanded"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MOST = 65535  # of a grid's second and third axis


class Tile(NamedTuple):
    """How scores are cut: a program's queries, and the keys that it takes at a time."""

    BLOCK_M: int
    BLOCK_N: int
    warps: int
    stages: int


CANDIDATES = (
    Tile(128, 128, warps=8, stages=2),
    Tile(128, 64, warps=8, stages=3),
    Tile(64, 64, warps=4, stages=2),
    Tile(32, 32, warps=8, stages=2),
    Tile(16, 16, warps=8, stages=2),
)
_OF_REGISTERS, _OF_FP32 = CANDIDATES[-2:], CANDIDATES[-1:]  # where no four warps multiply together
_SUMS = 128  # FP32 numbers of scores and results that a thread may hold


def rule_of_thumb(T: int, S: int, widths: Widths, itemsize: int, card: Card) -> Tile:
    """Return the largest tile that fits the card and is not mostly empty.

    Raises ValueError where even the smallest does not fit.
    """
    possible = _OF_FP32 if itemsize == 4 else CANDIDATES if by_four_warps(card) else _OF_REGISTERS
    for tile in possible:
        filled = tile.BLOCK_M <= max(64, padded(T)) and tile.BLOCK_N <= max(64, padded(S))
        if filled and fits(tile, widths, itemsize, card):
            return tile
    raise ValueError(
        f"{_NAME}: widths {widths} of {itemsize} bytes need more shared memory than the "
        f"{card.shared_bytes} bytes of {card.name}: choose impl='torch'"
    )


def fits(tile: Tile, widths: Widths, itemsize: int, card: Card) -> bool:
    """Say whether a tile fits shared memory, and what it sums up the registers."""
    N, R, V = map(padded, widths)
    held = tile.BLOCK_M * (N + R) + tile.stages * tile.BLOCK_N * (N + R + V)
    sums = tile.BLOCK_M * (tile.BLOCK_N + V) // (32 * tile.warps)
    return held * itemsize + 1024 <= card.shared_bytes and sums <= _SUMS


@triton.jit
def walk(
    sums, most, total, nope, rope, k_nope, k_rope, v, documents, mine, begin, stop,
    head, row, at, end, c,
    BLOCK_N: tl.constexpr, N: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Add the tiles of keys from `begin` to `stop` to the sums of queries at the places `at`.

    MASKED: some keys lie behind a query, or at `end` or behind it.
    """
    for n in tl.range(begin, stop, BLOCK_N):
        keys = n + tl.arange(0, BLOCK_N)
        k = k_nope.load([row, head, n, 0]).reshape(BLOCK_N, N)
        score = tl.dot(nope, k.T, input_precision="ieee")
        k = k_rope.load([row, n, 0]).reshape(BLOCK_N, R)
        score = tl.dot(rope, k.T, score, input_precision="ieee")
        if MASKED:
            seen = (keys < end)[None, :]
            if CAUSAL:
                seen = seen & (keys[None, :] <= at[:, None])
            score = tl.where(seen, score, -float("inf"))
        if DOCUMENTS:
            theirs = documents.load([row, n]).reshape(BLOCK_N)
            score = tl.where(theirs[None, :] == mine[:, None], score, -float("inf"))
        SEES: tl.constexpr = not (MASKED or DOCUMENTS)
        weight, factor, most, total = grow(score, most, total, c, SEES)
        values = v.load([row, head, n, 0]).reshape(BLOCK_N, V)
        if MASKED:  # a weight of 0 would not hide NaN
            values = tl.where((keys < end)[:, None], values, 0.0)
        weight = weight.to(values.dtype)
        sums = tl.dot(weight, values, sums * factor[:, None], input_precision="ieee")
    return sums, most, total


@triton.jit(do_not_specialize=["T", "S"])
def prefill(
    q_nope, q_rope, k_nope, k_rope, v, o, lse, start, of_queries, of_keys, c, T, S,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    N: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
    CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head, row = tl.program_id(1), tl.program_id(2)
    queries = m + tl.arange(0, BLOCK_M)
    begin, full, end = 0, S, S  # keys from `full` on are not seen by all, from `end` on by nobody
    at, mine = queries, queries
    if CAUSAL:
        where = tl.load(start + row)
        where = tl.maximum(tl.minimum(where, S), -T).to(tl.int32)  # the same, and no overflow
        at = where + queries
        full = tl.maximum(tl.minimum(where + m + 1, S), 0)
        end = tl.maximum(tl.minimum(where + tl.minimum(m + BLOCK_M, T), S), 0)
    if DOCUMENTS:
        mine = tl.where(queries < T, of_queries.load([row, m]).reshape(BLOCK_M), S)
        begin = tl.min(mine, 0) // BLOCK_N * BLOCK_N
    full = tl.maximum(full // BLOCK_N * BLOCK_N, begin)

    nope = q_nope.load([row, head, m, 0]).reshape(BLOCK_M, N)
    rope = q_rope.load([row, head, m, 0]).reshape(BLOCK_M, R)
    sums = tl.zeros((BLOCK_M, V), tl.float32)
    most = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums, most, total = walk(
        sums, most, total, nope, rope, k_nope, k_rope, v, of_keys, mine, begin, full,
        head, row, at, end, c, BLOCK_N, N, R, V, False, CAUSAL, DOCUMENTS,
    )  # fmt: skip
    sums, most, total = walk(
        sums, most, total, nope, rope, k_nope, k_rope, v, of_keys, mine, full, end,
        head, row, at, end, c, BLOCK_N, N, R, V, True, CAUSAL, DOCUMENTS,
    )  # fmt: skip

    divisor, of_row = finish(most, total)
    lse += (row.to(tl.int64) * tl.num_programs(1) + head) * T
    tl.store(lse + queries, of_row, mask=queries < T)
    result = (sums * (1 / divisor)[:, None]).to(o.dtype)
    o.store([row, head, m, 0], result.reshape(1, 1, BLOCK_M, V))


def forward(
    q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor, v: Tensor,
    mask: Causal | None, scale: float, card: Card,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the output and its log-sum-exp [B, H, T]; 0 and -inf where a query sees no key."""
    (B, T, H, N), (S, R, V) = q_nope.shape, (*k_rope.shape[1:], v.shape[-1])
    o = empty((B, T, H, V), v)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=v.device)
    if 0 in lse.shape:
        return o, lse
    tile = chosen(T, S, (N, R, V), v.itemsize, card)
    wide = tuple(map(padded, (N, R, V)))
    of_queries, of_keys = tile.BLOCK_M, tile.BLOCK_N
    first = None  # of each token's document: its number, as good as any, and where keys begin
    if mask is not None and mask.documents is not None:
        first = described(spans(mask.documents)[0])
    with torch.cuda.device_of(v):  # Triton launches on the current GPU
        prefill[(ceil_div(T, of_queries), H, B)](
            by_head(q_nope, of_queries), by_head(q_rope, of_queries), by_head(k_nope, of_keys),
            TensorDescriptor.from_tensor(described(k_rope), [1, of_keys, wide[1]]),
            by_head(v, of_keys), by_head(o, of_queries), lse,
            None if mask is None else mask.start,
            None if first is None else TensorDescriptor.from_tensor(first, [1, of_queries]),
            None if first is None else TensorDescriptor.from_tensor(first, [1, of_keys]),
            scale * LOG2_E, T, S, of_queries, of_keys, *wide, mask is not None, first is not None,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return o, lse


def chosen(T: int, S: int, widths: Widths, itemsize: int, card: Card) -> Tile:
    """Return the tile that a launch uses: the tuned one, else the rule of thumb's."""
    tuned = configs.find("mla_prefill.Tile", (T, *widths, itemsize), card)
    return Tile(**tuned) if tuned else rule_of_thumb(T, S, widths, itemsize, card)


class _Attend(torch.autograd.Function):
    """Keep what the backward kernels read: the inputs, the output and its log-sum-exp."""

    @staticmethod
    def forward(ctx, q_nope, q_rope, k_nope, k_rope, v, start, documents, scale, card):
        inputs = q_nope, q_rope, k_nope, k_rope, v
        mask = None if start is None else Causal(start, documents)
        o, lse = forward(*inputs, mask, scale, card)
        ctx.save_for_backward(*inputs, o, lse, start, documents)
        ctx.scale = scale
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        *kept, start, documents = ctx.saved_tensors
        mask = None if start is None else Causal(start, documents)
        found = mla_prefill_backward.gradients(do, *kept, mask=mask, scale=ctx.scale)
        return (*found, None, None, None, None)


def attend_expanded(
    q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor, v: Tensor,
    mask: Causal | None, scale: float,
) -> Tensor:  # fmt: skip
    """Return softmax(scale (q_nope k_nope^T + q_rope k_rope^T)) v, differentiable; None sees all.

    All is computed in one of DTYPES: autocast's, else the one that the operands have in common;
    FP32 is exact and slow. Query t of row b sees keys up to start_b + t; slots behind the last that
    a row sees may hold anything, NaN too. A query that sees none gets 0. Operands whose rows do not
    lie in steps of 16 bytes are copied first. Raises ValueError for shapes that do not fit.
    """
    inputs = q_nope, q_rope, k_nope, k_rope, v
    if isinstance(mask, Tensor):
        raise ValueError(
            f"{_NAME}: mask must be Causal or None, got a tensor {tuple(mask.shape)}: kernels "
            "store no mask; say where queries stand, or choose impl='torch'"
        )
    start, documents = (None, None) if mask is None else mask
    card = cards.card(_NAME, *inputs, *(x for x in (start, documents) if x is not None))
    _check(inputs, start, documents, scale)
    dtype = _common(inputs)
    if start is not None:
        start = start.contiguous()  # one number for all rows is often spread
    return _Attend.apply(*(x.to(dtype) for x in inputs), start, documents, scale, card)


def _common(inputs: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype to compute in: autocast's where it is on, as for a product in torch."""
    if torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return reduce(torch.promote_types, (x.dtype for x in inputs))


def _check(
    inputs: Sequence[Tensor], start: Tensor | None, documents: Tensor | None, scale: float
) -> None:
    names = ("q_nope", "q_rope", "k_nope", "k_rope", "v")
    for name, x, rank in zip(names, inputs, (4, 4, 4, 3, 4), strict=True):
        if x.dim() != rank or x.shape[-1] == 0 or x.dtype not in DTYPES:
            raise ValueError(
                f"{_NAME}: {name} must have {rank} axes, a width and a dtype of {DTYPES}, got "
                f"{tuple(x.shape)} in {x.dtype}: reshape or cast it"
            )
    (B, T, H, N), (_, S, _, V), R = inputs[0].shape, inputs[4].shape, inputs[1].shape[-1]
    shapes = ((B, T, H, N), (B, T, H, R), (B, S, H, N), (B, S, R), (B, S, H, V))
    for name, x, shape in zip(names, inputs, shapes, strict=True):
        if tuple(x.shape) != shape:
            got = tuple(x.shape)
            raise ValueError(f"{_NAME}: {name} must be {shape} beside the others, got {got}")
    if S == 0 or max(B, H) > _MOST:
        raise ValueError(
            f"{_NAME}: there must be a key, and at most {_MOST} rows and heads, got "
            f"S = {S}, B = {B}, H = {H}: split the batch"
        )
    for name, x, shape in (("start", start, (B,)), ("documents", documents, (B, S))):
        if x is not None and (tuple(x.shape) != shape or x.dtype not in (torch.int32, torch.int64)):
            raise ValueError(
                f"{_NAME}: {name} must be {shape} in int32 or int64, got {tuple(x.shape)} in "
                f"{x.dtype}: cast it"
            )
    if documents is not None and T != S:
        raise ValueError(f"{_NAME}: documents need as many queries as keys, got {T} and {S}")
    if not 0 < scale < float("inf"):
        raise ValueError(f"{_NAME}: scale must be positive and finite, got {scale}")


# What a launch does, for figures


def schedule(
    starts: Sequence[int | None], T: int, S: int, heads: int, widths: Widths, itemsize: int,
    card: Card, documents: Sequence[Sequence[int]] | None = None,
) -> list[Step]:  # fmt: skip
    """Return the tiles that the programs multiply, in their order; a row's start may be None."""
    tile = chosen(T, S, widths, itemsize, card)
    steps = []
    for program, (begin, end) in _walks(starts, T, S, heads, tile, documents):
        _, head, row = program
        start = starts[row]
        queries = _queries(program[0], T, tile)
        for n in range(begin, end, tile.BLOCK_N):
            keys = n, min(n + tile.BLOCK_N, S)
            masked = start is not None and start + queries[0] < keys[1] - 1
            if documents is not None:
                own = documents[row]
                masked |= len({*own[slice(*queries)], *own[slice(*keys)]}) > 1
            steps.append(Step(program, row, (head, head + 1), queries, keys, masked))
    return steps


def traffic(
    starts: Sequence[int | None], T: int, S: int, heads: int, widths: Widths, itemsize: int,
    card: Card, documents: Sequence[Sequence[int]] | None = None,
) -> Traffic:  # fmt: skip
    """Return the bytes that a launch moves: queries, keys, values, results and log-sum-exp."""
    tile = chosen(T, S, widths, itemsize, card)
    N, R, V = widths
    loaded = 0
    for program, (begin, end) in _walks(starts, T, S, heads, tile, documents):
        first, last = _queries(program[0], T, tile)
        read = min(ceil_div(end, tile.BLOCK_N) * tile.BLOCK_N, S) - begin if end > begin else 0
        loaded += (last - first) * (N + R) + read * (N + R + V)
    seen = sum(S if start is None else min(max(start + T, 0), S) for start in starts)
    queries = len(starts) * T * heads
    stored_bytes = queries * (V * itemsize + 4)
    least = queries * (N + R) + seen * (heads * (N + V) + R)
    return Traffic(loaded * itemsize, stored_bytes, least * itemsize + stored_bytes)


def _walks(
    starts: Sequence[int | None], T: int, S: int, heads: int, tile: Tile,
    documents: Sequence[Sequence[int]] | None,
) -> Iterator[tuple[tuple[int, int, int], tuple[int, int]]]:  # fmt: skip
    """Yield the programs in the order of their start, and from where to where their keys go."""
    for row, start in enumerate(starts):
        for head in range(heads):
            for place in range(ceil_div(T, tile.BLOCK_M)):
                first, last = _queries(place, T, tile)
                end = S if start is None else min(max(start + last, 0), S)
                begin = 0
                if documents is not None:
                    own = documents[row]
                    begin = min(map(own.index, own[first:last])) // tile.BLOCK_N * tile.BLOCK_N
                yield (place, head, row), (begin, end)


def _queries(place: int, T: int, tile: Tile) -> tuple[int, int]:
    """Return the first query of a program, and the one behind its last."""
    m = (ceil_div(T, tile.BLOCK_M) - 1 - place) * tile.BLOCK_M
    return m, min(m + tile.BLOCK_M, T)
