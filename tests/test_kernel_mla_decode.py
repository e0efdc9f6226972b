"""Attention to latents in pages: equal to minids.mla.attend_latent, whatever it is cut into."""

import math
from contextlib import contextmanager

import pytest
import torch
from compiled import CARDS, HOPPER, compile_calls
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_attention import (
    HEADS,
    LATENTS,
    LENGTHS,
    LSE,
    draw_pages,
    error,
    exact_latent,
    tile_loads,
    tolerance,
)
from kernel_inputs import (
    LAYOUTS,
    bitwise_equal,
    is_written,
    laid_out,
    mutated,
    poison,
    poisoned_memory,
)
from minids_kernels import cards, configs, mla_decode
from minids_kernels.cards import Card
from minids_kernels.latent import Pages
from minids_kernels.mla_decode import (
    CANDIDATES,
    DTYPES,
    Tile,
    attend_latent,
    fits,
    rule_of_runs,
    rule_of_thumb,
    schedule,
    traffic,
)
from torch import Tensor

from minids import mla
from minids.serve import pages as reference

pytestmark = pytest.mark.usefixtures("interpreter")

KERNEL = "mla_decode.Tile"
SCALE = 0.1
PUBLISHED, SMALL = (512, 64), (32, 16)
SHORT = (0, 1, 63, 64, 65, 200)
TILES, OF_FP32 = CANDIDATES[:-1], CANDIDATES[-1]


@contextmanager
def using(tile: Tile | None = None, runs: int | None = None, module=mla_decode):
    """Let launches take this tile, and cut each walk into so many runs; None: as they choose."""
    with pytest.MonkeyPatch.context() as patch:
        if runs is not None:
            patch.setattr(module, "rule_of_runs", lambda *_: runs)
        if tile is None:
            yield
            return
        with configs.trying(KERNEL, tile._asdict()) as trial:
            yield
        assert trial.asked, "nothing was launched"


