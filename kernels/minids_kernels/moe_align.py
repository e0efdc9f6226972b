"""Sort visits by expert on the GPU: count each expert's, add the counts up, give out slots.

    slot(v) = start[e] + visits to e before v
    start[e] = sum over e' < e of load[e'], each rounded up to tiles of `size` slots

Integers alone: no atomics on memory and no order of programs enter, each run gives the same slots,
and nothing waits for the GPU to say how many there are (slots.py).

Letters  V visits (tokens x K) in stretches of 256, E experts, P slots.
Grid     up to 2,048 visits: one launch, each program counts all stretches itself. More: a first
         launch counts each stretch, a second adds the counts of those before it, expert by expert,
         a third gives out slots. That one's programs take a stretch of visits and 256 slots each.
Memory   counts [stretches, E] int32, replaced by what was counted before; loads [E] int32.
Paper    DeepSeek-V3 (arXiv:2412.19437), section 3.3.2: groups of 128 tokens in weight gradients.
Book     book/07_moe.ipynb
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minids_kernels import cards
from minids_kernels.cards import Card
from minids_kernels.slots import Slots, n_slots
from minids_kernels.tiles import by_four_warps, ceil_div

_NAME = "align"
_STRETCH = 256  # visits, and slots, of a program; a power of two
_PART = 32  # of a stretch, that all of it is compared with at a time
_IN_ONE_LAUNCH = 2048  # visits that each program counts by itself
_COLUMNS = 8  # experts whose counts a program of the second launch adds up
_MOST_EXPERTS = 512
SIZES = (16, 64, 128)


def size_for(tokens: int, k: int, experts: int, training: bool, card: Card) -> int:
    """Return how many slots a tile should have, from the mean number of visits to an expert.

    16 where reading weights is all the work and an expert's visits mostly fit into one such tile;
    64 while tiles of 128 would be half empty; 128 beyond, and in training, whose weight gradients
    sum over groups of 128 slots. Counted, not timed.
    """
    mean = tokens * k / experts
    if training:
        return 128
    if mean <= 8 and by_four_warps(card):
        return 16
    return 64 if mean < 256 else 128


def align(ids: Tensor, experts: int, size: int) -> Slots:
    """Give each visit a slot; a tile of `size` slots holds visits to one expert, in their order.

    `ids` [BT, K] lie in 0 .. experts - 1, which is not checked: that would wait for the GPU. Their
    strides may be any. Raises ValueError for counts and dtypes that the kernels cannot take.
    """
    cards.card(_NAME, ids)
    _check(ids, experts, size)
    tokens, k = ids.shape
    visits, device = tokens * k, ids.device
    slots = n_slots(visits, experts, size)

    def integers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    found = Slots(
        integers(slots), integers(tokens, k), integers(experts + 1), integers(slots // size), size
    )
    if not visits:
        found.start.zero_()
        return found
    stretches, bins = ceil_div(visits, _STRETCH), max(32, triton.next_power_of_2(experts))
    with torch.cuda.device_of(ids):  # Triton launches on the current GPU
        if visits <= _IN_ONE_LAUNCH:
            before = loads = None
        else:
            before, loads = integers(stretches, experts), integers(experts)
            _count[(stretches,)](
                ids, before, visits, k, *ids.stride(), experts, bins, _STRETCH, num_warps=4
            )
            _add_up[(ceil_div(experts, _COLUMNS),)](
                before, loads, stretches, experts, _COLUMNS, 128, num_warps=4
            )
        _give_out[(ceil_div(slots, _STRETCH),)](
            ids, before, loads, *found[:4], visits, k, *ids.stride(), experts, slots,
            size, bins, _STRETCH, _STRETCH // size, _PART, num_warps=4,
        )  # fmt: skip
    return found


def _check(ids: Tensor, experts: int, size: int) -> None:
    if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
        got = f"{list(ids.shape)} of {ids.dtype}"
        raise ValueError(f"{_NAME}: ids must be [tokens, K] of int64 or int32, got {got}")
    if not 1 <= experts <= _MOST_EXPERTS:
        most = _MOST_EXPERTS
        raise ValueError(f"{_NAME}: experts must be 1 to {most}, got {experts}: split the layer")
    if size not in SIZES:
        raise ValueError(f"{_NAME}: size must be one of {SIZES}, got {size}")
    if n_slots(ids.numel(), experts, size) + _STRETCH >= 2**31:
        raise ValueError(f"{_NAME}: slots must fit in int32, got {ids.numel()} visits: take fewer")


@triton.jit
def _experts_of(ids, stretch, V, K, ids_t, ids_k, STRETCH: tl.constexpr):
    """Return the visits of a stretch, their experts and which of them there are."""
    v = stretch * STRETCH + tl.arange(0, STRETCH)
    there = v < V
    at = (v // K).to(tl.int64) * ids_t + (v % K).to(tl.int64) * ids_k
    return v, tl.load(ids + at, mask=there, other=0).to(tl.int32), there


@triton.jit
def _count(
    ids, counts, V, K, ids_t, ids_k, E, BINS: tl.constexpr, STRETCH: tl.constexpr
):  # fmt: skip
    """Count a stretch's visits to each expert."""
    stretch = tl.program_id(0)
    _, chosen, there = _experts_of(ids, stretch, V, K, ids_t, ids_k, STRETCH)
    e = tl.arange(0, BINS)
    tl.store(counts + stretch.to(tl.int64) * E + e, tl.histogram(chosen, BINS, there), mask=e < E)


