"""Gradients of expanded latent attention: weights are computed again, tile by tile, never stored.

    p = exp(scale q k^T - lse)      delta = rowsum(do o)      ds = p (do v^T - delta)
    dv = p^T do      dk = scale ds^T q      dq = scale ds k

with the log-sum-exp that the forward pass kept. Two walks over the same tiles: a program of
`keys_walk` owns keys and meets the queries that see them, one of `queries_walk` owns queries and
meets the keys that they see. That computes ds twice; in return every sum is made by one program in
one order: no atomics, the same bits in every run, whatever rows lie beside it in the batch.

All heads share the rotary key: each writes its part of that gradient in FP32, 4 B S H R bytes (128
MiB for 4096 tokens of V3), and mla_sums.py adds them in order.

Letters  T queries, S keys, H heads, N, R and V widths, which descriptors pad to powers of two.
Memory   as in mla_prefill.py; delta, like lse, FP32 [B, H, T].
Grid     (tiles of keys or queries, H, B), the longest walks first.
Paper    FlashAttention-2, arXiv:2307.08691, Algorithm 2.    Book  book/04_mla.ipynb
"""

from collections.abc import Sequence
from itertools import product as pairs
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from minids_kernels import cards, configs
from minids_kernels.cards import Card
from minids_kernels.latent import Causal, Step, Traffic, spans
from minids_kernels.mla_sums import add_heads, row_products
from minids_kernels.softmax import LOG2_E, Widths, by_head, empty, padded
from minids_kernels.tiles import by_four_warps, ceil_div

_NAME = "attend_expanded's backward"
_LOG2_E = tl.constexpr(LOG2_E)


class Keys(NamedTuple):
    """How `keys_walk` cuts: a program owns BLOCK_S keys and meets BLOCK_T queries at a time."""

    BLOCK_T: int
    BLOCK_S: int
    warps: int
    stages: int


class Queries(NamedTuple):
    """How `queries_walk` cuts: a program owns BLOCK_T queries and meets BLOCK_S keys at a time."""

    BLOCK_T: int
    BLOCK_S: int
    warps: int
    stages: int


Cut = Keys | Queries
CANDIDATES = (
    Keys(64, 64, warps=8, stages=2),
    Keys(32, 64, warps=8, stages=2),
    Keys(16, 32, warps=8, stages=2),
    Keys(16, 16, warps=8, stages=1),
    Queries(128, 64, warps=8, stages=2),
    Queries(64, 64, warps=8, stages=2),
    Queries(32, 16, warps=8, stages=2),
    Queries(16, 16, warps=8, stages=1),
)
# most rows of a tile, and those where each warp or, in FP32, each thread multiplies on its own
_LARGEST, _OF_WARPS, _OF_THREADS = 128, 32, 16
_SUMS = 160  # FP32 numbers of results and weights that a thread may hold


def rule_of_thumb(kind: type[Cut], widths: Widths, itemsize: int, card: Card) -> Cut:
    """Return the first candidate that fits the card; it depends on no length and no batch.

    Raises ValueError where even the smallest does not fit.
    """
    most = _LARGEST if by_four_warps(card) else _OF_WARPS
    if itemsize == 4 or card.capability[0] > 11:  # there larger ones spill registers
        most = _OF_THREADS
    for cut in CANDIDATES:
        if type(cut) is kind and max(cut[:2]) <= most and fits(cut, widths, itemsize, card):
            return cut
    raise ValueError(
        f"{_NAME}: widths {widths} of {itemsize} bytes need more shared memory than the "
        f"{card.shared_bytes} bytes of {card.name}: choose impl='torch'"
    )


def fits(cut: Cut, widths: Widths, itemsize: int, card: Card) -> bool:
    """Say whether a cut fits shared memory and, if it has a choice, the registers."""
    N, R, V = map(padded, widths)
    of_keys = isinstance(cut, Keys)
    own, met = (cut[1], cut[0]) if of_keys else cut[:2]
    held = (own + cut.stages * met) * (N + R + V) * itemsize
    sums = own * (N + R + V * of_keys + 2 * met) // (32 * cut.warps)
    return held + 4096 <= card.shared_bytes and (sums <= _SUMS or own <= 32)


