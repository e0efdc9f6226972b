import math

import pytest
import torch
import torch.nn.functional as F

from minids import Config
from minids.attention import Attention, attend, causal_mask
from minids.cache import Cache
from minids.rope import frequencies, phases, rotate

# FP32 sums of a few dozen products in another order
TOLERANCE = dict(rtol=1e-5, atol=1e-5)
HEADS = 6


def config(attn: str, **changes) -> Config:
    return Config(**dict(
        vocab_size=8, dim=20, n_layers=1, inter_dim=8, moe_inter_dim=8, n_heads=HEADS, attn=attn,
        n_kv_heads=2, kv_lora_rank=4, qk_nope_head_dim=10, qk_rope_head_dim=4, v_head_dim=7,
    ) | changes)  # fmt: skip


def drawn(cfg: Config) -> Attention:
    attention = Attention(cfg)
    for weight in attention.parameters():
        weight.data.normal_(0.0, 0.4)
    return attention


def rotations(cfg: Config, start: int, end: int) -> torch.Tensor:
    return phases(torch.arange(start, end)[None], frequencies(cfg))


def whole(attention: Attention, x: torch.Tensor) -> torch.Tensor:
    """Attend causally over all positions, without cache."""
    tokens = x.shape[1]
    mask = causal_mask(torch.arange(tokens)[None], torch.arange(tokens))
    return attention(x, rotations(attention.cfg, 0, tokens), mask)


def test_causal_mask_by_hand():
    mask = causal_mask(torch.tensor([[1, 2]]), torch.arange(4))
    assert mask.tolist() == [[[True, True, False, False], [True, True, True, False]]]


def test_document_mask_by_hand():
    """Documents 5 5 9: the third token sees itself alone."""
    mask = causal_mask(torch.arange(3)[None], torch.arange(3), torch.tensor([[5, 5, 9]]))
    expected = [[True, False, False], [True, True, False], [False, False, True]]
    assert mask.tolist() == [expected]


def test_attend_by_hand():
    """Scores 0, ln 3 and a masked one: weights of a quarter, three quarters, nothing."""
    q = torch.full((1, 1, 1, 1), 2.0)
    k = torch.tensor([0.0, math.log(3), 50.0]).reshape(1, 3, 1, 1)
    v = torch.eye(3).reshape(1, 3, 1, 3)
    mask = torch.tensor([True, True, False]).reshape(1, 1, 3)
    weight = attend(q, k, v, mask, scale=0.5).flatten()
    torch.testing.assert_close(weight, torch.tensor([0.25, 0.75, 0.0]), rtol=1e-6, atol=0)


def test_attend_shares_keys_by_hand():
    """Four heads on two keys' heads: 0 and 1 read the first, 2 and 3 the second."""
    v = torch.tensor([10.0, 20.0]).reshape(1, 1, 2, 1)
    o = attend(torch.zeros(1, 3, 4, 1), torch.zeros(1, 1, 2, 1), v, None, scale=1.0)
    assert o.tolist() == [[[[10.0], [10.0], [20.0], [20.0]]] * 3]


def test_weights_are_summed_in_fp32():
    """A BF16 sum of 512 equal terms stops growing at 256 of them."""
    k, v = torch.zeros(1, 512, 1, 4).bfloat16(), torch.ones(1, 512, 1, 4).bfloat16()
    o = attend(k[:, :1], k, v, None, scale=1.0)
    assert o.dtype == torch.bfloat16
    assert torch.equal(o, torch.ones_like(o))


def by_loop(q, k, v, mask, scale):
    """Return attention head by head and query by query, in FP64."""
    q, k, v = q.double(), k.double(), v.double()
    o = torch.empty(*q.shape[:3], v.shape[3], dtype=torch.float64)
    for b, t, h in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        g = h // (q.shape[2] // k.shape[2])
        seen = [s for s in range(k.shape[1]) if mask is None or mask[b, t, s]]
        weight = [math.exp((q[b, t, h] @ k[b, s, g]).item() * scale) for s in seen]
        total = sum(w * v[b, s, g] for w, s in zip(weight, seen, strict=True))
        o[b, t, h] = total / sum(weight)
    return o


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("value_dim", [3, 5, 8], ids="values {}".format)
@pytest.mark.parametrize("masked", [True, False])
def test_attend_equals_a_loop(groups: int, value_dim: int, masked: bool):
    """Values narrower than, as wide as and wider than keys."""
    q, k, v = (torch.randn(2, *s) for s in [(4, 6, 5), (7, groups, 5), (7, groups, value_dim)])
    mask = torch.rand(2, 4, 7) < 0.5 if masked else None
    if mask is not None:
        mask[..., 0] = True  # every query sees something
    expected = by_loop(q, k, v, mask, 0.3)
    torch.testing.assert_close(attend(q, k, v, mask, 0.3).double(), expected, **TOLERANCE)


