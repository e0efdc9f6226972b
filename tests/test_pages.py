"""The paged cache: every row finds its own tokens, whoever had the page before."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minids import Transformer, preset
from minids.attention import Causal, attend
from minids.cache import Cache
from minids.mla import MLA, attend_latent
from minids.serve.pages import SIZE, Pages, PageTable

SAME = 1e-5  # relative: FP32, the same sums in another order


def toy(attn="mla"):
    return Transformer(preset("toy", attn=attn, n_heads=4, n_kv_heads=2, init_std=0.3))


def prompts(batch, width, seed=0):
    return torch.randint(32, (batch, width), generator=torch.Generator().manual_seed(seed))


def paged(model, batch, capacity, page_size=4, n_pages=None):
    cfg = model.cfg
    return Cache(
        cfg.n_layers, batch, capacity, cfg.cache_dim, model.embed, page_size, n_pages
    )  # fmt: skip


def test_worked_example():
    """Two rows, pages of two tokens: row 0 takes pages 0 and 1, row 1 takes 2, forgets, takes 1."""
    cache = Cache(1, 2, 4, width=1, like=torch.zeros(()), page_size=2, n_pages=3)
    assert cache.nbytes == 3 * 2 * 1 * 4
    row = torch.tensor([[[1.0], [2.0], [3.0]], [[7.0], [8.0], [9.0]]])
    assert cache.layer(0).append(row[:, :2])[..., 0].tolist() == [[1, 2], [7, 8]]
    cache.advance(2)
    assert cache.pages.rows == [[0], [1]]
    cache.rollback([0, 1])
    assert cache.layer(0).append(row[:, 2:])[..., 0].tolist() == [[1, 2, 3], [7, 9, 0]]
    assert cache.pages.rows == [[0, 2], [1]]
    assert cache.pages.table.tolist() == [[0, 2], [1, -1]]
    cache.advance([1, 1])
    cache.rollback([1, 2])
    assert (cache.pages.rows, sorted(cache.pages.free)) == ([[0], []], [1, 2])


def test_a_page_by_hand():
    """Slots behind the end and numbers behind the last page are never looked at."""
    store = torch.tensor([[[1.0], [2.0]], [[3.0], [torch.nan]], [[torch.nan], [torch.nan]]])
    table = torch.tensor([[0, 1, 9], [2**30, -5, 0]]).int()
    pages = Pages(store, table, torch.tensor([3, 0]).int())
    assert pages.latent()[..., 0].tolist() == [[1, 2, 3, 0, 0, 0], [0] * 6]
    assert pages.mask(2).int().tolist() == [
        [[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]],
        [[0] * 6] * 2,
    ]


def test_a_query_that_sees_nothing_gets_zero():
    pages = Pages(torch.randn(1, 4, 3), torch.zeros(2, 1).int(), torch.tensor([1, 0]).int())
    z = attend_latent(torch.randn(2, 2, 5, 2), torch.randn(2, 2, 5, 1), pages, None, 0.5)
    held = pages.store[0, 0, :2]
    assert not z[0, 0].any()
    assert torch.equal(z[0, 1], held.expand(5, 2))
    assert not z[1].any()


def test_in_numbers_is_the_mask():
    """Start and documents say what a mask of T x S says."""
    q, k = torch.randn(2, 3, 4, 6), torch.randn(2, 5, 1, 6)
    told = Causal(torch.tensor([2, 0]))
    mask = torch.tensor([[[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1] * 5],
                         [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]]).bool()  # fmt: skip
    assert torch.equal(told.mask(3, 5), mask)
    assert torch.equal(attend(q, k, k, told, 0.3), attend(q, k, k, mask, 0.3))
    packed = Causal(torch.zeros(1).int(), torch.tensor([[7, 7, 2, 7]]))
    assert packed.mask(4, 4).int().tolist() == [
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [1, 1, 0, 1]]
    ]


# --- equal to slots in rows


@pytest.mark.parametrize("attn", ["mla", "gqa"])
@pytest.mark.parametrize("page_size", [1, 3, SIZE])
def test_every_split_is_one_pass(attn, page_size):
    model, ids = toy(attn), prompts(2, 5)
    with torch.no_grad():
        want = model(ids)
        for cuts in range(2**4):  # bit i: a call ends behind token i
            ends = [i + 1 for i in range(4) if cuts >> i & 1] + [5]
            cache, start, got = paged(model, 2, 5, page_size), 0, []
            for end in ends:
                got.append(model(ids[:, start:end], cache=cache))
                start = end
            got = torch.cat(got, dim=1)
            assert (got - want).norm() <= SAME * want.norm()


@settings(max_examples=25)
@given(data=st.data(), page_size=st.integers(1, 5), attn=st.sampled_from(["mla", "gqa"]))
def test_any_history_as_without_pages(data, page_size, attn):
    """Appends and rollbacks of ragged rows: the same logits, however pages changed hands."""
    model = toy(attn)
    ours, plain = paged(model, 3, 20, page_size), model.new_cache(3, 20)
    ours.store.fill_(torch.nan)  # a page that was never written must never be looked at
    with torch.no_grad():
        for call in range(data.draw(st.integers(2, 5))):
            new = data.draw(st.integers(1, 4))
            counts = data.draw(st.lists(st.integers(1, new), min_size=3, max_size=3))
            ids = prompts(3, new, seed=call)
            got, want = (model(ids, lengths=counts, cache=cache) for cache in (ours, plain))
            for row, count in enumerate(counts):
                gap = got[row, :count] - want[row, :count]
                assert gap.norm() <= SAME * want[row, :count].norm()
            back = [data.draw(st.integers(0, length)) for length in plain.lengths]
            ours.rollback(back)
            plain.rollback(back)
            assert ours.lengths == plain.lengths
            held = [page for row in ours.pages.rows for page in row]
            assert sorted(held + ours.pages.free) == list(range(ours.store.shape[1]))
            assert [len(row) for row in ours.pages.rows] == [
                -(-length // page_size) for length in ours.lengths
            ]


def test_the_cheaper_form_reads_pages(monkeypatch):
    """One new token is absorbed and reads pages; a prompt is expanded."""
    calls = []
    for attend_in in (MLA.attend_naive, MLA.attend_absorbed):

        def spy(self, q_nope, q_rope, held, mask, attend_in=attend_in):
            calls.append((attend_in.__name__, type(held)))
            return attend_in(self, q_nope, q_rope, held, mask)

        monkeypatch.setattr(MLA, attend_in.__name__, spy)
    model, ids = toy(), prompts(1, 9)
    cache = paged(model, 1, 9)
    with torch.no_grad():
        model(ids[:, :8], cache=cache)
        model(ids[:, 8:], cache=cache)
    layers = model.cfg.n_layers
    assert (
        calls == [("attend_naive", torch.Tensor)] * layers + [("attend_absorbed", Pages)] * layers
    )


def test_bytes_are_exact():
    model = toy()
    cache = paged(model, 3, 10, page_size=4)
    assert cache.nbytes == 2 * 3 * 3 * 4 * 6 * 4  # layers, rows, pages a row, tokens, numbers, FP32
    assert cache.nbytes == cache.store.untyped_storage().nbytes()


def test_cached_values_carry_no_gradient():
    model = toy()
    cache = paged(model, 1, 9)
    for part in prompts(1, 9).split([4, 4, 1], dim=1):
        model(part, cache=cache)
    assert not cache.store.requires_grad


# --- what it refuses


def test_too_few_pages():
    model, ids = toy(), prompts(2, 5)
    cache = paged(model, 2, 8, page_size=2, n_pages=6)
    model(ids, cache=cache)
    held, rows = cache.store.clone(), [list(row) for row in cache.pages.rows]
    message = "0 of its 6 pages of 2 tokens are free, 2 are needed: roll back, or give it more"
    with pytest.raises(ValueError, match=message):
        cache.reserve(2)
    with pytest.raises(ValueError, match=message):
        model(ids[:, :2], cache=cache)
    assert (cache.lengths, cache.pages.rows) == ([5, 5], rows), "a refused call changes nothing"
    assert torch.equal(cache.store, held)
    cache.rollback([5, 0])
    model(ids[:, :1], cache=cache)
    assert cache.lengths == [1, 6]
    with pytest.raises(ValueError, match="holds 6 tokens of 8, 3 more were given"):
        model(ids[:, :3], cache=cache)


@pytest.mark.parametrize(("size", "n_pages"), [(0, 3), (-1, 3), (4, -1)])
def test_impossible_sizes(size, n_pages):
    with pytest.raises(ValueError, match="at least 1, got"):
        Cache(1, 2, 4, 3, torch.zeros(()), size, n_pages)


def test_one_length_a_row():
    with pytest.raises(ValueError, match="zip"):
        PageTable(2, 3, 4, torch.device("cpu")).grow([1])