def draw_queries(
    batch: int, queries: int, heads: int, widths: tuple[int, int],
    dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return random queries, the latent ones laid out as minids.mla leaves them: head by head."""
    generator = torch.Generator().manual_seed(seed)
    c, r = (
        torch.randn(heads, batch, queries, n, generator=generator).to(dtype).to(device)
        for n in widths
    )
    return c.permute(1, 2, 0, 3), r.permute(1, 2, 0, 3).contiguous()


def run(q, pages: Pages, tile=None, runs=None, scale=SCALE, module=mla_decode):
    """Return z and log-sum-exp out of memory that was full of NaN, all of it written."""
    with using(tile, runs, module), poisoned_memory():
        z, lse = module.decode(*q, pages, scale)
    assert is_written(z), "a number of the output was not written"
    assert is_written(lse), "a number of log-sum-exp was not written"
    return z, lse


def assert_exact(q, pages: Pages, tile=None, runs=None, scale=SCALE, module=mla_decode) -> None:
    """Compare with loops in FP64."""
    z, lse = run(q, pages, tile, runs, scale, module)
    wanted, of_row = exact_latent(*q, pages, scale)
    assert z.dtype == q[0].dtype
    assert lse.dtype == torch.float32
    assert error(z, wanted) < tolerance(pages.store.dtype)
    unseen = of_row == -math.inf
    assert (z.cpu()[unseen] == 0).all()
    lse = lse.cpu().double()
    assert torch.equal(lse == -math.inf, unseen)
    gap = (lse - of_row)[~unseen].abs()
    assert (gap < LSE * (1 + of_row[~unseen].abs())).all()


# Example, reference


def test_example_by_hand(device):
    """Latents 1 and 3 with scores 0 and ln 3: (1 * 1 + 3 * 3) / 4, log-sum-exp ln 4."""
    store = poison(torch.empty(2, 64, 2, device=device))
    store[1, 0] = torch.tensor([1.0, 0.0])
    store[1, 1] = torch.tensor([3.0, math.log(3)])
    table = torch.tensor([[1]], dtype=torch.int32, device=device)
    pages = Pages(store, table, torch.tensor([2], dtype=torch.int32, device=device))
    q = torch.zeros(1, 1, 1, 1, device=device), torch.ones(1, 1, 1, 1, device=device)
    z, lse = run(q, pages, scale=1.0)
    assert z.item() == pytest.approx(2.5)
    assert lse.item() == pytest.approx(math.log(4))


@pytest.mark.parametrize("widths", LATENTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_reference(dtype, widths, device):
    lengths = (0, 65) if widths == PUBLISHED else SHORT
    pages = draw_pages(lengths, sum(widths), dtype, device)
    q = draw_queries(len(lengths), 2, 5, widths, dtype, device)
    z = attend_latent(*q, pages, None, SCALE)
    wanted = mla.attend_latent(*q, reference.Pages(*pages), None, SCALE)
    assert z.dtype == wanted.dtype
    assert error(z, wanted) < 2 * tolerance(dtype)  # both round
    assert_exact(q, pages)


@pytest.mark.parametrize("heads", HEADS)
def test_every_number_of_heads_and_length(heads, device):
    dtype = torch.bfloat16
    pages = draw_pages(LENGTHS, sum(SMALL), dtype, device)
    assert_exact(draw_queries(len(LENGTHS), 1, heads, SMALL, dtype, device), pages)


@pytest.mark.parametrize(
    ("queries", "heads", "runs"),
    [(1, 3, 3), (2, 3, 1), (3, 3, 3), (4, 3, 1), (7, 3, 2), (2, 64, 1), (4, 16, 2)],
)
def test_speculative_queries_see_their_own_slots(queries, heads, runs, device):
    """Of 7 queries in a row of 5 the first two see nothing; limits lie around a page's end."""
    lengths = (0, 5, 63, 65, 68, 130)
    pages = draw_pages(lengths, sum(SMALL), torch.bfloat16, device)
    q = draw_queries(len(lengths), queries, heads, SMALL, torch.bfloat16, device)
    assert_exact(q, pages, runs=runs)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("runs", [1, 3])
def test_every_tile_of_published_latents(tile, runs, device):
    pages = draw_pages((65, 130), sum(PUBLISHED), torch.bfloat16, device)
    q = draw_queries(2, 2, 9, PUBLISHED, torch.bfloat16, device)
    assert_exact(q, pages, tile, runs)


@pytest.mark.parametrize("runs", [2, 5, 16])
def test_any_number_of_runs(runs, device):
    """Runs of unequal length, and empty ones."""
    pages = draw_pages((0, 1, 65, 390), sum(SMALL), torch.bfloat16, device)
    assert_exact(draw_queries(4, 2, 9, SMALL, torch.bfloat16, device), pages, None, runs)


@settings(max_examples=8)
@given(
    st.lists(st.sampled_from(LENGTHS[:-1]) | st.integers(0, 300), min_size=1, max_size=4),
    st.integers(1, 5), st.integers(1, 20), st.integers(1, 300), st.integers(1, 70),
    st.sampled_from(DTYPES), st.sampled_from([None, *TILES]), st.sampled_from([None, 1, 2, 3, 7]),
)  # fmt: skip
def test_random_shapes(device, lengths, queries, heads, latent_dim, rope_dim, dtype, tile, runs):
    widths = latent_dim, rope_dim
    pages = draw_pages(lengths, sum(widths), dtype, device)
    q = draw_queries(len(lengths), queries, heads, widths, dtype, device)
    if tile and (dtype == torch.float32 or not fits(tile, widths, 2, card_of(pages))):
        tile = None
    assert_exact(q, pages, tile, runs)


def card_of(pages: Pages) -> Card:
    return cards.card("a test", pages.store)


@pytest.mark.parametrize("runs", [1, 3])
def test_large_scores_do_not_overflow(runs, device):
    pages = draw_pages((3, 190), sum(SMALL), torch.bfloat16, device)
    assert_exact(draw_queries(2, 1, 3, SMALL, torch.bfloat16, device), pages, runs=runs, scale=30.0)


# Pages


@pytest.mark.parametrize("runs", [1, 2])
def test_rows_that_hold_nothing_get_zeros(runs, device):
    pages = draw_pages((0, 0), sum(SMALL), torch.bfloat16, device)
    q = draw_queries(2, 2, 3, SMALL, torch.bfloat16, device)
    for held in (
        pages,
        pages._replace(table=pages.table[:, :0]),
        pages._replace(store=pages.store[:0]),
    ):
        z, lse = run(q, held, runs=runs)
        assert (z == 0).all()
        assert (lse == -math.inf).all()


def test_no_rows(device):
    q = draw_queries(0, 1, 3, SMALL, device=device)
    pages = draw_pages((1,), sum(SMALL), device=device)
    pages = pages._replace(table=pages.table[:0], lengths=pages.lengths[:0])
    assert attend_latent(*q, pages, None, SCALE).shape == (0, 1, 3, 32)


def test_order_of_pages_does_not_matter_and_rows_share_them(device):
    lengths = (200, 200, 130)
    pages = draw_pages(lengths, sum(SMALL), torch.bfloat16, device)
    pages.table[1] = pages.table[0]
    pages.table[2, 0] = pages.table[0, 0]
    q = draw_queries(3, 2, 5, SMALL, torch.bfloat16, device)
    q[0][1], q[1][1] = q[0][0], q[1][0]
    assert_exact(q, pages)
    z, _ = run(q, pages)
    assert torch.equal(z[0], z[1])
    order = torch.randperm(len(pages.store), device=pages.store.device)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    used = torch.arange(pages.table.shape[1], device=order.device) * 64 < pages.lengths[:, None]
    moved = place[pages.table.where(used, 0).long()].int().where(used, 2**31 - 1)
    assert torch.equal(run(q, pages._replace(store=pages.store[order], table=moved))[0], z)


def test_only_pages_that_are_held_are_read(device, monkeypatch):
    """Neither wild numbers nor slots behind the end: each load ends with the last slot seen."""
    if device != "cpu":
        pytest.skip("NOT RUN: only the interpreter can be watched")
    lengths = (0, 1, 63, 64, 65, 200)
    pages = draw_pages(lengths, sum(SMALL), torch.bfloat16)
    held = {
        int(pages.table[row, n]): min(64, length - 64 * n)
        for row, length in enumerate(lengths) for n in range(-(-length // 64))
    }  # fmt: skip
    for tile in (CANDIDATES[0], CANDIDATES[1]):
        with tile_loads() as loads:
            run(draw_queries(len(lengths), 2, 3, SMALL, torch.bfloat16), pages, tile, 2)
        assert {load.at[0] for load in loads} == set(held)
        assert all(load.at[1] + load.block[1] <= held[load.at[0]] for load in loads)


@pytest.mark.parametrize("page", [128, 192])
def test_longer_pages(page, device):
    lengths = (0, 1, 127, 128, 300)
    numbers = [torch.randn(n, 48).bfloat16() for n in lengths]
    count = [-(-n // page) for n in lengths]
    store = poison(torch.empty(sum(count) + 1, page, 48, dtype=torch.bfloat16))
    table = torch.full((len(lengths), max(count)), -(2**31), dtype=torch.int32)
    order = iter(torch.randperm(len(store)).tolist())
    for row, x in enumerate(numbers):
        for n in range(count[row]):
            table[row, n] = next(order)
            part = x[n * page : (n + 1) * page]
            store[table[row, n], : len(part)] = part
    ends = torch.tensor(lengths, dtype=torch.int32)
    pages = Pages(*(x.to(device) for x in (store, table, ends)))
    q = draw_queries(len(lengths), 2, 3, SMALL, torch.bfloat16, device)
    for tile in (None, CANDIDATES[1]):
        assert_exact(q, pages, tile, 2)


@pytest.mark.parametrize("runs", [1, 3])
def test_nan_that_is_held_is_seen(runs, device):
    pages = draw_pages((100, 100), sum(SMALL), torch.bfloat16, device)
    pages.store[pages.table[0, 1], 35] = torch.nan  # slot 99: the last query's own
    q = draw_queries(2, 2, 3, SMALL, torch.bfloat16, device)
    with using(runs=runs):
        z, lse = mla_decode.decode(*q, pages, SCALE)
    assert z[0, 1].isnan().all()
    assert lse[0, 1].isnan().all()
    assert not z[1].isnan().any()


def test_a_row_is_the_same_beside_any_others(device):
    """Bit by bit, with others of other lengths and numbers, and itself in another place."""
    lengths = (130, 390, 0, 65)
    pages = draw_pages(lengths, sum(SMALL), torch.bfloat16, device)
    q = draw_queries(4, 2, 5, SMALL, torch.bfloat16, device)
    z, lse = run(q, pages)
    others = draw_pages((70, 1, 448, 390), sum(SMALL), torch.bfloat16, device, 7)
    n = pages.table.shape[1]
    assert others.table.shape[1] == n
    store = torch.cat([others.store, pages.store])
    for mine, place in ((0, 0), (0, 3), (1, 2)):
        table = torch.zeros_like(pages.table)
        table[:, : others.table.shape[1]] = others.table
        ends, new = others.lengths.clone(), draw_queries(4, 2, 5, SMALL, torch.bfloat16, device, 9)
        used = torch.arange(n, device=table.device) * 64 < lengths[mine]
        table[place] = (pages.table[mine].where(used, 0) + len(others.store)).where(used, -1)
        ends[place] = lengths[mine]
        for each, own in zip(new, q, strict=True):
            each[place] = own[mine]
        found = run(new, Pages(store, table, ends))
        assert torch.equal(found[0][place], z[mine])
        assert torch.equal(found[1][place], lse[mine])


# Memory


@pytest.mark.parametrize("layout", LAYOUTS)
def test_odd_strides_of_queries(layout, device):
    pages = draw_pages((65, 130), sum(SMALL), torch.bfloat16, device)
    q = draw_queries(2, 2, 3, SMALL, torch.bfloat16, device)
    z, _ = run(q, pages)
    odd = tuple(laid_out(x, layout) for x in q)
    assert torch.equal(run(odd, pages)[0], z)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_odd_strides_of_pages(layout, dtype, device):
    """Any layout is read in place; what descriptors cannot describe, by pointers."""
    pages = draw_pages((65, 130), sum(SMALL), dtype, device)
    odd = pages._replace(store=laid_out(pages.store, layout))
    table = poison(torch.empty(2, 2 * pages.table.shape[1] + 1, dtype=torch.int32, device=device))
    table[:, 1::2] = pages.table
    odd = odd._replace(table=table[:, 1::2], lengths=pages.lengths.repeat_interleave(3)[::3])
    assert_exact(draw_queries(2, 2, 3, SMALL, dtype, device), odd, runs=2)


def test_pages_of_one_layer_among_others(device):
    pages = draw_pages((65, 130), sum(SMALL), torch.bfloat16, device)
    store = poison(torch.empty(len(pages.store), 3, 64, 48, dtype=torch.bfloat16, device=device))
    store[:, 1] = pages.store
    q = draw_queries(2, 1, 3, SMALL, torch.bfloat16, device)
    z, _ = run(q, pages)
    assert torch.equal(run(q, pages._replace(store=store[:, 1]))[0], z)


@pytest.mark.parametrize("of_pages", DTYPES, ids=str)
@pytest.mark.parametrize("of_queries", DTYPES, ids=str)
def test_computes_in_the_dtype_of_pages_and_returns_that_of_queries(of_queries, of_pages, device):
    pages = draw_pages((65, 130), sum(SMALL), of_pages, device)
    q = draw_queries(2, 1, 3, SMALL, of_queries, device)
    z, _ = run(q, pages)
    wanted, _ = exact_latent(*(x.to(of_pages) for x in q), pages, SCALE)
    assert z.dtype == of_queries
    assert error(z, wanted) < max(tolerance(of_queries), tolerance(of_pages))


def test_integers_of_either_width(device):
    pages = draw_pages((65, 130), sum(SMALL), torch.bfloat16, device)
    q = draw_queries(2, 1, 3, SMALL, torch.bfloat16, device)
    z, _ = run(q, pages)
    wide = pages._replace(table=pages.table.long(), lengths=pages.lengths.long())
    assert torch.equal(run(q, wide)[0], z)


@pytest.mark.parametrize("runs", [1, 4])
def test_two_runs_are_bitwise_equal(runs, device):
    pages = draw_pages((1, 130), sum(SMALL), torch.bfloat16, device)
    q = draw_queries(2, 3, 6, SMALL, torch.bfloat16, device)
    bitwise_equal(lambda: run(q, pages, runs=runs))


@pytest.mark.parametrize("capability", [(8, 0), (12, 0)])
@pytest.mark.parametrize("widths", [PUBLISHED, (40, 8)], ids=str)
def test_as_other_cards_cut_it(capability, widths, device, monkeypatch):
    """Before Hopper pages are read by pointers, also where rows are aligned."""
    pages = draw_pages((1, 65), sum(widths), torch.bfloat16, device)
    q = draw_queries(2, 2, 9, widths, torch.bfloat16, device)
    if device == "cpu":
        monkeypatch.setattr(cards, "card", lambda *_: card(capability))
    assert_exact(q, pages)


# Wrong input


ERRORS = {
    "a tensor": (lambda q, p: (*q, p.store, SCALE), "held must be Pages, got Tensor"),
    "pages of 32": (
        lambda q, p: (*q, p._replace(store=p.store[:, :32]), SCALE),
        "a multiple of 64 tokens, got 32",
    ),
    "no slots": (lambda q, p: (*q, p._replace(store=p.store[:, :0]), SCALE), "got 0: give"),
    "store of two axes": (lambda q, p: (*q, p._replace(store=p.store[0]), SCALE), "store must"),
    "pages in FP64": (lambda q, p: (*q, p._replace(store=p.store.double()), SCALE), "float64"),
    "queries in FP64": (lambda q, p: (q[0].double(), q[1], p, SCALE), "q_latent must have 4 axes"),
    "q_rope too wide": (lambda q, p: (q[0], q[0], p, SCALE), "q_rope must be (2, 1, 3, 16)"),
    "slots too narrow": (
        lambda q, p: (*q, p._replace(store=p.store[..., 1:]), SCALE),
        "slots of 47 numbers, got (2, 1, 3, 16)",
    ),
    "table of other rows": (lambda q, p: (*q, p._replace(table=p.table[:1]), SCALE), "table must"),
    "table of one axis": (lambda q, p: (*q, p._replace(table=p.table[:, 0]), SCALE), "table must"),
    "table of floats": (lambda q, p: (*q, p._replace(table=p.table.float()), SCALE), "float32: g"),
    "lengths of other rows": (
        lambda q, p: (*q, p._replace(lengths=p.lengths[:1]), SCALE),
        "lengths must be (2,)",
    ),
    "scale 0": (lambda q, p: (*q, p, 0.0), "scale must be positive and finite, got 0.0"),
    "scale NaN": (lambda q, p: (*q, p, math.nan), "scale must be positive and finite, got nan"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_wrong_input_is_refused_before_a_launch(case, device, monkeypatch):
    make, text = ERRORS[case]
    pages = draw_pages((65, 130), sum(SMALL), torch.bfloat16, device)
    q = draw_queries(2, 1, 3, SMALL, torch.bfloat16, device)
    monkeypatch.setattr(mla_decode, "decode", lambda *_: pytest.fail("it was launched"))
    q_latent, q_rope, held, scale = make(q, pages)
    with pytest.raises(ValueError, match="attend_latent: ") as found:
        attend_latent(q_latent, q_rope, held, None, scale)
    assert text in str(found.value)


def test_latents_too_wide_for_the_card_are_refused(device):
    pages = draw_pages((1,), 8016, torch.bfloat16, device)
    q = draw_queries(1, 1, 1, (8000, 16), torch.bfloat16, device)
    with pytest.raises(ValueError, match=r"widths \(8000, 16\) of 2 bytes need more"):
        attend_latent(*q, pages, None, SCALE)


# How it is cut


def card(capability=HOPPER) -> Card:
    model = CARDS[capability]
    return Card(model.name, capability, model.n_sm, model.shared_bytes)


def test_rule_of_thumb_by_hand():
    """On Hopper 64 rows and pages whole, 16 rows twice on a multiprocessor; smaller elsewhere."""
    assert rule_of_thumb(128, PUBLISHED, 2, card()) == Tile(64, 64, 1, 8, 2)
    assert rule_of_thumb(17, PUBLISHED, 2, card()) == Tile(64, 64, 1, 8, 2)
    assert rule_of_thumb(16, PUBLISHED, 2, card()) == Tile(16, 32, 2, 4, 3)
    assert rule_of_thumb(128, PUBLISHED, 4, card()) == OF_FP32
    assert rule_of_thumb(128, PUBLISHED, 2, card((8, 0))) == Tile(64, 32, 1, 8, 3)
    assert rule_of_thumb(128, PUBLISHED, 2, card((8, 9))) == Tile(32, 16, 1, 8, 3)
    assert rule_of_thumb(128, PUBLISHED, 2, card((10, 0))).BLOCK_M == 32


def test_rule_of_runs_by_hand():
    """One row of 4096 and 128 heads: 2 walks of 64 tiles; 128 rows are two rounds as they are."""
    tile = CANDIDATES[0]
    assert rule_of_runs(2, 64, tile, card()) == 32  # of two tiles each, none shorter
    assert rule_of_runs(256, 64, tile, card()) == 1
    assert rule_of_runs(64, 64, tile, card()) == 2  # 128 programs for 132 multiprocessors
    assert rule_of_runs(1, 1, tile, card()) == 1
    assert rule_of_runs(1, 100_000, tile, card()) == 128


@pytest.mark.parametrize("capability", CARDS, ids=str)
def test_rules_know_every_shape(capability):
    for widths in LATENTS:
        for itemsize in (2, 4):
            for rows in (1, 16, 17, 128, 512):
                tile = rule_of_thumb(rows, widths, itemsize, card(capability))
                assert tile in CANDIDATES
                for walks in (1, 100, 1000):
                    runs = rule_of_runs(walks, 64, tile, card(capability))
                    assert runs == 1 or walks * runs <= 4 * CARDS[capability].n_sm * tile.programs


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("tile", [CANDIDATES[0], CANDIDATES[4]], ids=str)
@pytest.mark.parametrize("runs", [1, 3])
def test_schedule_and_traffic_are_what_the_kernel_does(queries, tile, runs, device):
    if device != "cpu":
        pytest.skip("NOT RUN: only the interpreter can be watched")
    lengths, heads, (C, R) = (0, 1, 65, 130), 17, PUBLISHED
    pages = draw_pages(lengths, C + R, torch.bfloat16)
    q = draw_queries(len(lengths), queries, heads, PUBLISHED, torch.bfloat16)
    shape = (lengths, pages.table.shape[1], queries, heads, PUBLISHED, 2, cards.INTERPRETER)
    with tile_loads() as loads:
        run(q, pages, tile, runs)
    with using(tile, runs):
        steps, moved = schedule(*shape), traffic(*shape)

    rope = pages.store[..., C:].data_ptr()
    read = [(load.program, load.at) for load in loads if load.address == rope]
    read.sort(key=lambda x: x[0][::-1])  # stable: the interpreter runs programs in its own order
    assert [step.program for step in steps] == [program for program, _ in read]
    for step, (program, (page, slot, column)) in zip(steps, read, strict=True):
        _, row, _ = program
        n = step.keys[0] // 64
        assert (step.row, column) == (row, 0)
        assert page == pages.table[row, n]
        assert n * 64 + slot == min(step.keys[0], step.keys[1] - tile.BLOCK_N)
        first = lengths[row] - queries + 1 + step.queries[0]  # what the first query sees
        assert step.masked == (first < step.keys[1])
    seen = {(step.row, key) for step in steps for key in range(*step.keys)}
    assert seen == {(row, key) for row, n in enumerate(lengths) for key in range(n)}
    for step in steps:  # a tile's rows are (query, head) pairs, in this order
        first = step.program[0] * tile.BLOCK_M
        last = min(first + tile.BLOCK_M, queries * heads) - 1
        assert step.queries == (first // heads, last // heads + 1)
        assert step.heads[0] <= first % heads
        assert last % heads < step.heads[1]

    n_rows, n_queries = len(lengths) * queries * heads, queries * heads
    inside = sum(
        max(0, min(load.at[1] + load.block[1], 64) - max(load.at[1], 0))
        * min(load.block[2], (R if load.address == rope else C) - load.at[2])
        for load in loads
    )
    programs = {step.program for step in steps}
    asked = sum(min(tile.BLOCK_M, n_queries - p[0] * tile.BLOCK_M) for p in programs)
    results = n_rows * (2 * C + 4)
    assert moved.least_bytes == 2 * (n_rows + sum(lengths)) * (C + R) + results
    of_lse = 4 * n_rows * runs
    if runs == 1:
        assert moved.loaded_bytes == 2 * (inside + asked * (C + R))
        assert moved.stored_bytes == results
    else:
        parts = 0
        for b, t in ((b, t) for b in range(len(lengths)) for t in range(queries)):
            for p in programs:
                if p[1] == b:
                    begin = min(step.keys[0] for step in steps if step.program == p)
                    own = range(p[0] * tile.BLOCK_M, min((p[0] + 1) * tile.BLOCK_M, n_queries))
                    sees = lengths[b] - queries + 1 + t > begin
                    parts += sees * sum(row // heads == t for row in own)
        assert moved.loaded_bytes == 2 * (inside + asked * (C + R)) + 2 * of_lse + 4 * C * parts
        assert moved.stored_bytes == results + of_lse + 4 * C * asked


# Planted bugs


def check(module) -> None:
    pages = draw_pages((0, 1, 65, 130, 200), sum(SMALL), torch.bfloat16)
    q = draw_queries(5, 3, 6, SMALL, torch.bfloat16)
    for tile in (CANDIDATES[0], CANDIDATES[4]):
        for runs in (1, 3):
            assert_exact(q, pages, tile, runs, module=module)
    wide = draw_pages((130,), 303, torch.bfloat16)
    assert_exact(draw_queries(1, 1, 2, (300, 3), torch.bfloat16), wide, module=module)


BUGS = {
    "the last tile starts as all others": ("tl.minimum(start, end - BLOCK_N)", "start"),
    "what starts early is seen twice": ("tl.where(slots < start, end, slots)", "slots"),
    "a query sees one slot more": ("slots[None, :] < sees", "slots[None, :] <= sees"),
    "all queries see alike": ("sees = before + rows // H", "sees = before + 0 * rows"),
    "heads are taken for queries": ("(rows % H).to(", "(rows // H + 0).to("),
    "the second part is the first again": ("slot, part * BLOCK_C, steps", "slot, 0, steps"),
    "the first page is read again": ("page = next_page", "page = page"),
    "the next page is this one": ("after = (start + BLOCK_N) //", "after = start //"),
    "a tile is missing": ("stop = (run + 1) * n_tiles //", "stop = (run + 1) * (n_tiles - 1) //"),
    "every run begins at the first tile": ("first = run * n_tiles //", "first = 0 * n_tiles //"),
    "the rotary part is left out": ("tl.dot(q_r, r.T", "tl.dot(q_r * 0, r.T"),
    "sums do not shrink": ("older = sums[part] * factor[:, None]", "older = sums[part]"),
    "runs are not weighed": ("sums += tl.exp2(one * _LOG2_E - base)[:, None] * part",
                             "sums += part"),
    "the last run is not added": ("for run in range(n_runs):", "for run in range(n_runs - 1):"),
    "what an empty run left is added": ('wrote = (one != -float("inf"))', "wrote = inside"),
    "a run's first row is another's": ("at = run * n_rows", "at = 0 * n_rows"),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_seen(bug, device):
    if device != "cpu":
        pytest.skip("NOT RUN: planted in the interpreter")
    with mutated(mla_decode, *BUGS[bug]) as copy, pytest.raises(AssertionError):
        check(copy)


def test_without_a_bug_the_check_holds(device):
    if device == "cpu":
        check(mla_decode)


# Ring 2: what the compiler makes of it


def launch(
    heads: int, runs: int = 1, tile: list | None = None, widths=PUBLISHED, dtype="bfloat16",
    queries: int = 1,
) -> None:  # fmt: skip
    """Launch on tensors without memory."""
    kind = getattr(torch, dtype)
    store, latent, rope = (
        torch.empty(size, dtype=kind, device="meta")
        for size in (
            (9, 64, sum(widths)),
            (2, queries, heads, widths[0]),
            (2, queries, heads, widths[1]),
        )
    )
    table, lengths = (torch.empty(n, dtype=torch.int32, device="meta") for n in ((2, 64), (2,)))
    with using(Tile(*tile) if tile else None, runs):
        attend_latent(latent, rope, Pages(store, table, lengths), None, SCALE)


@pytest.mark.slow
def test_hopper_runs_every_candidate_from_registers():
    """No spills; wgmma for 64 rows; slots arrive by bulk copies, once: no copy for the V role."""
    calls = [{"heads": tile.BLOCK_M, "tile": list(tile)} for tile in TILES]
    calls += [{"heads": 16, "dtype": "float32"}, {"heads": 128, "runs": 4}]
    calls += [{"heads": 1, "widths": (1, 1)}]  # strides of 1 where none is expected
    compiled = compile_calls("test_kernel_mla_decode", "launch", calls)
    for tile, (kernel,) in zip(TILES, compiled, strict=False):
        found = kernel.instructions
        assert kernel.spilled_bytes == 0, (tile, kernel)
        assert kernel.programs_on_an_sm >= tile.programs, (tile, kernel)
        # three tiles of a slot: in the loop, and once for each stage that is filled before
        in_flight = tile.stages - (tile.BLOCK_M < 64)
        assert found["UTMALDG"] <= 3 * tile.stages, (tile, kernel)
        assert bool(found.get("HGMMA")) == (tile.BLOCK_M == 64), (tile, kernel)
        assert bool(found.get("HMMA")) == (tile.BLOCK_M != 64), (tile, kernel)
        of_slots = in_flight * tile.BLOCK_N * sum(PUBLISHED) * 2
        of_queries = tile.BLOCK_M * sum(PUBLISHED) * 2
        assert kernel.shared_bytes <= of_slots + of_queries + 4096, (tile, kernel)
    (exact,), (walk, add_up), _ = compiled[len(TILES) :]
    assert exact.spilled_bytes == walk.spilled_bytes == add_up.spilled_bytes == 0
    assert not exact.instructions.keys() & {"HGMMA", "HMMA"}, exact  # no TF32
    assert walk.instructions.get("HGMMA")
    assert (walk.kernel, add_up.kernel) == ("walk", "add_up")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [key for key in CARDS if key != HOPPER], ids=str)
def test_other_cards_compile(capability):
    """It fits, multiplies on tensor cores, and nothing that was spilled is read."""
    calls = [{"heads": 128}, {"heads": 16}]
    for (kernel,) in compile_calls("test_kernel_mla_decode", "launch", calls, capability):
        assert not kernel.instructions.get("LDL"), kernel
        assert kernel.spilled_bytes <= 8, kernel  # sm_120 keeps 8 bytes that it never looks at
        assert kernel.instructions.get("HMMA"), kernel
        copies = "LDGSTS" if capability < HOPPER else "UTMALDG"
        assert kernel.instructions.get(copies), kernel


# Ring 3: on a card


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [16, 64, 128])
@pytest.mark.parametrize("queries", [1, 2, 4])
def test_published_widths_on_a_card(heads, queries):
    lengths = (*LENGTHS, 1000, 2048, 4095, 3)
    pages = draw_pages(lengths, sum(PUBLISHED), torch.bfloat16, "cuda")
    q = draw_queries(len(lengths), queries, heads, PUBLISHED, torch.bfloat16, "cuda")
    assert_exact(q, pages)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_candidate_on_a_card(tile, dtype):
    if not fits(tile, PUBLISHED, 2, cards.card("a test", torch.empty(0, device="cuda"))):
        pytest.skip("NOT RUN: more shared memory than this card has")
    pages = draw_pages(LENGTHS, sum(PUBLISHED), dtype, "cuda")
    q = draw_queries(len(LENGTHS), 3, 33, PUBLISHED, dtype, "cuda")
    for runs in (1, 7):
        assert_exact(q, pages, tile, runs)


@pytest.mark.gpu
def test_fp32_on_a_card():
    pages = draw_pages(LENGTHS, sum(PUBLISHED), torch.float32, "cuda")
    q = draw_queries(len(LENGTHS), 2, 20, PUBLISHED, torch.float32, "cuda")
    for runs in (1, 7):
        assert_exact(q, pages, runs=runs)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [16, 128])
def test_twenty_runs_on_a_card_are_bitwise_equal(heads):
    pages = draw_pages((4096, 100, 0, 3000), sum(PUBLISHED), torch.bfloat16, "cuda")
    q = draw_queries(4, 2, heads, PUBLISHED, torch.bfloat16, "cuda")
    bitwise_equal(lambda: mla_decode.decode(*q, pages, SCALE), times=20)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [16, 128])
def test_a_row_is_the_same_beside_any_others_on_a_card(heads):
    pages = draw_pages((4096, 100, 0, 3000), sum(PUBLISHED), torch.bfloat16, "cuda")
    q = draw_queries(4, 1, heads, PUBLISHED, torch.bfloat16, "cuda")
    z = attend_latent(*q, pages, None, SCALE)
    for ends in ((4096, 3, 0, 0), (4096, 100, 0, 64)):
        shorter = pages._replace(lengths=torch.tensor(ends, dtype=torch.int32, device="cuda"))
        assert torch.equal(attend_latent(*q, shorter, None, SCALE)[0], z[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_pages_further_apart_than_2_to_the_31_on_a_card(dtype):
    """Numbers of the first pages are those of the last ones, whose offsets pass 2^31."""
    width, n_pages = sum(PUBLISHED), 2**31 // (64 * sum(PUBLISHED)) + 4
    near = draw_pages((200,), width, dtype, "cuda")
    store = torch.empty(n_pages, 64, width, dtype=dtype, device="cuda")
    store[-len(near.store) :] = near.store
    used = torch.arange(near.table.shape[1], device="cuda") < 4
    far = (near.table.where(used, 0) + n_pages - len(near.store)).where(used, -1)
    q = draw_queries(1, 1, 16, PUBLISHED, dtype, "cuda")
    z = attend_latent(*q, near, None, SCALE)
    assert torch.equal(attend_latent(*q, near._replace(store=store, table=far), None, SCALE), z)


@pytest.mark.gpu
@pytest.mark.parametrize("runs", [1, 4])
def test_graph_is_captured_and_replayed_with_other_lengths(runs):
    pages = draw_pages((300, 4000), sum(PUBLISHED), torch.bfloat16, "cuda")
    q = draw_queries(2, 1, 128, PUBLISHED, torch.bfloat16, "cuda")
    with using(runs=runs):
        attend_latent(*q, pages, None, SCALE)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            z = attend_latent(*q, pages, None, SCALE)
        pages.lengths.copy_(torch.tensor([64, 3333], device="cuda"))
        q[0].neg_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(z, attend_latent(*q, pages, None, SCALE))
        assert error(z, exact_latent(*q, pages, SCALE)[0]) < tolerance(torch.bfloat16)
