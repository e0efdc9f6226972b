"""Any legal config: causal, cache = no cache, naive = absorbed, gradients, experts permuted.

Widths are odd, one token, one expert, one expert a group, top-k = all experts and batch 1 included.
Weights are large (std 0.5) and random, so that scores neither tie nor hide behind small numbers.
"""

from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from einops import rearrange
from hypothesis import event, given, settings

from minids import Config, Transformer
from minids.attention import causal_mask
from minids.fp8 import BLOCK, TILE, dequantise, quantise, scaled_matmul
from minids.moe import MoE
from minids.rope import phases

# Relative norm in FP64. The same products are rounded elsewhere (other tokens sort the experts'
# rows otherwise, the absorbed form multiplies in another order), and some blocks amplify that.
FP64 = 1e-9
EXAMPLES = 40
LONGEST = 9  # tokens of a row


@st.composite
def configs(draw, **fixed) -> Config:
    """Draw a legal config; `fixed` fields are not drawn."""
    small = st.integers(1, 5)
    groups, size = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    kept, layers = draw(st.integers(1, groups)), draw(st.integers(1, 3))
    attn = fixed.get("attn") or draw(st.sampled_from(["mla", "mla", "mla", "mha", "gqa", "mqa"]))
    heads = draw(st.integers(1, 4))
    fields = dict(
        vocab_size=draw(st.integers(3, 17)),
        dim=draw(st.integers(2, 11)),
        n_layers=layers,
        n_dense_layers=draw(st.integers(0, layers)),
        inter_dim=draw(small),
        moe_inter_dim=draw(small),
        attn=attn,
        n_heads=heads,
        n_kv_heads=draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0])),
        q_lora_rank=draw(st.sampled_from([0, 1, 3, 6])),
        kv_lora_rank=draw(st.integers(1, 7)),
        qk_nope_head_dim=draw(small) * (1 if attn == "mla" else 2),  # the others rotate it
        qk_rope_head_dim=2 * draw(st.integers(1, 4)),
        v_head_dim=draw(st.integers(1, 7)),
        original_seq_len=8,
        max_seq_len=32,
        rope_factor=draw(st.sampled_from([1.0, 4.0])),
        n_routed_experts=groups * size,
        n_expert_groups=groups,
        n_limited_groups=kept,
        n_activated_experts=draw(st.sampled_from([1, kept * size]) | st.integers(1, kept * size)),
        n_shared_experts=draw(st.integers(0, 2)),
        score_func=draw(st.sampled_from(["sigmoid", "softmax"])),
        norm_topk=draw(st.booleans()),
        group_score=draw(st.sampled_from(["top2", "max"])),
        route_scale=draw(st.sampled_from([1.0, 2.5])),
        seq_loss_alpha=0.0,
        mtp_depth=draw(st.integers(0, 2)),
        init_std=0.5,
    )
    return Config(**fields | fixed)


def build(cfg: Config, seed: int) -> Transformer:
    """Build a model in FP64, with random gains and routing biases (some scores negative)."""
    model = Transformer(cfg, seed=seed).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("gain"):
                weight.uniform_(0.5, 1.5, generator=generator)
        for router in model.routers:
            if router.bias is not None:
                router.bias.normal_(-0.5, 0.5, generator=generator)
    return model


def words(model: Transformer, batch: int, length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.cfg.vocab_size, (batch, length), generator=generator)


def assert_near(one: torch.Tensor, other: torch.Tensor) -> None:
    assert one.shape == other.shape
    assert (one - other).norm() <= FP64 * other.norm()


seeds = st.integers(0, 999)
batches = st.integers(1, 3)
lengths = st.integers(1, LONGEST)
drawn = settings(derandomize=True, deadline=None, database=None, max_examples=EXAMPLES)


@drawn
@given(cfg=configs(), seed=seeds, batch=batches, length=lengths, data=st.data())
def test_causal(cfg, seed, batch, length, data):
    model = build(cfg, seed)
    ids = words(model, batch, length, seed)
    t = data.draw(st.integers(0, length - 1), label="changed token")
    changed = ids.clone()
    changed[:, t] = (changed[:, t] + 1) % cfg.vocab_size
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert_near(after[:, :t], before[:, :t])
    assert not after[:, t].equal(before[:, t])  # the change is seen where it may be


@drawn
@given(cfg=configs(), seed=seeds, batch=batches, length=lengths, data=st.data())
def test_cache_equals_no_cache(cfg, seed, batch, length, data):
    model = build(cfg, seed)
    ids = words(model, batch, length, seed)
    cuts = data.draw(st.sets(st.integers(1, length - 1)) if length > 1 else st.just(set()))
    bounds = [0, *sorted(cuts), length]
    cache = model.new_cache(batch, capacity=length)
    with torch.no_grad():
        pieces = [model(ids[:, start:end], cache=cache) for start, end in pairwise(bounds)]
        assert_near(torch.cat(pieces, dim=1), model(ids))
    assert cache.lengths == [length] * batch


@drawn
@given(cfg=configs(attn="mla"), seed=seeds, batch=batches, length=lengths)
def test_naive_equals_absorbed(cfg, seed, batch, length):
    model = build(cfg, seed)
    x = torch.randn(batch, length, cfg.dim, generator=torch.manual_seed(seed)).double()
    at = torch.arange(length)[None]
    inputs = (x, phases(at, model.freq), causal_mask(at, at[0]), None)
    with torch.no_grad():
        for block in model.layers:
            assert_near(block.attn(*inputs, absorb=True), block.attn(*inputs, absorb=False))


