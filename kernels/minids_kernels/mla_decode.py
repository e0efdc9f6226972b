"""Attention of a few new tokens to latents in pages: keys and values of all heads at once.

    z[t, h] = sum over s of softmax_s(scale (q_latent[t, h] c[s] + q_rope[t, h] k_rope[s])) c[s]

A slot of the cache is [c, k_rope]. A program holds a tile of rows, all (query, head) pairs of one
row of the batch being alike, and walks over the slots: each tile of them is read once, and serves
as keys, then as values. Softmax is in FP32 (softmax.py); sums of more than 256 columns are made in
parts, each a product of its own, of which the threads of all warps have a share.

The last tile of a walk ends with the last slot that is seen: it starts early, before its page if
need be, where a load finds zeros. So what lies behind a row's end, NaN perhaps, is never read, no
value needs to be cleared, and all tiles are one loop. What starts early is masked, as are slots of
which the later ones of several new tokens see more than the earlier ones.

One token's rows are too few to keep a card busy: walks are cut into runs, whose results a second
kernel adds in order, weighed by log-sum-exp: no atomics, the same bits in every call. How many runs
depends on shapes alone, on B and the width of the page table, not on lengths, which the host does
not know. So a row's last bits depend on how many rows there are, not on what others hold.

Letters  T queries, H heads, C and R widths, as in minids.mla; BLOCK_M rows, BLOCK_N slots a tile.
Memory   store [pages, page, C + R], table [B, n], lengths [B], q [B, T, H, C | R]: any strides;
         results of runs FP32 [runs, B, T H, C], their log-sum-exp [runs, B, T H].
Grid     (tiles of rows, B, runs): neighbours read the same slots, which the L2 cache holds.
Paper    DeepSeek-V2 (arXiv:2405.04434), 2.1.2; Flash-Decoding; PagedAttention, arXiv:2309.06180.
Book     book/05_absorb.ipynb
"""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from minids_kernels import cards, configs
from minids_kernels.cards import Card
from minids_kernels.latent import Causal, Pages, Step, Traffic
from minids_kernels.softmax import LOG2_E, describable, finish, grow, padded
from minids_kernels.tiles import ceil_div

_NAME = "attend_latent"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PAGE = 64  # a page's slots are a multiple of this, and so of every tile
_PART = {2: 256, 4: 64}  # columns of the latent that one product makes, by bytes of a number
_LEAST_RUN, _FILL, _HAND_OVER = 2, 1, 2  # tiles, and what runs cost beside, the last if several
_MOST_ROUNDS = 4  # of programs, where there are several runs: their results take memory
_RUNS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_ROWS = 4  # whose runs one program adds up
_LOG2_E = tl.constexpr(LOG2_E)
Widths = tuple[int, int]  # C, R


class Tile(NamedTuple):
    """What a program multiplies at a time: rows of queries by slots of the cache."""

    BLOCK_M: int
    BLOCK_N: int
    programs: int  # on one multiprocessor
    warps: int
    stages: int


Cut = tuple[Tile, int, int]  # with the number of tiles of rows, and of runs

CANDIDATES = (
    Tile(64, 64, programs=1, warps=8, stages=2),
    Tile(64, 32, programs=1, warps=8, stages=3),
    Tile(32, 32, programs=1, warps=8, stages=3),
    Tile(32, 16, programs=1, warps=8, stages=3),
    Tile(16, 32, programs=2, warps=4, stages=3),
    Tile(16, 16, programs=2, warps=4, stages=3),
    Tile(16, 32, programs=1, warps=4, stages=3),
    Tile(16, 16, programs=1, warps=8, stages=2),
)
_OF_FP32 = CANDIDATES[-1]  # no tensor cores: each thread multiplies on its own, out of registers


def rule_of_thumb(rows: int, widths: Widths, itemsize: int, card: Card) -> Tile:
    """Return the largest tile that fits the card and is not mostly empty.

    Hopper multiplies 64 rows out of shared memory while the next slots arrive there: elsewhere that
    takes three stages. For (10, 0) Triton 3.6 makes an empty kernel of 64 rows.
    """
    most = 16 if rows <= 16 else 32 if card.capability[0] == 10 else 64
    listed = CANDIDATES if card.capability[0] == 9 else CANDIDATES[1:]
    for tile in (_OF_FP32,) if itemsize == 4 else listed:
        if tile.BLOCK_M <= most and fits(tile, widths, itemsize, card):
            return tile
    raise ValueError(
        f"{_NAME}: widths {widths} of {itemsize} bytes need more shared memory than the "
        f"{card.shared_bytes} bytes of {card.name}: choose impl='torch'"
    )


