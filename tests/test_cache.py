"""The cache: exact bytes, and decoding in any pieces equals one pass."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minids import Transformer, preset
from minids.cache import Cache

SAME = 1e-5  # relative: FP32, the same sums in another order
KINDS = ["mla", "mha", "gqa", "mqa"]


def toy(attn="mla"):
    return Transformer(preset("toy", attn=attn, n_heads=4, n_kv_heads=2, init_std=0.3))


def prompts(batch, width, seed=0):
    return torch.randint(32, (batch, width), generator=torch.Generator().manual_seed(seed))


def close(got, want):
    assert (got - want).norm() <= SAME * want.norm()


def test_worked_example():
    """Two rows of four slots, two numbers a token: append, count, forget, overwrite."""
    cache = Cache(layers=1, batch=2, capacity=4, width=2, like=torch.zeros(()))
    assert cache.nbytes == 1 * 2 * 4 * 2 * 4
    ones = torch.ones(2, 3, 2)
    assert cache.layer(0).append(ones).tolist() == ones.tolist()
    assert cache.lengths == [0, 0], "counted only once all layers have appended"
    cache.advance([3, 2])
    assert cache.positions(2).tolist() == [[3, 4], [2, 3]]
    cache.rollback([2, 0])
    assert cache.lengths == [1, 2]
    held = cache.layer(0).append(5 * ones[:, :2])
    assert held[..., 0].tolist() == [[1, 5, 5, 0], [1, 1, 5, 5]]


# --- what it costs


def table(**changes):
    cfg = preset("v3", **changes)
    return cfg.n_layers * cfg.cache_dim


def test_fact_sheet_5_4():
    """Elements a token; BF16 bytes are twice as many."""
    heads = {"qk_nope_head_dim": 128, "v_head_dim": 128}
    assert table() == 35_136
    assert 2 * table() == 70_272
    assert table(attn="mha", **heads) == 1_998_848
    assert table(attn="mha", qk_nope_head_dim=192) == 2_498_560  # expanded K and V
    assert table(attn="gqa", n_kv_heads=16) == 249_856
    assert table(attn="gqa", n_kv_heads=8) == 124_928
    assert table(attn="mqa") == 15_616
    cfg = {name: preset(name) for name in ("v2", "v2_lite")}
    assert cfg["v2"].n_layers * cfg["v2"].cache_dim == 34_560
    assert cfg["v2_lite"].n_layers * cfg["v2_lite"].cache_dim == 15_552


@pytest.mark.parametrize("attn", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_exact(attn, dtype):
    model = toy(attn).cast(dtype)
    kv = {"mla": 4 + 2, "mha": 4 * (4 + 4), "gqa": 2 * (4 + 4), "mqa": 4 + 4}[attn]
    size = torch.finfo(dtype).bits // 8
    cache = model.new_cache(3, 10)
    assert cache.nbytes == 2 * 3 * 10 * kv * size
    assert cache.nbytes == cache.store.untyped_storage().nbytes()
    assert model.new_cache(3, 10, mtp=True).nbytes == cache.nbytes // 2  # 1 module, 2 layers
    model(prompts(3, 5), cache=cache)
    assert cache.store[:, :, :5].ne(0).any(-1).all()


def test_v3_cache_on_the_meta_device():
    like = torch.empty((), dtype=torch.bfloat16, device="meta")
    assert Cache(61, 1, 1, preset("v3").cache_dim, like).nbytes == 70_272


@pytest.mark.parametrize("heads", [1, 2, 8, 128])
def test_latent_cache_does_not_depend_on_heads(heads):
    """Fails for: cache stores expanded K/V; RoPE key per head; formula forgets the RoPE key."""
    cfg = preset("toy", n_heads=heads)
    assert cfg.cache_dim == cfg.kv_lora_rank + cfg.qk_rope_head_dim == 6


# --- what it gives back


@pytest.mark.parametrize("attn", KINDS)
def test_every_split_is_one_pass(attn):
    model, ids = toy(attn), prompts(2, 5)
    with torch.no_grad():
        want = model(ids)
        for cuts in range(2**4):  # bit i: a call ends behind token i
            ends = [i + 1 for i in range(4) if cuts >> i & 1] + [5]
            cache, start, got = model.new_cache(2, 5), 0, []
            for end in ends:
                got.append(model(ids[:, start:end], cache=cache))
                start = end
            close(torch.cat(got, dim=1), want)


@settings(max_examples=12)
@given(data=st.data(), attn=st.sampled_from(KINDS))
def test_ragged_rows_that_append_and_forget(data, attn):
    """Any history of appends and rollbacks: each row as if it stood alone and had forgotten."""
    model, rows = toy(attn), [[], []]
    cache = model.new_cache(2, 24)
    with torch.no_grad():
        for call in range(data.draw(st.integers(2, 4))):
            new = data.draw(st.integers(1, 5))
            counts = data.draw(st.lists(st.integers(1, new), min_size=2, max_size=2))
            ids = prompts(2, new, seed=data.draw(st.integers(0, 99)) + 100 * call)
            got = model(ids, lengths=counts, cache=cache)
            for row, (text, count) in enumerate(zip(rows, counts, strict=True)):
                text += ids[row, :count].tolist()
                close(got[row, :count], model(torch.tensor([text]))[0, -count:])
            back = [data.draw(st.integers(0, len(text))) for text in rows]
            cache.rollback(back)
            rows = [text[: len(text) - n] for text, n in zip(rows, back, strict=True)]
            assert cache.lengths == [len(text) for text in rows]


@pytest.mark.parametrize("attn", KINDS)
def test_leftovers_are_finite_and_hidden(attn):
    """Slots past a row's end hold 0 or what the model made of refused or padding tokens: finite.

    Finite is needed: a masked weight is 0, and 0 * nan in the value product would be nan.
    """
    model, ids = toy(attn), prompts(2, 6)
    clean, dirty = model.new_cache(2, 12), model.new_cache(2, 12)
    with torch.no_grad():
        for cache in (clean, dirty):
            model(ids, lengths=[6, 3], cache=cache)
            cache.rollback([2, 1])
        assert dirty.store.isfinite().all()
        for row, length in enumerate(dirty.lengths):
            dirty.store[:, row, length:] = 1e15
        want, got = (model(ids[:, :2], cache=cache) for cache in (clean, dirty))
    assert torch.equal(got, want)


# --- what it refuses


def test_refusals():
    model, ids = toy(), prompts(2, 5)
    cache = model.new_cache(2, 6)
    model(ids, cache=cache)
    held = cache.store.clone()
    with pytest.raises(ValueError, match="holds 5 tokens of 6, 2 more were given"):
        model(ids[:, :2], cache=cache)
    with pytest.raises(ValueError, match="cannot roll back 6 tokens of a row that holds 5"):
        cache.rollback([0, 6])
    with pytest.raises(ValueError, match="cannot roll back -1"):
        cache.rollback(-1)
    with pytest.raises(ValueError, match="one count a row: got 1 for 2 rows"):
        cache.rollback([1])
    with pytest.raises(ValueError, match="2 rows, ids have 1"):
        model(ids[:1, :1], cache=cache)
    with pytest.raises(ValueError, match="must be at least 1, got 2 and 0"):
        model.new_cache(2, 0)
    assert cache.lengths == [5, 5], "a refused call changes nothing"
    assert torch.equal(cache.store, held)
