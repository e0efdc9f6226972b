import math

import pytest
import torch

from minids import Config, preset
from minids.attention import causal_mask
from minids.cache import Cache
from minids.mla import MLA, absorbing_is_cheaper
from minids.rope import frequencies, phases

# FP32 sums of a few dozen products in another order
TOLERANCE = dict(rtol=1e-5, atol=1e-5)
# the same in FP64, gradients of a few hundred included
EXACT = dict(rtol=1e-10, atol=1e-10)


def config(**changes) -> Config:
    return Config(**dict(
        vocab_size=8, dim=24, n_layers=1, inter_dim=8, moe_inter_dim=8, n_heads=3, q_lora_rank=10,
        kv_lora_rank=12, qk_nope_head_dim=7, qk_rope_head_dim=6, v_head_dim=5,
    ) | changes)  # fmt: skip


SHAPES = {
    "v3_like": {},
    "no_query_latent": dict(q_lora_rank=0),
    "one_head": dict(n_heads=1),
    "narrow": dict(kv_lora_rank=1, qk_nope_head_dim=1, qk_rope_head_dim=2, v_head_dim=1),
    "wide_latent": dict(kv_lora_rank=33, qk_nope_head_dim=3, v_head_dim=9),
    "yarn": dict(rope_factor=8.0, original_seq_len=4, mscale=0.707),
}
every_shape = pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)


def drawn(cfg: Config) -> MLA:
    mla = MLA(cfg)
    for name, weight in mla.named_parameters():
        weight.data.normal_(1.0 if name.endswith("gain") else 0.0, 0.4)
    return mla


def rotations(cfg: Config, start: int, end: int) -> torch.Tensor:
    return phases(torch.arange(start, end)[None], frequencies(cfg))


def whole(mla: MLA, x: torch.Tensor, absorb: bool | None = None) -> torch.Tensor:
    """Attend causally over all positions, without cache."""
    tokens = x.shape[1]
    mask = causal_mask(torch.arange(tokens)[None], torch.arange(tokens))
    return mla(x, rotations(mla.cfg, 0, tokens), mask, absorb=absorb)


def one_head() -> MLA:
    """One head, N 1, R 2, V 1, over a latent of 1: c_kv is the sign of x0 - x1, v is 5 c_kv."""
    mla = MLA(config(dim=2, n_heads=1, q_lora_rank=0, kv_lora_rank=1, qk_nope_head_dim=1,
                     qk_rope_head_dim=2, v_head_dim=1, norm_eps=1e-12))  # fmt: skip
    mla.w_q.weight.data = torch.zeros(3, 2)
    mla.w_dkv.weight.data = torch.tensor([[1.0, -1.0], [0.0, 0.0], [0.0, 0.0]])
    mla.w_ukv.weight.data = torch.tensor([[1.0], [5.0]])
    mla.w_o.weight.data = torch.tensor([[1.0], [2.0]])
    return mla


@pytest.mark.parametrize("absorb", [False, True])
def test_by_hand_content(absorb: bool):
    """The second query scores +ln(3)/2 on key 1 and -ln(3)/2 on key -1: weights 3/4 and 1/4."""
    mla = one_head()
    mla.w_q.weight.data[0, 1] = math.sqrt(3) * math.log(3) / 2  # 1/sqrt(N + R) is 1/sqrt(3)
    y = whole(mla, torch.eye(2)[None], absorb)
    expected = torch.tensor([[[5.0, 10.0], [2.5, 5.0]]])  # 3/4 * 5 - 1/4 * 5 = 2.5
    torch.testing.assert_close(y, expected, **TOLERANCE)


@pytest.mark.parametrize("absorb", [False, True])
def test_by_hand_rotary(absorb: bool):
    """One step apart turns by one radian: a score of ln(3) cos(1) / cos(1) against 0."""
    mla = one_head()
    mla.w_dkv.weight.data[1, 0] = 1.0  # the first token's key is (1, 0), the second's (0, 0)
    mla.w_q.weight.data[1, 1] = math.sqrt(3) * math.log(3) / math.cos(1)
    y = whole(mla, torch.eye(2)[None], absorb)
    torch.testing.assert_close(y, torch.tensor([[[5.0, 10.0], [2.5, 5.0]]]), **TOLERANCE)


