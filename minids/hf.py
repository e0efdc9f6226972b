"""config.json: a Config in the published spelling, read and written.

Paper   the released config.json of DeepSeek-V3, V2 and V2-Lite (fact sheet 1.1, 1.2); not in the report.
Dims    none.
Book    book/01_count.ipynb             Kernel  none
Differs transformers reads `initializer_range` 0.02 for V3; the report (4.2) trained with 0.006. Read as given.
"""

from collections.abc import Mapping
from typing import Any

from minids.config import Config

_NAMES = dict(
    vocab_size="vocab_size", dim="hidden_size", n_layers="num_hidden_layers",
    n_dense_layers="first_k_dense_replace", inter_dim="intermediate_size",
    moe_inter_dim="moe_intermediate_size", n_heads="num_attention_heads",
    q_lora_rank="q_lora_rank", kv_lora_rank="kv_lora_rank", qk_nope_head_dim="qk_nope_head_dim",
    qk_rope_head_dim="qk_rope_head_dim", v_head_dim="v_head_dim",
    max_seq_len="max_position_embeddings", n_routed_experts="n_routed_experts",
    n_shared_experts="n_shared_experts", n_activated_experts="num_experts_per_tok",
    n_expert_groups="n_group", n_limited_groups="topk_group", norm_topk="norm_topk_prob",
    route_scale="routed_scaling_factor", norm_eps="rms_norm_eps", init_std="initializer_range",
    mtp_depth="num_nextn_predict_layers",
)  # fmt: skip
_ROPE = dict(original_seq_len="original_max_position_embeddings", rope_factor="factor",
             beta_fast="beta_fast", beta_slow="beta_slow", mscale="mscale_all_dim")  # fmt: skip