@pytest.mark.parametrize("attn", ["mha", "gqa", "mqa"])
def test_equals_torch(attn: str):
    """torch's own attention, given each key head once for every query head that shares it."""
    cfg = config(attn)
    attention = drawn(cfg)
    x = torch.randn(2, 9, cfg.dim)
    phase, width = rotations(cfg, 0, 9), cfg.qk_nope_head_dim
    q = rotate(attention.w_q(x).reshape(2, 9, HEADS, width), phase)
    k = rotate(attention.w_k(x).reshape(2, 9, cfg.kv_heads, width), phase)
    v = attention.w_v(x).reshape(2, 9, cfg.kv_heads, cfg.v_head_dim)
    shared = HEADS // cfg.kv_heads
    k, v = k.repeat_interleave(shared, dim=2), v.repeat_interleave(shared, dim=2)
    o = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)), is_causal=True)
    expected = attention.w_o(o.transpose(1, 2).reshape(2, 9, -1))
    torch.testing.assert_close(whole(attention, x), expected, **TOLERANCE)


@pytest.mark.parametrize(("attn", "groups"), [("mqa", 1), ("mha", HEADS)])
def test_mqa_and_mha_are_the_ends_of_gqa(attn: str, groups: int):
    special, general = drawn(config(attn)), Attention(config("gqa", n_kv_heads=groups))
    general.load_state_dict(special.state_dict())
    x = torch.randn(2, 7, 20)
    assert torch.equal(whole(special, x), whole(general, x))


@pytest.mark.parametrize("attn", ["mha", "gqa", "mqa"])
@pytest.mark.parametrize("chunks", [[11], [1] * 11, [4, 1, 1, 5]])
def test_cache_equals_no_cache(attn: str, chunks: list[int]):
    cfg = config(attn)
    attention = drawn(cfg)
    x = torch.randn(2, 11, cfg.dim)
    cache = Cache(1, 2, 11, cfg.cache_dim, like=x)
    parts, start = [], 0
    for part in x.split(chunks, dim=1):
        end = start + part.shape[1]
        mask = causal_mask(torch.arange(start, end)[None], torch.arange(end))
        parts.append(attention(part, rotations(cfg, start, end), mask, cache.layer(0)))
        cache.advance(part.shape[1])
        start = end
    torch.testing.assert_close(torch.cat(parts, dim=1), whole(attention, x), **TOLERANCE)


@pytest.mark.parametrize(("attn", "numbers"), [("mha", 6 * 17), ("gqa", 2 * 17), ("mqa", 17)])
def test_cached_numbers(attn: str, numbers: int):
    """A key of 10 and a value of 7 for each key head; MHA's cache is 6 times MQA's."""
    assert config(attn).cache_dim == numbers


def test_causal():
    attention = drawn(config("gqa"))
    x = torch.randn(1, 6, 20)
    moved = x.clone()
    moved[:, 4] += 1.0
    before, after = whole(attention, x), whole(attention, moved)
    assert torch.equal(before[:, :4], after[:, :4])
    assert (before[:, 4:] != after[:, 4:]).any(-1).all()


def test_no_mask_sees_every_key():
    attention = drawn(config("gqa"))
    x, phase = torch.randn(1, 5, 20), rotations(config("gqa"), 0, 5)
    everything = torch.ones(1, 5, 5, dtype=torch.bool)
    assert torch.equal(attention(x, phase, None), attention(x, phase, everything))


@pytest.mark.parametrize("attn", ["mha", "gqa", "mqa"])
def test_gradients_reach_every_weight(attn: str):
    attention = drawn(config(attn))
    whole(attention, torch.randn(2, 5, 20)).square().sum().backward()
    for name, weight in attention.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        assert weight.grad.any(1).all(), f"a row of {name} has no gradient"