def by_equations(mla: MLA, x: torch.Tensor) -> torch.Tensor:
    """Eqs. 1-11 for one sequence, token by token and head by head, in FP64."""
    cfg, w = mla.cfg, {name: weight.detach().double() for name, weight in mla.named_parameters()}
    n, r, v, c = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim, cfg.kv_lora_rank
    mscale = 0.1 * cfg.mscale * math.log(cfg.rope_factor) + 1
    freq = frequencies(cfg).double()

    def norm(vector, gain):
        return gain * vector / (vector.square().mean() + cfg.norm_eps).sqrt()

    def turn(vector, position):
        out = torch.empty_like(vector)
        for k in range(r // 2):
            cos, sin = (freq[k] * position).cos(), (freq[k] * position).sin()
            even, odd = vector[2 * k], vector[2 * k + 1]
            out[2 * k], out[2 * k + 1] = even * cos - odd * sin, even * sin + odd * cos
        return out

    keys, values, outputs = [], [], []
    for t, h in enumerate(x.double()):
        down = w["w_dkv.weight"] @ h
        c_kv, k_rope = norm(down[:c], w["kv_norm.gain"]), turn(down[c:], t)
        up = (w["w_ukv.weight"] @ c_kv).reshape(cfg.n_heads, n + v)
        keys.append([torch.cat([head[:n], k_rope]) for head in up])
        values.append([head[n:] for head in up])
        if cfg.q_lora_rank:
            q = w["w_uq.weight"] @ norm(w["w_dq.weight"] @ h, w["q_norm.gain"])
        else:
            q = w["w_q.weight"] @ h
        heads = []
        for i, query in enumerate(q.reshape(cfg.n_heads, n + r)):
            query = torch.cat([query[:n], turn(query[n:], t)])
            score = torch.stack([query @ keys[j][i] for j in range(t + 1)])
            weight = (score * mscale**2 / math.sqrt(n + r)).softmax(0)
            heads.append(sum(weight[j] * values[j][i] for j in range(t + 1)))
        outputs.append(w["w_o.weight"] @ torch.cat(heads))
    return torch.stack(outputs)


@every_shape
@pytest.mark.parametrize("absorb", [False, True])
def test_equals_the_equations(changes: dict, absorb: bool):
    mla = drawn(config(**changes))
    x = torch.randn(2, 9, mla.cfg.dim)
    expected = torch.stack([by_equations(mla, row) for row in x]).float()
    torch.testing.assert_close(whole(mla, x, absorb), expected, **TOLERANCE)


@every_shape
@pytest.mark.parametrize("tokens", [1, 2, 13])
def test_naive_equals_absorbed(changes: dict, tokens: int):
    """Outputs, and the gradients of every weight and of the input, in FP64."""
    mla = drawn(config(**changes)).double()
    x = torch.randn(2, tokens, mla.cfg.dim, requires_grad=True, dtype=torch.float64)
    weights = [x, *mla.parameters()]
    outputs, grads = [], []
    for absorb in (False, True):
        outputs.append(whole(mla, x, absorb))
        grads.append(torch.autograd.grad(outputs[-1].square().sum(), weights))
    torch.testing.assert_close(outputs[0], outputs[1], **EXACT)
    for naive, absorbed in zip(*grads, strict=True):
        torch.testing.assert_close(naive, absorbed, **EXACT)


@every_shape
@pytest.mark.parametrize("absorb", [False, True, None])
@pytest.mark.parametrize("chunks", [[11], [1] * 11, [4, 1, 1, 5]], ids=str)
def test_cache_equals_no_cache(changes: dict, absorb: bool | None, chunks: list[int]):
    mla = drawn(config(**changes))
    cfg = mla.cfg
    x = torch.randn(2, 11, cfg.dim)
    cache = Cache(1, 2, 11, cfg.cache_dim, like=x)
    parts, start = [], 0
    for part in x.split(chunks, dim=1):
        end = start + part.shape[1]
        mask = causal_mask(torch.arange(start, end)[None], torch.arange(end))
        parts.append(mla(part, rotations(cfg, start, end), mask, cache.layer(0), absorb))
        cache.advance(part.shape[1])
        start = end
    torch.testing.assert_close(torch.cat(parts, dim=1), whole(mla, x, False), **TOLERANCE)


# Fact sheet 2.2, FLOPs of one V3 layer: of a pair of tokens in either form, and of expanding one
# cached latent, which is as much as absorbing one query.
NAIVE_PAIR, ABSORBED_PAIR, EXPAND_OR_ABSORB = 81_920, 278_528, 33_554_432


@pytest.mark.parametrize("queries", [1, 2, 64, 200, 1000, 4096])
def test_choice_follows_the_golden_flops(queries: int):
    """At every number of keys around the one where the forms cost the same."""
    each = ABSORBED_PAIR - NAIVE_PAIR
    # queries * A + queries * keys * each = keys * A: past 170 queries absorbing never pays
    spare = EXPAND_OR_ABSORB - queries * each
    crossing = int(queries * EXPAND_OR_ABSORB / spare) if spare > 0 else 100_000
    for keys in (queries, crossing - 1, crossing, crossing + 1, crossing + 2, 1_000_000):
        absorbed = queries * EXPAND_OR_ABSORB + queries * keys * ABSORBED_PAIR
        naive = keys * EXPAND_OR_ABSORB + queries * keys * NAIVE_PAIR
        assert absorbing_is_cheaper(preset("v3"), queries, keys) == (absorbed < naive)


def test_choice_is_not_always_the_same():
    """V3 absorbs to decode after the first token, and expands to prefill."""
    v3 = preset("v3")
    assert not absorbing_is_cheaper(v3, 1, 1)
    assert absorbing_is_cheaper(v3, 1, 2)
    assert absorbing_is_cheaper(v3, 2, 100_000)
    assert not absorbing_is_cheaper(v3, 4096, 4096)
    assert not absorbing_is_cheaper(v3, 171, 100_000)
    assert absorbing_is_cheaper(v3, 170, 100_000)


@pytest.mark.parametrize("queries", [1, 40])
def test_forward_takes_the_cheaper_form(queries: int):
    mla = drawn(config())
    x = torch.randn(1, queries, 24)
    output = {}
    for absorb in (False, True, None):
        cache = Cache(1, 1, 100, mla.cfg.cache_dim, like=x)
        cache.store.normal_(generator=torch.Generator().manual_seed(1))
        cache.advance(60)
        phase = rotations(mla.cfg, 60, 60 + queries)
        output[absorb] = mla(x, phase, None, cache.layer(0), absorb)
    assert not torch.equal(output[False], output[True]), "the two forms round differently"
    cheaper = absorbing_is_cheaper(mla.cfg, queries, 60 + queries)
    assert cheaper == (queries == 1)
    assert torch.equal(output[None], output[cheaper])


def test_documents_do_not_see_each_other():
    """Packed with a mask, each document comes out as when run alone: only distances matter."""
    mla = drawn(config())
    x = torch.randn(1, 9, 24)
    documents = torch.tensor([[3, 3, 3, 3, 7, 7, 7, 7, 7]])
    mask = causal_mask(torch.arange(9)[None], torch.arange(9), documents)
    for absorb in (False, True):
        packed = mla(x, rotations(mla.cfg, 0, 9), mask, absorb=absorb)
        alone = torch.cat([whole(mla, x[:, :4]), whole(mla, x[:, 4:])], dim=1)
        torch.testing.assert_close(packed, alone, **TOLERANCE)


@pytest.mark.parametrize("absorb", [False, True])
def test_scaling_a_down_projection_changes_nothing(absorb: bool):
    """Both latents are normalised: the size of W^DKV's latent rows and of W^DQ is divided out."""
    mla = drawn(config(norm_eps=1e-12))
    x = torch.randn(1, 6, 24)
    before = whole(mla, x, absorb)
    mla.w_dkv.weight.data[: mla.cfg.kv_lora_rank] *= 8
    mla.w_dq.weight.data *= 4
    torch.testing.assert_close(whole(mla, x, absorb), before, **TOLERANCE)
    mla.w_dkv.weight.data[mla.cfg.kv_lora_rank :] *= 8  # the rotary key is not normalised
    assert not torch.allclose(whole(mla, x, absorb), before, rtol=0.01, atol=0.01)


def test_rotary_key_bypasses_the_latent():
    """It comes from x by its own rows of W^DKV: cut the latent, and it still follows x."""
    mla = drawn(config())
    width = mla.cfg.kv_lora_rank
    x = torch.randn(1, 4, 24, requires_grad=True)
    k_rope = mla.latents(x, rotations(mla.cfg, 0, 4))[..., width:]
    k_rope.square().sum().backward()
    assert x.grad is not None
    assert x.grad.any(-1).all()
    assert mla.kv_norm.gain.grad is None or not mla.kv_norm.gain.grad.any()
    assert mla.w_dkv.weight.grad is not None
    assert not mla.w_dkv.weight.grad[:width].any()
    assert mla.w_dkv.weight.grad[width:].any(1).all()


def test_one_rotary_key_serves_all_heads():
    """What is cached does not grow with heads: C + R numbers, 576 for V3."""
    for heads in (1, 3, 8):
        mla = drawn(config(n_heads=heads))
        latent = mla.latents(torch.randn(1, 4, 24), rotations(mla.cfg, 0, 4))
        assert latent.shape == (1, 4, 12 + 6)
    assert preset("v3").cache_dim == 576


def test_the_cache_holds_the_normalised_latent_and_the_turned_key():
    mla = drawn(config())
    mla.kv_norm.gain.data.fill_(1.0)
    x = torch.randn(2, 5, 24)
    cache = Cache(1, 2, 5, mla.cfg.cache_dim, like=x)
    mask = causal_mask(torch.arange(5)[None], torch.arange(5))
    mla(x, rotations(mla.cfg, 0, 5), mask, cache.layer(0))
    c_kv, k_rope = cache.store[0].split([12, 6], dim=-1)
    torch.testing.assert_close(c_kv.square().mean(-1), torch.ones(2, 5), **TOLERANCE)
    still = mla.w_dkv(x)[..., 12:]
    torch.testing.assert_close(k_rope[:, 0], still[:, 0], **TOLERANCE)
    torch.testing.assert_close(k_rope.norm(dim=-1), still.norm(dim=-1), **TOLERANCE)
    assert not torch.allclose(k_rope[:, 1:], still[:, 1:], rtol=0.01)


@every_shape
def test_causal(changes: dict):
    mla = drawn(config(**changes))
    x = torch.randn(1, 6, 24)
    moved = x.clone()
    moved[:, 4] = torch.randn(24)
    before, after = whole(mla, x), whole(mla, moved)
    assert torch.equal(before[:, :4], after[:, :4])
    assert (before[:, 4:] != after[:, 4:]).any(-1).all()


@every_shape
@pytest.mark.parametrize("absorb", [False, True])
def test_gradients_reach_every_weight(changes: dict, absorb: bool):
    mla = drawn(config(**changes))
    whole(mla, torch.randn(2, 5, 24), absorb).square().sum().backward()
    for name, weight in mla.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        assert weight.grad.flatten(1 if weight.ndim > 1 else 0).any(), name


def test_v3_parameter_count():
    """Fact sheet 1.4: 187,107,328 in one layer's attention; V2-Lite, without W^DQ, 13,763,072."""
    with torch.device("meta"):
        counts = [
            sum(weight.numel() for weight in MLA(preset(name)).parameters())
            for name in ("v3", "v2", "v2_lite")
        ]
    assert counts == [187_107_328, 149_227_520, 13_763_072]


def test_absorbing_is_off_in_fp8_training(monkeypatch):
    """An absorbed matrix is no product of Figure 6; what is asked for by name is done, though."""
    calls = []
    for attend in (MLA.attend_naive, MLA.attend_absorbed):

        def spy(*given, attend=attend):
            calls.append(attend.__name__)
            return attend(*given)

        monkeypatch.setattr(MLA, attend.__name__, spy)
    cfg, x = config(kv_lora_rank=4, precision="fp8"), torch.randn(2, 6, 24)
    mla, plain = drawn(cfg), MLA(config(kv_lora_rank=4))
    plain.load_state_dict(mla.state_dict())
    assert absorbing_is_cheaper(cfg, 6, 6)
    y = whole(mla, x)
    y.sin().sum().backward()
    exact = whole(plain, x)
    assert 0.01 < ((y - exact).norm() / exact.norm()).item() < 0.2
    assert torch.equal(whole(mla.eval(), x), exact)
    whole(mla.train(), x, absorb=True)
    assert calls == ["attend_naive", "attend_absorbed", "attend_absorbed", "attend_absorbed"]
    assert all(weight.grad.any() and weight.grad.isfinite().all() for weight in mla.parameters())