def chosen(kind: type[Cut], T: int, widths: Widths, itemsize: int, card: Card) -> Cut:
    """Return how a launch cuts: tuned, else by the rule of thumb."""
    tuned = configs.find(f"mla_prefill_backward.{kind.__name__}", (T, *widths, itemsize), card)
    return kind(**tuned) if tuned else rule_of_thumb(kind, widths, itemsize, card)


@triton.jit
def rows_at(
    descs, b, h, rope_h, first,
    BLOCK: tl.constexpr, N: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Return BLOCK rows from `first` on of one head, 0 behind the last: nope, rope and value."""
    nope = descs[0].load([b, h, first, 0]).reshape(BLOCK, N)
    rope = descs[1].load([b, rope_h, first, 0]).reshape(BLOCK, R)
    return nope, rope, descs[2].load([b, h, first, 0]).reshape(BLOCK, V)


@triton.jit
def start_of(start, b, T, S):
    return tl.maximum(tl.minimum(tl.load(start + b), S), -T).to(tl.int32)  # sees the same


@triton.jit
def put(desc, x, b, h, first):
    """Store rows from `first` on of one head, in the described dtype."""
    desc.store([b, h, first, 0], x.to(desc.dtype).reshape(1, 1, x.shape[0], x.shape[1]))


@triton.jit
def product(x, y, sums):
    return tl.dot(x, y, sums, input_precision="ieee")


@triton.jit
def weights(
    own, met, lse, delta, t_at, s_at, mine, theirs, at, S, fold,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Return p and ds, a row for each own one; what is told of queries and keys is a row or column.

    MASKED: some query does not see some key. There both are 0, even beside NaN.
    """
    score = product(own[1], met[1].T, product(own[0], met[0].T, None))
    p = tl.exp2(score * fold - lse * _LOG2_E)
    sees = s_at < S
    if MASKED:
        if CAUSAL:
            sees &= s_at <= at + t_at
        if DOCUMENTS:
            sees &= mine == theirs
        p = tl.where(sees, p, 0.0)
    ds = p * (product(own[2], met[2].T, None) - delta)
    if MASKED:
        ds = tl.where(sees, ds, 0.0)
    return p, ds


@triton.jit
def meet_queries(
    sums, begin, end, keys, queries, s_at, theirs, b, h, lse, delta, first, at, T, S, fold,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr,
    BLOCK: tl.constexpr, N: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Add what the queries of some tiles give to dk_nope, dk_rope and dv."""
    dk_nope, dk_rope, dv = sums
    for tile in range(begin, end):
        t_at = tile * BLOCK + tl.arange(0, BLOCK)
        met = rows_at(queries, b, h, h, tile * BLOCK, BLOCK, N, R, V)
        row_lse = tl.load(lse + t_at, mask=t_at < T, other=float("inf"))  # weight 0
        row_delta = tl.load(delta + t_at, mask=t_at < T, other=0)
        mine = t_at
        if DOCUMENTS:
            mine = tl.load(first + t_at, mask=t_at < T, other=-1)
        t_at = tl.minimum(t_at, T - 1)  # behind the last one, nobody sees a leftover's NaN
        p, ds = weights(
            keys, met, row_lse[None, :], row_delta[None, :], t_at[None, :], s_at[:, None],
            mine[None, :], theirs[:, None], at, S, fold, MASKED, CAUSAL, DOCUMENTS,
        )  # fmt: skip
        dv = product(p.to(met[2].dtype), met[2], dv)
        ds = ds.to(met[0].dtype)
        dk_nope, dk_rope = product(ds, met[0], dk_nope), product(ds, met[1], dk_rope)
    return dk_nope, dk_rope, dv


@triton.jit(do_not_specialize=["T", "S"])
def keys_walk(
    q_nope, q_rope, k_nope, k_rope, v, do, dk_nope, dk_rope, dv,
    lse, delta, start, first, last, T, S, scale, fold,
    CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, N: tl.constexpr, R: tl.constexpr, V: tl.constexpr
):  # fmt: skip
    """Write the gradients of BLOCK_S keys and values of one head."""
    s, h, b = tl.program_id(0) * BLOCK_S, tl.program_id(1), tl.program_id(2)
    s_at = s + tl.arange(0, BLOCK_S)
    row = (b.to(tl.int64) * tl.num_programs(1) + h) * T
    begin, whole, end = 0, 0, tl.cdiv(T, BLOCK_T)  # tiles; from `whole` on all see all
    at, theirs = 0, s_at
    if CAUSAL:
        at = start_of(start, b, T, S)
        begin = tl.maximum(s - at, 0) // BLOCK_T
        whole = tl.minimum(tl.cdiv(tl.maximum(s + BLOCK_S - 1 - at, 0), BLOCK_T), end)
    if DOCUMENTS:
        first += b.to(tl.int64) * S
        theirs = tl.load(first + s_at, mask=s_at < S, other=-1)
        lasts = tl.load(last + b.to(tl.int64) * S + s_at, mask=s_at < S, other=-1)
        end = tl.max(lasts) // BLOCK_T + 1
        whole = end
    keys = rows_at((k_nope, k_rope, v), b, h, 0, s, BLOCK_S, N, R, V)
    sums = tl.zeros((BLOCK_S, N), tl.float32), tl.zeros((BLOCK_S, R), tl.float32)
    sums += (tl.zeros((BLOCK_S, V), tl.float32),)
    queries = q_nope, q_rope, do
    if CAUSAL:
        sums = meet_queries(
            sums, begin, whole, keys, queries, s_at, theirs, b, h, lse + row, delta + row, first,
            at, T, S, fold, True, CAUSAL, DOCUMENTS, BLOCK_T, N, R, V,
        )  # fmt: skip
    if not DOCUMENTS:
        sums = meet_queries(
            sums, whole, end, keys, queries, s_at, theirs, b, h, lse + row, delta + row, first,
            at, T, S, fold, False, CAUSAL, DOCUMENTS, BLOCK_T, N, R, V,
        )  # fmt: skip
    put(dk_nope, sums[0] * scale, b, h, s)
    put(dk_rope, sums[1] * scale, b, h, s)
    put(dv, sums[2], b, h, s)


@triton.jit
def meet_keys(
    sums, begin, end, queries, keys, t_at, mine, b, h, lse, delta, first, at, T, S, fold,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr,
    BLOCK: tl.constexpr, N: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Add what the keys of some tiles give to dq_nope and dq_rope."""
    dq_nope, dq_rope = sums
    for tile in range(begin, end):
        s_at = tile * BLOCK + tl.arange(0, BLOCK)
        met = rows_at(keys, b, h, 0, tile * BLOCK, BLOCK, N, R, V)
        theirs = s_at
        if DOCUMENTS:
            theirs = tl.load(first + s_at, mask=s_at < S, other=-1)
        _, ds = weights(
            queries, met, lse[:, None], delta[:, None], t_at[:, None], s_at[None, :],
            mine[:, None], theirs[None, :], at, S, fold, MASKED, CAUSAL, DOCUMENTS,
        )  # fmt: skip
        nope, rope = met[0], met[1]
        if MASKED and CAUSAL and not DOCUMENTS:  # leftovers of a cache may be NaN, and 0 NaN too
            held = (s_at < at + T)[:, None]
            nope, rope = tl.where(held, nope, 0.0), tl.where(held, rope, 0.0)
        ds = ds.to(nope.dtype)
        dq_nope, dq_rope = product(ds, nope, dq_nope), product(ds, rope, dq_rope)
    return dq_nope, dq_rope


@triton.jit(do_not_specialize=["T", "S"])
def queries_walk(
    q_nope, q_rope, k_nope, k_rope, v, do, dq_nope, dq_rope,
    lse, delta, start, first, last, T, S, scale, fold,
    CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, N: tl.constexpr, R: tl.constexpr, V: tl.constexpr
):  # fmt: skip
    """Write the gradients of BLOCK_T queries of one head."""
    t = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_T  # the last ones see the most
    h, b = tl.program_id(1), tl.program_id(2)
    t_at = t + tl.arange(0, BLOCK_T)
    row = (b.to(tl.int64) * tl.num_programs(1) + h) * T
    row_lse = tl.load(lse + row + t_at, mask=t_at < T, other=float("inf"))
    row_delta = tl.load(delta + row + t_at, mask=t_at < T, other=0)
    begin, whole, end = 0, S // BLOCK_S, tl.cdiv(S, BLOCK_S)  # tiles; up to `whole` all see all
    at, mine = 0, t_at
    if CAUSAL:
        at = start_of(start, b, T, S)
        whole = tl.minimum(tl.maximum(at + t + 1, 0), S) // BLOCK_S
        end = tl.cdiv(tl.minimum(tl.maximum(at + tl.minimum(t + BLOCK_T, T), 0), S), BLOCK_S)
    if DOCUMENTS:
        first += b.to(tl.int64) * S
        mine = tl.load(first + t_at, mask=t_at < T, other=S)
        begin = tl.min(mine) // BLOCK_S
        whole = begin
    queries = rows_at((q_nope, q_rope, do), b, h, h, t, BLOCK_T, N, R, V)
    sums = (tl.zeros((BLOCK_T, N), tl.float32), tl.zeros((BLOCK_T, R), tl.float32))
    keys = k_nope, k_rope, v
    if not DOCUMENTS:
        sums = meet_keys(
            sums, begin, whole, queries, keys, t_at, mine, b, h, row_lse, row_delta, first,
            at, T, S, fold, False, CAUSAL, DOCUMENTS, BLOCK_S, N, R, V,
        )  # fmt: skip
    sums = meet_keys(
        sums, whole, end, queries, keys, t_at, mine, b, h, row_lse, row_delta, first,
        at, T, S, fold, True, CAUSAL, DOCUMENTS, BLOCK_S, N, R, V,
    )  # fmt: skip
    put(dq_nope, sums[0] * scale, b, h, t)
    put(dq_rope, sums[1] * scale, b, h, t)


def gradients(
    do: Tensor, q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor, v: Tensor,
    o: Tensor, lse: Tensor, mask: Causal | None, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the gradients of q_nope, q_rope, k_nope, k_rope and v, in their common dtype.

    `do` is the gradient of the output `o`; the forward pass has checked the inputs, and gave `o`
    and `lse` [B, H, T]. Keys that no query sees, and queries that see none, get 0, whatever they
    hold. Raises ValueError for `do`, `o` or `lse` that do not fit, and for too large widths.
    """
    inputs = q_nope, q_rope, k_nope, k_rope, v
    card = cards.card(_NAME, do, *inputs, o, lse, *(x for x in mask or () if x is not None))
    _check(do, v, o, lse)
    (B, T, H, N), (S, R), V = q_nope.shape, k_rope.shape[1:], v.shape[-1]
    found = tuple(empty(tuple(x.shape), x) for x in inputs)
    if 0 in lse.shape:
        return tuple(x.zero_() for x in found)
    dq_nope, dq_rope, dk_nope, dk_rope, dv = found
    parts = empty((B, S, H, R), lse)
    start, documents = (None, None) if mask is None else (mask.start.contiguous(), mask.documents)
    first, last = (None, None) if documents is None else spans(documents)
    told = lse.contiguous(), row_products(do, o), start, first, last, T, S, scale, scale * LOG2_E
    walks = (
        (Keys, keys_walk, S, (dk_nope, parts, dv)),
        (Queries, queries_walk, T, (dq_nope, dq_rope)),
    )
    for kind, kernel, length, written in walks:
        cut = chosen(kind, T, (N, R, V), v.itemsize, card)
        t, s, rows = cut.BLOCK_T, cut.BLOCK_S, cut[kind is Keys]
        with torch.cuda.device_of(v):  # Triton launches on the current GPU
            kernel[(ceil_div(length, rows), H, B)](
                by_head(q_nope, t), by_head(q_rope, t), by_head(k_nope, s),
                by_head(k_rope[:, :, None], s), by_head(v, s), by_head(do, t),
                *(by_head(x, rows) for x in written), *told,
                start is not None, documents is not None, t, s, *map(padded, (N, R, V)),
                num_warps=cut.warps, num_stages=cut.stages,
            )  # fmt: skip
    add_heads(parts, dk_rope)
    return found


def _check(do: Tensor, v: Tensor, o: Tensor, lse: Tensor) -> None:
    (B, T, H, _), V = o.shape, v.shape[-1]
    wanted = (
        (do, (B, T, H, V), v.dtype),
        (o, (B, T, H, V), v.dtype),
        (lse, (B, H, T), torch.float32),
    )
    for name, (x, shape, dtype) in zip(("do", "o", "lse"), wanted, strict=True):
        if tuple(x.shape) != shape or x.dtype != dtype:
            got = f"{tuple(x.shape)} in {x.dtype}: pass what the forward pass gave"
            raise ValueError(f"{_NAME}: {name} must be {shape} in {dtype}, got {got}")


# What a launch does, for figures


def schedule(
    kind: type[Cut], starts: Sequence[int | None], T: int, S: int, heads: int, widths: Widths,
    itemsize: int, card: Card, documents: Sequence[Sequence[int]] | None = None,
) -> list[Step]:  # fmt: skip
    """Return the tiles that the programs of a walk multiply, in order; a start may be None."""
    cut = chosen(kind, T, widths, itemsize, card)
    of_keys = kind is Keys
    own, met, n, others = (cut[1], cut[0], S, T) if of_keys else (cut[0], cut[1], T, S)
    tiles, steps = ceil_div(n, own), []
    for row, head, place in pairs(range(len(starts)), range(heads), range(tiles)):
        first = (place if of_keys else tiles - 1 - place) * own
        mine = first, min(first + own, n)
        at, ids = starts[row], documents and documents[row]
        begin, end = 0, others
        if at is not None and of_keys:
            begin = max(first - at, 0)
        elif at is not None:
            end = min(max(at + mine[1], 0), S)
        if ids and of_keys:
            end = max(T - ids[::-1].index(x) for x in ids[slice(*mine)])
        elif ids:
            begin = min(ids.index(x) for x in ids[slice(*mine)])
        for x in range(begin // met * met, end, met):
            theirs = x, min(x + met, others)
            queries, keys = (theirs, mine) if of_keys else (mine, theirs)
            masked = at is not None and at + queries[0] < keys[1] - 1
            if ids:
                masked |= len({*ids[slice(*queries)], *ids[slice(*keys)]}) > 1
            steps.append(Step((place, head, row), row, (head, head + 1), queries, keys, masked))
    return steps


def traffic(
    starts: Sequence[int | None], T: int, S: int, heads: int, widths: Widths, itemsize: int,
    card: Card, documents: Sequence[Sequence[int]] | None = None,
) -> Traffic:  # fmt: skip
    """Return the bytes that a call moves, its four launches together."""
    (N, R, V), B = widths, len(starts)
    queries, keys, shared = B * T * heads, B * S * heads, B * S * R * itemsize
    row, told = (N + R + V) * itemsize, 8  # of a query: its log-sum-exp and delta
    loaded = (2 * V * itemsize + row + told) * queries + (row + 4 * R) * keys  # then what is met
    for step in schedule(Keys, starts, T, S, heads, widths, itemsize, card, documents):
        loaded += (step.queries[1] - step.queries[0]) * (row + told)
    for step in schedule(Queries, starts, T, S, heads, widths, itemsize, card, documents):
        loaded += (step.keys[1] - step.keys[0]) * row
    of_queries, of_keys = (N + R) * itemsize * queries, (N + V) * itemsize * keys
    stored = of_queries + of_keys + shared + 4 * queries + 4 * R * keys
    least = 2 * (of_queries + of_keys + shared) + (2 * V * itemsize + 4) * queries
    return Traffic(loaded, stored, least)