def silent(model: Transformer, length: int) -> set[str]:
    """Name the weights whose gradient may be exactly zero, or rounding alone, by the equations.

    Attention over one key has weight 1 whatever its score: query weights learn nothing from it, nor
    do weights of keys. A latent of width 1 keeps its sign alone after its norm: its down-projection
    learns nothing. One chosen expert, normalised, weighs 1 whatever its score, as does the only
    expert under softmax; and softmax scores normalised over all experts have sum 1: the router
    learns nothing.
    """
    cfg, names = model.cfg, set()
    blocks = [(f"layers.{n}", length) for n in range(cfg.n_layers)]
    blocks += [(f"mtp.{k}.block", length - k - 1) for k in range(cfg.mtp_depth)]
    for name, keys in blocks:
        if keys == 1:
            names |= {f"{name}.attn.{part}" for part in QUERY_PARTS}
        if cfg.q_lora_rank == 1:
            names.add(f"{name}.attn.w_dq.weight")
        if cfg.kv_lora_rank == 1 and keys == 1:
            names.add(f"{name}.attn.w_dkv.weight")  # else its rotary rows learn
        constant = cfg.norm_topk and cfg.n_activated_experts == 1
        if constant or (cfg.score_func == "softmax" and cfg.n_routed_experts == 1):
            names.add(f"{name}.ffn.router.centroids")
    return names


QUERY_PARTS = ("w_q.weight", "w_k.weight", "w_dq.weight", "q_norm.gain", "w_uq.weight")


@drawn
@given(cfg=configs(), seed=seeds, batch=batches, extra=st.integers(0, 4))
def test_finite_gradients_reach_every_weight(cfg, seed, batch, extra):
    # Experts no token chose, and the centroids of those (sigmoid), have gradients of exactly zero.
    model = build(cfg, seed)
    length = 1 + cfg.mtp_depth + extra  # tokens the main model reads
    losses = model.losses(words(model, batch, length + 1, seed))
    losses.total(mtp_weight=0.3).backward()
    excused = silent(model, length)
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        assert weight.grad.any() or name in excused, name
    mixtures = [(n, module) for n, module in model.named_modules() if isinstance(module, MoE)]
    for (name, moe), load in zip(mixtures, losses.load, strict=True):
        visited = load > 0
        for weight in (moe.experts.w_gate_up, moe.experts.w_down):
            assert weight.grad.flatten(1).any(-1).equal(visited), name
        taught = moe.router.centroids.grad.any(-1)
        if f"{name}.router.centroids" not in excused:
            assert taught[visited].all(), name
        if cfg.score_func == "sigmoid":
            assert not taught[~visited].any(), name
        event(f"experts without a token: {bool((~visited).any())}")


@drawn
@given(cfg=configs(n_dense_layers=0), seed=seeds, batch=batches, length=lengths)
def test_permuting_experts_changes_nothing(cfg, seed, batch, length):
    model = build(cfg, seed)
    ids = words(model, batch, length, seed)
    generator = torch.Generator().manual_seed(seed)
    groups, size = cfg.n_expert_groups, cfg.experts_per_group
    with torch.no_grad():
        before = model(ids)
        for block in model.layers:
            members = torch.stack(
                [torch.randperm(size, generator=generator) for _ in range(groups)]
            )
            members = members + size * torch.arange(groups)[:, None]
            members = members[torch.randperm(groups, generator=generator)]  # and whole groups
            order = rearrange(members, "g e -> (g e)")
            experts, router = block.ffn.experts, block.ffn.router
            moved = [experts.w_gate_up, experts.w_down, router.centroids, router.bias]
            for weight in moved:
                if weight is not None:
                    weight.copy_(weight[order])
        assert_near(model(ids), before)


@drawn
@given(shape=st.tuples(*[st.integers(1, 300)] * 3), seed=seeds, data=st.data())
def test_fp8_products_are_those_of_the_dequantised_operands(shape, seed, data):
    m, k, n = shape
    generator, groups = torch.manual_seed(seed), st.sampled_from([TILE, BLOCK])
    operands = [
        quantise(
            torch.randn(rows, k, generator=generator) * 2.0 ** data.draw(st.integers(-40, 40)),
            data.draw(groups),
            data.draw(st.sampled_from([None, "ue8m0"])),
        )
        for rows in (m, n)
    ]
    a, b = (dequantise(operand).double() for operand in operands)
    gap = (scaled_matmul(*operands) - a @ b.mT).norm()
    assert gap <= FP32 * (a @ b.mT).norm()


FP32 = 1e-6  # relative; three sums of at most 128 products, and their sum


@pytest.mark.slow
@settings(drawn, max_examples=15)
@given(cfg=configs(attn="mla", precision="fp8"), seed=seeds, batch=batches, extra=st.integers(0, 4))
def test_finite_gradients_reach_every_weight_in_fp8(cfg, seed, batch, extra):
    """As above; a gradient may also fall below E4M3's range, but not that of a whole matrix."""
    model = build(cfg, seed).float()
    length = 1 + cfg.mtp_depth + extra
    losses = model.losses(words(model, batch, length + 1, seed))
    losses.total(mtp_weight=0.3).backward()
    excused = silent(model, length)
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        assert weight.grad.any() or name in excused, name
    mixtures = [module for module in model.modules() if isinstance(module, MoE)]
    for moe, load in zip(mixtures, losses.load, strict=True):
        for weight in (moe.experts.w_gate_up, moe.experts.w_down):
            assert not weight.grad[load == 0].any()