# keys that change the numbers, and the only value that this model computes
_FIXED = dict(
    hidden_act="silu", attention_bias=False, tie_word_embeddings=False, moe_layer_freq=1,
    rope_interleave=True, attention_dropout=0.0, num_mtp_layers=None,
)  # fmt: skip
# keys without numerical effect on a forward pass
_IGNORED = {
    "_name_or_path", "architectures", "auto_map", "aux_loss_alpha", "bos_token_id", "dtype",
    "eos_token_id", "ep_size", "head_dim", "num_key_value_heads", "output_router_logits",
    "pad_token_id", "pretraining_tp", "qk_head_dim", "seq_aux", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip
_V3 = dict(scoring_func="sigmoid", topk_method="noaux_tc", norm_topk_prob=True)
_V2 = dict(scoring_func="softmax", topk_method="group_limited_greedy", norm_topk_prob=False)


def from_hf(published: Mapping[str, Any]) -> Config:
    """Return the Config of a published config.json; ValueError names the first key that cannot be.

    Keys without numerical effect (`auto_map`, token ids, ...) are accepted, unknown ones refused.
    """
    given = dict(published)
    family = {"deepseek_v3": _V3, "deepseek_v2": _V2}.get(given.pop("model_type", None))
    if family is None:
        raise ValueError(f"model_type must be deepseek_v3 or deepseek_v2, got {published.get('model_type')!r}")
    given = family | given
    for key, only in _FIXED.items():
        if (value := given.pop(key, only)) != only and value is not None:
            raise ValueError(f"{key} must be {only!r}, got {value!r}")
    kv_heads = given.get("num_key_value_heads")
    if kv_heads not in (None, given.get("num_attention_heads")):
        raise ValueError(f"num_key_value_heads must equal num_attention_heads for MLA, got {kv_heads}")
    method = given.pop("topk_method")
    changes = _rope_fields(given) | _router_fields(given.pop("scoring_func"), method, given)
    changes["scale_fmt"] = _scale_format(given.pop("quantization_config", None))
    for field, key in _NAMES.items():
        if given.get(key) is not None:
            changes.setdefault(field, given[key])
        given.pop(key, None)
    if unknown := sorted(set(given) - _IGNORED):
        raise ValueError(f"unknown key {unknown[0]!r} = {given[unknown[0]]!r} in config.json")
    try:
        return Config(**changes)
    except TypeError as error:
        missing = _NAMES[str(error).split("'")[1]]
        raise ValueError(f"config.json lacks {missing}") from None


def _rope_fields(given: dict[str, Any]) -> dict[str, Any]:
    """Take the rotary settings out of `given`, in the spelling of either generation."""
    rope = dict(given.pop("rope_parameters", None) or given.pop("rope_scaling", None) or {})
    given.pop("rope_scaling", None)
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    theta = rope.pop("rope_theta", given.pop("rope_theta", 10_000.0))
    given.pop("rope_theta", None)
    fields: dict[str, Any] = {"rope_theta": float(theta)}
    if kind == "default":
        return fields | {"original_seq_len": given.get("max_position_embeddings", 4096)}
    if kind != "yarn":
        raise ValueError(f"rope type must be 'default' or 'yarn', got {kind!r}")
    whole = rope.get("mscale_all_dim")
    if not whole or rope.pop("mscale", whole) != whole:
        raise ValueError(f"YaRN needs mscale = mscale_all_dim, not 0, got {whole}")
    for field, key in _ROPE.items():
        if key in rope:
            fields[field] = rope.pop(key)
    if rope:
        raise ValueError(f"unknown rotary setting {min(rope)!r} = {rope[min(rope)]!r}")
    return fields


def _router_fields(score_func: str, method: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return how groups are scored; topk_method `greedy` has no groups."""
    scores = {"noaux_tc": "top2", "group_limited_greedy": "max", "greedy": "max"}
    if method not in scores:
        raise ValueError(f"topk_method must be one of {', '.join(scores)}, got {method!r}")
    if method == "greedy":
        given.update(n_group=1, topk_group=1)
    return {"score_func": score_func, "group_score": scores[method]}


def _scale_format(quantization: Mapping[str, Any] | None) -> str | None:
    """Check that a quantised checkpoint is in DeepSeek's FP8 layout; return its scale format."""
    wanted = dict(quant_method="fp8", fmt="e4m3", weight_block_size=[128, 128])
    for key, only in wanted.items():
        if quantization is not None and quantization.get(key, only) != only:
            raise ValueError(f"quantization_config: {key} must be {only}, got {quantization[key]!r}")
    return None if quantization is None else quantization.get("scale_fmt")


def to_hf(cfg: Config) -> dict[str, Any]:
    """Return the published config.json of a Config; ValueError for one that no published file can say."""
    if cfg.attn != "mla":
        raise ValueError(f"attn must be 'mla' to be published, got {cfg.attn!r}")
    sigmoid = cfg.score_func == "sigmoid"
    model_type, rules = ("deepseek_v3", _V3) if sigmoid else ("deepseek_v2", _V2)
    if cfg.group_score != ("top2" if sigmoid else "max"):
        raise ValueError(f"{model_type} has no group_score {cfg.group_score!r}")
    name = "DeepseekV3ForCausalLM" if sigmoid else "DeepseekV2ForCausalLM"
    out = {"architectures": [name], "model_type": model_type} | rules
    out |= {key: getattr(cfg, field) for field, key in _NAMES.items()}
    out |= {key: value for key, value in _FIXED.items() if value is not None}
    if not sigmoid and cfg.n_expert_groups == 1:
        out["topk_method"] = "greedy"
    out |= dict(
        num_key_value_heads=cfg.n_heads, q_lora_rank=cfg.q_lora_rank or None,
        rope_theta=cfg.rope_theta, rope_scaling=None, bos_token_id=0, eos_token_id=1,
        use_cache=True, torch_dtype="bfloat16" if cfg.precision != "fp32" else "float32",
    )  # fmt: skip
    if cfg.rope_factor != 1:
        yarn = {key: getattr(cfg, field) for field, key in _ROPE.items()}
        out["rope_scaling"] = {"type": "yarn", "mscale": cfg.mscale} | yarn
    return out