@triton.jit
def _add_up(counts, loads, n, E, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Replace the counts of some experts by those of all stretches before; their sums are loads."""
    e = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    load = tl.zeros((COLUMNS,), tl.int32)
    for first in range(0, n, ROWS):
        row = first + tl.arange(0, ROWS)
        there = (row < n)[:, None] & (e < E)[None, :]
        at = counts + row.to(tl.int64)[:, None] * E + e[None, :]
        found = tl.load(at, mask=there, other=0)
        tl.store(at, load[None, :] + tl.cumsum(found, axis=0) - found, mask=there)
        load += tl.sum(found, axis=0)
    tl.store(loads + e, load, mask=e < E)


@triton.jit
def _give_out(
    ids, before, loads, visit, place, start, expert, V, K, ids_t, ids_k, E, P,
    SIZE: tl.constexpr, BINS: tl.constexpr, STRETCH: tl.constexpr, TILES: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """Give slots to a stretch of visits; of a stretch of slots, say whose they are, which empty."""
    stretch = tl.program_id(0)
    e = tl.arange(0, BINS)
    v, chosen, there = _experts_of(ids, stretch, V, K, ids_t, ids_k, STRETCH)
    if before is None:
        load = tl.zeros((BINS,), tl.int32)
        earlier = tl.zeros((BINS,), tl.int32)
        for other in range(tl.cdiv(V, STRETCH)):
            _, others, inside = _experts_of(ids, other, V, K, ids_t, ids_k, STRETCH)
            counts = tl.histogram(others, BINS, inside)
            load += counts
            earlier += tl.where(other < stretch, counts, 0)
    else:
        load = tl.load(loads + e, mask=e < E, other=0)
        inside = (e < E) & (stretch * STRETCH < V)
        earlier = tl.load(before + stretch.to(tl.int64) * E + e, mask=inside, other=0)
    owned = (load + SIZE - 1) // SIZE * SIZE
    end = tl.cumsum(owned, axis=0)
    first = end - owned
    if stretch == 0:
        tl.store(start + e, first, mask=e < E)
        tl.store(start + E, tl.sum(owned, axis=0))

    slot = tl.gather(first + earlier, chosen, axis=0)
    for part in range(STRETCH // PART):  # how many visits of this stretch lie before
        others_v, others, _ = _experts_of(
            ids, stretch * (STRETCH // PART) + part, V, K, ids_t, ids_k, PART
        )
        same = (chosen[:, None] == others[None, :]) & (v[:, None] > others_v[None, :])
        slot += tl.sum(same.to(tl.int32), axis=1)
    tl.store(visit + slot, v, mask=there)
    tl.store(place + v, slot, mask=there)

    # no expert ends at or before a tile of its own: so many experts lie before this tile
    tile = stretch * TILES + tl.arange(0, TILES)
    whose = tl.sum((end[None, :] <= (tile * SIZE)[:, None]).to(tl.int32), axis=1)
    owner = tl.where(tile * SIZE < tl.sum(owned, axis=0), whose, -1)
    tl.store(expert + tile, owner, mask=tile < P // SIZE)
    # where its expert's empty slots begin; of expert 0, and so before all tiles behind the end
    filled = tl.gather(first + load, tl.maximum(owner, 0), axis=0)
    p = (tile * SIZE)[:, None] + tl.arange(0, SIZE)[None, :]
    tl.store(
        visit + p, tl.full((TILES, SIZE), 0, tl.int32) + V, mask=(p >= filled[:, None]) & (p < P)
    )