def fits(tile: Tile, widths: Widths, itemsize: int, card: Card) -> bool:
    """Say whether queries and the slots on their way fit shared memory."""
    pairs = zip(widths, blocks(widths, itemsize), strict=True)
    width = sum(ceil_div(n, block) * block for n, block in pairs)
    on_their_way = tile.stages - (tile.BLOCK_M < 64 or card.capability[0] != 9)
    held = (tile.BLOCK_M + on_their_way * tile.BLOCK_N) * width * itemsize
    return tile.programs * (held + 2048) <= card.shared_bytes


def blocks(widths: Widths, itemsize: int) -> tuple[int, int]:
    """Return how many columns of the latent, and of the rotary key, a product takes."""
    return min(padded(widths[0]), _PART[itemsize]), padded(widths[1])


@cache
def rule_of_runs(walks: int, n_tiles: int, tile: Tile, card: Card) -> int:
    """Return into how many runs to cut walks of so many tiles: by counting rounds of programs."""
    at_once = card.n_sm * tile.programs

    def time(runs: int) -> int:
        rounds = ceil_div(walks * runs, at_once)
        return rounds * (ceil_div(n_tiles, runs) + _FILL + _HAND_OVER * (runs > 1))

    most = min(n_tiles // _LEAST_RUN, _MOST_ROUNDS * at_once // walks)
    return min((1, *(runs for runs in _RUNS if runs <= most)), key=time)


def cut(B: int, rows: int, slots: int, widths: Widths, itemsize: int, card: Card) -> Cut:
    """Return how a launch is cut, by the tuned tile or the rule of thumb's."""
    tuned = configs.find("mla_decode.Tile", (rows, *widths, itemsize), card)
    tile = Tile(**tuned) if tuned else rule_of_thumb(rows, widths, itemsize, card)
    n = ceil_div(rows, tile.BLOCK_M)
    return tile, n, rule_of_runs(B * n, ceil_div(slots, tile.BLOCK_N), tile, card)


@triton.jit
def held_in(
    source, page, slot, column, steps,
    BLOCK_N: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Return BLOCK_N slots of a page from `slot` on; zeros before its first and past WIDTH."""
    if DESCRIBED:
        tile = source.load([page, slot, column]).reshape(BLOCK_N, BLOCK)
    else:
        slots = slot + tl.arange(0, BLOCK_N)
        cols = column + tl.arange(0, BLOCK)
        rows = source + page.to(tl.int64) * steps[0] + slots.to(tl.int64) * steps[1]
        pointers = rows[:, None] + (cols.to(tl.int64) * steps[2])[None, :]
        inside = (slots >= 0)[:, None] & (cols < WIDTH)[None, :]
        tile = tl.load(pointers, mask=inside, other=0.0)
    return tile


@triton.jit
def queries(
    source, b, rows, live, column, batch_step, query_step, head_step, step,
    H: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return columns of the queries of these rows, zeros for rows that are not live."""
    cols = column + tl.arange(0, BLOCK)
    source += b.to(tl.int64) * batch_step
    row = (rows // H).to(tl.int64) * query_step + (rows % H).to(tl.int64) * head_step
    pointers = source + row[:, None] + (cols.to(tl.int64) * step)[None, :]
    return tl.load(pointers, mask=live[:, None] & (cols < WIDTH)[None, :], other=0.0)


@triton.jit(do_not_specialize=["T"])
def walk(
    q_latent, q_rope, latent, rope, table, lengths, z, lse, c, T,
    ql_batch, ql_query, ql_head, ql_step, qr_batch, qr_query, qr_head, qr_step,
    page_step, slot_step, step, table_row, table_step, lengths_step,
    H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    b, run = tl.program_id(1), tl.program_id(2)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n_rows = T * H
    before = tl.load(lengths + b * lengths_step).to(tl.int32) - T + 1
    sees = before + rows // H  # slots, from the first on
    last = tl.minimum(tl.program_id(0) * BLOCK_M + BLOCK_M, n_rows) - 1
    end = before + last // H  # slots that are seen at all
    n_tiles = tl.cdiv(tl.maximum(end, 0), BLOCK_N)
    first = run * n_tiles // tl.num_programs(2)  # runs differ by one tile at most
    stop = (run + 1) * n_tiles // tl.num_programs(2)
    live = (rows < n_rows) & (first < stop)
    dtype: tl.constexpr = latent.dtype if DESCRIBED else latent.dtype.element_ty
    q, sums = (), ()
    for part in tl.static_range(PARTS):
        x = queries(
            q_latent, b, rows, live, part * BLOCK_C, ql_batch, ql_query, ql_head, ql_step,
            H, BLOCK_C, C,
        )  # fmt: skip
        q += (x.to(dtype),)
        sums += (tl.zeros((BLOCK_M, BLOCK_C), tl.float32),)
    x = queries(q_rope, b, rows, live, 0, qr_batch, qr_query, qr_head, qr_step, H, BLOCK_R, R)
    q_r = x.to(dtype)
    most = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    table += b.to(tl.int64) * table_row
    steps = (page_step, slot_step, step)
    page = tl.load(table + first * BLOCK_N // PAGE * table_step, mask=first < stop, other=0)
    page = page.to(tl.int32)  # as descriptors take it
    for n in range(first, stop):
        start = n * BLOCK_N
        # the next page's number is on its way while this tile is multiplied
        after = (start + BLOCK_N) // PAGE * table_step
        next_page = tl.load(table + after, mask=n + 1 < stop, other=0).to(tl.int32)
        at = tl.minimum(start, end - BLOCK_N)
        slot = at - start // PAGE * PAGE
        r = held_in(rope, page, slot, 0, steps, BLOCK_N, BLOCK_R, R, DESCRIBED)
        score = tl.dot(q_r, r.T, input_precision="ieee")
        held = ()
        for part in tl.static_range(PARTS):
            k = held_in(latent, page, slot, part * BLOCK_C, steps, BLOCK_N, BLOCK_C, C, DESCRIBED)
            score = tl.dot(q[part], k.T, score, input_precision="ieee")
            held += (k,)
        slots = at + tl.arange(0, BLOCK_N)
        slots = tl.where(slots < start, end, slots)  # nobody sees that one
        score = tl.where(slots[None, :] < sees[:, None], score, -float("inf"))
        weight, factor, most, total = grow(score, most, total, c, False)
        weight = weight.to(dtype)
        longer = ()
        for part in tl.static_range(PARTS):
            older = sums[part] * factor[:, None]
            longer += (tl.dot(weight, held[part], older, input_precision="ieee"),)
        sums = longer
        page = next_page
    divisor, of_row = finish(most, total)
    to = (run * tl.num_programs(1) + b).to(tl.int64) * n_rows + rows
    tl.store(lse + to, of_row, mask=rows < n_rows)
    filled = (rows < n_rows) & ((first < stop) | (tl.num_programs(2) == 1))
    for part in tl.static_range(PARTS):
        cols = part * BLOCK_C + tl.arange(0, BLOCK_C)
        mean = sums[part] * (1 / divisor)[:, None]
        inside = filled[:, None] & (cols < C)[None, :]
        tl.store(z + to[:, None] * C + cols[None, :], mean.to(z.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n_rows", "n_runs"])
def add_up(
    parts, lses, z, lse, n_rows, n_runs,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """Add the runs' results in order, weighed by their log-sum-exp; an empty run wrote none."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < n_rows
    runs, cols = tl.arange(0, RUNS).to(tl.int64), tl.arange(0, BLOCK_C)
    there = inside[:, None] & (runs < n_runs)[None, :]
    found = tl.load(lses + runs[None, :] * n_rows + rows[:, None], mask=there, other=-float("inf"))
    most = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    _, _, most, total = grow(found, most, tl.zeros_like(most), _LOG2_E, False)
    divisor, of_row = finish(most, total)
    sums = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for run in range(n_runs):
        at = run * n_rows.to(tl.int64) + rows
        one = tl.load(lses + at, mask=inside, other=-float("inf"))
        wrote = (one != -float("inf"))[:, None] & (cols < C)[None, :]
        part = tl.load(parts + at[:, None] * C + cols[None, :], mask=wrote, other=0.0)
        base = tl.where(most == -float("inf"), 0.0, most)
        sums += tl.exp2(one * _LOG2_E - base)[:, None] * part
    mean = sums * (1 / divisor)[:, None]
    tl.store(lse + rows, of_row, mask=inside)
    wanted = inside[:, None] & (cols < C)[None, :]
    tl.store(z + rows[:, None] * C + cols[None, :], mean.to(z.dtype.element_ty), mask=wanted)


def decode(q_latent: Tensor, q_rope: Tensor, held: Pages, scale: float) -> tuple[Tensor, Tensor]:
    """Return attend_latent's z, and its log-sum-exp [B, T, H] in FP32."""
    store, table, lengths = held
    card = cards.card(_NAME, q_latent, q_rope, store, table, lengths)
    (B, T, H, C), R, page = q_latent.shape, q_rope.shape[-1], store.shape[1]
    z = torch.empty((B, T, H, C), dtype=q_latent.dtype, device=store.device)
    lse = torch.empty((B, T, H), dtype=torch.float32, device=store.device)
    if 0 in (*lse.shape, *table.shape, len(store)):
        return z.zero_(), lse.fill_(-torch.inf)
    tile, row_tiles, runs = cut(B, T * H, table.shape[1] * page, (C, R), store.itemsize, card)
    found = z, lse
    if runs > 1:
        found = [torch.empty((runs, *x.shape), device=x.device, dtype=lse.dtype) for x in found]
    latent, rope = store[..., :C], store[..., C:]
    block_c, block_r = blocks((C, R), store.itemsize)
    # before Hopper a descriptor is a pointer a number; FP32 is multiplied out of registers anyway
    is_described = card.capability >= (9, 0) and store.itemsize == 2
    is_described &= describable(latent) and describable(rope)
    if is_described:
        latent = TensorDescriptor.from_tensor(latent, [1, tile.BLOCK_N, block_c])
        rope = TensorDescriptor.from_tensor(rope, [1, tile.BLOCK_N, block_r])
    with torch.cuda.device_of(store):  # Triton launches on the current GPU
        walk[(row_tiles, B, runs)](
            q_latent, q_rope, latent, rope, table, lengths, *found, scale * LOG2_E, T,
            *q_latent.stride(), *q_rope.stride(), *store.stride(), *table.stride(),
            *lengths.stride(), H, C, R, page, tile.BLOCK_M, tile.BLOCK_N, block_c, block_r,
            is_described, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if runs > 1:
            add_up[(ceil_div(B * T * H, _ROWS),)](
                *found, z, lse, B * T * H, runs, C, padded(C), _ROWS, triton.next_power_of_2(runs),
                num_warps=4,
            )  # fmt: skip
    return z, lse


def attend_latent(
    q_latent: Tensor, q_rope: Tensor, held: Pages, mask: Causal | None, scale: float
) -> Tensor:
    """Return softmax(scale (q_latent c^T + q_rope k_rope^T)) c over each row's pages; forward only.

    `mask` is not read: query t of a row's last T tokens sees the first length - T + t + 1 slots; 0
    if none. What lies behind a row's end may be anything. Computed in the pages' dtype, one of
    DTYPES (FP32 is exact and slow). Raises ValueError for what it does not fit.
    """
    _check(q_latent, q_rope, held, scale)
    return decode(q_latent, q_rope, held, scale)[0]


def _check(q_latent: Tensor, q_rope: Tensor, held: Pages, scale: float) -> None:
    if not isinstance(held, tuple):
        got = type(held).__name__
        raise ValueError(f"{_NAME}: held must be Pages, got {got}: give the cache a page_size")
    store, table, lengths = held
    for name, x, rank in (("q_latent", q_latent, 4), ("q_rope", q_rope, 4), ("store", store, 3)):
        if x.dim() != rank or x.shape[-1] == 0 or x.dtype not in DTYPES:
            raise ValueError(
                f"{_NAME}: {name} must have {rank} axes, a width and a dtype of {DTYPES}, got "
                f"{tuple(x.shape)} in {x.dtype}: reshape or cast it"
            )
    (B, T, H, C), (_, page, width), n = q_latent.shape, store.shape, table.shape[-1:].numel()
    if tuple(q_rope.shape) != (B, T, H, width - C):
        raise ValueError(
            f"{_NAME}: q_rope must be {(B, T, H, width - C)} beside q_latent {(B, T, H, C)} and "
            f"slots of {width} numbers, got {tuple(q_rope.shape)}"
        )
    if page == 0 or page % PAGE:
        raise ValueError(
            f"{_NAME}: a page must hold a multiple of {PAGE} tokens, got {page}: give the cache "
            f"page_size={PAGE}"
        )
    for name, x, shape in (("table", table, (B, n)), ("lengths", lengths, (B,))):
        if tuple(x.shape) != shape or x.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{_NAME}: {name} must be {shape} in int32 or int64, got {tuple(x.shape)} in "
                f"{x.dtype}: give one row for each of the batch"
            )
    if B > 65535:  # of a grid's second axis
        raise ValueError(f"{_NAME}: at most 65535 rows, got {B}: split the batch")
    if not 0 < scale < float("inf"):
        raise ValueError(f"{_NAME}: scale must be positive and finite, got {scale}")


# What a launch does, for figures


def schedule(
    lengths: Sequence[int], table_pages: int, T: int, heads: int, widths: Widths, itemsize: int,
    card: Card, page: int = PAGE,
) -> list[Step]:  # fmt: skip
    """Return what the programs multiply, in their order; of rows of several queries, all heads."""
    how = cut(len(lengths), T * heads, table_pages * page, widths, itemsize, card)
    steps = []
    for program, (first, last), (begin, stop) in _walks(lengths, T, heads, *how):
        asked = first // heads, last // heads + 1
        of = (first % heads, last % heads + 1) if asked[1] - asked[0] == 1 else (0, heads)
        least, most = (lengths[program[1]] - T + 1 + t for t in (asked[0], asked[1] - 1))
        for start in range(begin, stop, how[0].BLOCK_N):
            keys = start, min(start + how[0].BLOCK_N, most)
            steps.append(Step(program, program[1], of, asked, keys, least < keys[1]))
    return steps


def traffic(
    lengths: Sequence[int], table_pages: int, T: int, heads: int, widths: Widths,
    itemsize: int, card: Card, page: int = PAGE,
) -> Traffic:  # fmt: skip
    """Return the bytes that a launch moves, but for page numbers and lengths."""
    how = cut(len(lengths), T * heads, table_pages * page, widths, itemsize, card)
    size, of_slot = how[0].BLOCK_N, sum(widths) * itemsize
    n_rows, of_sums = len(lengths) * T * heads, 4 * widths[0] if how[2] > 1 else 0
    results = n_rows * (widths[0] * itemsize + 4)
    of_runs = 4 * n_rows * how[2] if how[2] > 1 else 0  # log-sum-exp, each read twice
    loaded, stored = 2 * of_runs, results + of_runs
    for program, (first, last), (begin, stop) in _walks(lengths, T, heads, *how):
        if begin < stop:
            sees = [lengths[program[1]] - T + 1 + n // heads for n in range(first, last + 1)]
            ends = (min(n + size, sees[-1]) for n in range(begin, stop, size))
            slots = sum(min(size, end - (end - 1) // page * page) for end in ends)
            loaded += (len(sees) + slots) * of_slot + sum(n > begin for n in sees) * of_sums
            stored += len(sees) * of_sums
    return Traffic(loaded, stored, (n_rows + sum(lengths)) * of_slot + results)


def _walks(
    lengths: Sequence[int], T: int, heads: int, tile: Tile, row_tiles: int, runs: int
) -> Iterator[tuple[tuple[int, int, int], tuple[int, int], tuple[int, int]]]:
    """Yield programs in their order, first and last row of each, and where its slots lie."""
    for run, (b, length), place in product(range(runs), enumerate(lengths), range(row_tiles)):
        first = place * tile.BLOCK_M
        last = min(first + tile.BLOCK_M, T * heads) - 1
        n_tiles = ceil_div(max(length - T + 1 + last // heads, 0), tile.BLOCK_N)
        begin, stop = (n * n_tiles // runs * tile.BLOCK_N for n in (run, run + 1))
        yield (place, b, run), (first, last), (begin, stop)
