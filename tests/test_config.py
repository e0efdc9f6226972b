"""minids/config.py: what is legal, what is said of the rest, and the published sizes."""

import dataclasses
import math
from collections.abc import Iterator

import jaxtyping
import pytest

from minids import PRESETS, Config, preset

TINY = dict(
    vocab_size=32, dim=8, n_layers=2, inter_dim=16, moe_inter_dim=8, n_heads=2, kv_lora_rank=4,
    qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=4,
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def as_in_use() -> Iterator[None]:
    """Wrong types must meet Config's own messages: in use no hook checks types before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        yield


def test_derived_values_by_hand():
    cfg = Config(**TINY, n_routed_experts=12, n_expert_groups=3)
    assert cfg.experts_per_group == 4
    assert (cfg.kv_heads, cfg.qk_head_dim, cfg.rotated_dim, cfg.cache_dim) == (2, 6, 2, 6)


@pytest.mark.parametrize(
    ("attn", "kv_heads", "cache_dim"), [("mha", 4, 32), ("gqa", 2, 16), ("mqa", 1, 8)]
)
def test_other_attention_rotates_the_whole_head(attn, kv_heads, cache_dim):
    """Each key and value head caches 4 + 4 numbers."""
    cfg = Config(**TINY | dict(n_heads=4, attn=attn, n_kv_heads=2))
    assert (cfg.kv_heads, cfg.cache_dim) == (kv_heads, cache_dim)
    assert (cfg.qk_head_dim, cfg.rotated_dim) == (4, 4)


# Fact sheet 1.1 and 1.2, by DeepSeek's own field names.
V3 = dict(
    vocab_size=129_280, dim=7168, n_layers=61, n_dense_layers=3, inter_dim=18_432,
    moe_inter_dim=2048, n_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128,
    qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=256, n_shared_experts=1,
    n_activated_experts=8, n_expert_groups=8, n_limited_groups=4, route_scale=2.5,
    score_func="sigmoid", norm_topk=True, group_score="top2", rope_theta=10_000, rope_factor=40,
    beta_fast=32, beta_slow=1, mscale=1.0, original_seq_len=4096, max_seq_len=163_840, mtp_depth=1,
    norm_eps=1e-6, init_std=0.006, bias_speed=0.001, seq_loss_alpha=1e-4, mtp_weight=0.3,
    precision="fp8", scale_fmt=None, attn="mla",
)  # fmt: skip
V2 = V3 | dict(
    vocab_size=102_400, dim=5120, n_layers=60, n_dense_layers=1, inter_dim=12_288,
    moe_inter_dim=1536, n_routed_experts=160, n_shared_experts=2, n_activated_experts=6,
    n_limited_groups=3, route_scale=16.0, score_func="softmax", norm_topk=False, group_score="max",
    mtp_depth=0, bias_speed=0.0, seq_loss_alpha=0.0, precision="bf16",
)  # fmt: skip
V2_LITE = V2 | dict(
    dim=2048, n_layers=27, inter_dim=10_944, moe_inter_dim=1408, n_routed_experts=64,
    n_expert_groups=1, n_limited_groups=1, route_scale=1.0, n_heads=16, q_lora_rank=0, mscale=0.707,
)  # fmt: skip
V3_LAYER = V3 | dict(n_layers=1, n_dense_layers=0, mtp_depth=0)


@pytest.mark.parametrize(
    ("name", "published"), [("v3", V3), ("v2", V2), ("v2_lite", V2_LITE), ("v3_layer", V3_LAYER)]
)
def test_published_presets_are_the_fact_sheet(name, published):
    found = dataclasses.asdict(preset(name))
    assert {key: found[key] for key in published} == published


def test_v3_ratios():
    """Fact sheet 1.6: the chosen and shared experts are as wide as a dense FFN."""
    cfg = preset("v3")
    assert (cfg.n_activated_experts + cfg.n_shared_experts) * cfg.moe_inter_dim == cfg.inter_dim
    assert (cfg.qk_head_dim, cfg.cache_dim, cfg.experts_per_group) == (192, 576, 32)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_legal(name):
    assert preset(name) == Config(**PRESETS[name])


def test_presets_are_the_designed_ones():
    assert list(PRESETS) == ["toy", "nano", "micro", "small", "v2_lite", "v2", "v3", "v3_layer"]


def test_preset_with_changes():
    assert preset("nano", n_layers=4).n_layers == 4
    assert preset("nano").n_layers == 2


def test_preset_errors():
    with pytest.raises(ValueError, match=r"^unknown preset 'v4'; choose one of toy, nano, .*v3"):
        preset("v4")
    with pytest.raises(ValueError, match=r"^unknown field 'layers'; Config has .*n_layers"):
        preset("nano", layers=4)
    with pytest.raises(ValueError, match="n_layers must be an integer >= 1, got 0"):
        preset("nano", n_layers=0)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset("nano").dim = 1  # pyright: ignore


LEGAL = {
    "one expert": dict(n_routed_experts=1, n_activated_experts=1),
    "one expert a group": dict(n_routed_experts=4, n_expert_groups=4, n_limited_groups=2),
    "top-k is all": dict(n_routed_experts=6, n_activated_experts=6),
    "top-k is all of the kept": dict(
        n_routed_experts=6, n_expert_groups=3, n_limited_groups=2, n_activated_experts=4
    ),
    "odd widths": dict(dim=7, inter_dim=3, moe_inter_dim=5, kv_lora_rank=3, v_head_dim=1),
    "odd content width": dict(qk_nope_head_dim=3),
    "all dense": dict(n_dense_layers=2),
    "no shared expert": dict(n_shared_experts=0),
    "no balancing": dict(bias_speed=0, seq_loss_alpha=0),
    "whole numbers for floats": dict(route_scale=2, rope_factor=4, mscale=1),
    "equal betas": dict(beta_fast=1.0, beta_slow=1.0),
    "power-of-two scales": dict(precision="fp8", scale_fmt="ue8m0"),
}


@pytest.mark.parametrize("case", LEGAL)
def test_legal(case):
    Config(**TINY | LEGAL[case])


ILLEGAL = {
    "attn": (dict(attn="full"), "attn must be one of .*'mla'.*, got 'full'"),
    "score": (dict(score_func="relu"), "score_func must be one of .*, got 'relu'"),
    "group score": (dict(group_score="sum"), "group_score must be one of .*, got 'sum'"),
    "precision": (dict(precision="fp16"), "precision must be one of .*, got 'fp16'"),
    "scale": (dict(scale_fmt="e4m3"), "scale_fmt must be one of .*, got 'e4m3'"),
    "not a bool": (dict(norm_topk=1), "norm_topk must be true or false, got 1"),
    "zero": (dict(dim=0), "dim must be an integer >= 1, got 0"),
    "negative": (dict(mtp_depth=-1), "mtp_depth must be an integer >= 0, got -1"),
    "fraction": (dict(n_layers=2.0), r"n_layers must be an integer >= 1, got 2\.0"),
    "true": (dict(n_layers=True), "n_layers must be an integer >= 1, got True"),
    "text": (dict(vocab_size="32"), "vocab_size must be an integer >= 1, got '32'"),
    "not a number": (dict(mtp_weight="0.3"), "mtp_weight must be a number, got '0.3'"),
    "flag": (dict(mtp_weight=True), "mtp_weight must be a number, got True"),
    "nan": (dict(route_scale=math.nan), "route_scale must be finite and not negative, got nan"),
    "inf": (dict(mscale=math.inf), "mscale must be finite and not negative, got inf"),
    "below 0": (dict(bias_speed=-0.1), "bias_speed must be finite and not negative, got -0.1"),
    "dense": (dict(n_dense_layers=3), "n_dense_layers must be at most n_layers, got 3 and 2"),
    "kept": (
        dict(n_limited_groups=2),
        "n_limited_groups must be at most n_expert_groups, got 2 and 1",
    ),
    "top-k": (
        dict(n_routed_experts=8, n_expert_groups=4, n_limited_groups=2, n_activated_experts=5),
        "n_activated_experts must be at most the kept groups' experts, got 5 and 4",
    ),
    "betas": (dict(beta_fast=1, beta_slow=2), "beta_slow must be at most beta_fast, got 2 and 1"),
    "factor": (dict(rope_factor=0.5), r"rope_factor, got 1 and 0\.5"),
    "groups": (
        dict(n_routed_experts=32, n_expert_groups=5),
        "n_routed_experts must be a multiple of n_expert_groups, got 32 and 5",
    ),
    "kv heads": (
        dict(attn="gqa", n_kv_heads=3, n_heads=4),
        "n_heads must be a multiple of n_kv_heads, got 4 and 3",
    ),
    "rotated": (dict(qk_rope_head_dim=3), "rotated width of a head must be a multiple of 2, got 3"),
    "rotated MHA": (dict(attn="mha", qk_nope_head_dim=3), "must be a multiple of 2, got 3"),
    "eps": (dict(norm_eps=0.0), r"norm_eps must be above 0, got 0\.0"),
    "init": (dict(init_std=0), "init_std must be above 0, got 0"),
    "theta": (dict(rope_theta=0), "rope_theta must be above 0, got 0"),
    "beta 0": (dict(beta_slow=0), "beta_slow must be above 0, got 0"),
}


@pytest.mark.parametrize("case", ILLEGAL)
def test_illegal(case):
    changes, message = ILLEGAL[case]
    with pytest.raises(ValueError, match=message):
        Config(**TINY | changes)


@pytest.mark.parametrize("field", dataclasses.fields(Config), ids=lambda field: field.name)
@pytest.mark.parametrize("wrong", [None, -1, "x", [], 10**400], ids=lambda wrong: f"{wrong!r:.5}")
def test_every_field_is_checked(field, wrong):
    """A wrong value of any field is a ValueError that names it (None is a scale_fmt)."""
    if (field.name, wrong) == ("scale_fmt", None) or (field.type is int and wrong == 10**400):
        return
    with pytest.raises(ValueError, match=f"^{field.name} must be"):
        Config(**TINY | {field.name: wrong})
