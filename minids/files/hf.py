"""config.json: a Config in the published spelling, read and written.

Paper   the released config.json of DeepSeek-V3, V2 and V2-Lite; no report.
Dims    none.
Book    book/01_count.ipynb             Kernel  none
Differs what no published key says (bias_speed, mtp_weight, ...) is written under a key of our own,
        `minids`, where it is not what the rest is read as; other readers pass over it.
        `initializer_range` is read as given: 0.02 in V3's file, 0.006 in the report (4.2).
        transformers' V2 class ignores `norm_topk_prob`, this model does not.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, fields
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
_OPTIONAL = dict(num_nextn_predict_layers=0, rms_norm_eps=1e-6, initializer_range=0.02)
# keys that change the numbers, and the only value that this model computes
_FIXED = dict(hidden_act="silu", attention_bias=False, tie_word_embeddings=False, moe_layer_freq=1,
              attention_dropout=0.0)  # fmt: skip
_FIXED_UNPUBLISHED = dict(rope_interleave=True, mlp_bias=False)  # in transformers' files alone
# keys without numerical effect on a forward pass
_IGNORED = {
    "_name_or_path", "architectures", "auto_map", "aux_loss_alpha", "bos_token_id", "eos_token_id",
    "ep_size", "head_dim", "num_key_value_heads", "output_router_logits", "pad_token_id",
    "pretraining_tp", "qk_head_dim", "seq_aux", "transformers_version", "use_cache",
}  # fmt: skip
_OWN = {"bias_speed", "seq_loss_alpha", "aux_loss_alpha", "mtp_weight", "precision", "scale_fmt",
        "n_kv_heads"}  # fmt: skip
_V3 = dict(scoring_func="sigmoid", topk_method="noaux_tc", norm_topk_prob=True)
_V2 = dict(scoring_func="softmax", topk_method="group_limited_greedy", norm_topk_prob=False)
_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
_FP8 = dict(activation_scheme="dynamic", fmt="e4m3", quant_method="fp8",
            weight_block_size=[128, 128])  # fmt: skip


def from_hf(published: Mapping[str, Any]) -> Config:
    """Return the Config of a published config.json; ValueError names the first key that cannot be.

    Keys without numerical effect (`auto_map`, token ids, ...) are accepted, unknown ones refused.
    Rotary settings are read in both spellings, `rope_scaling` and `rope_parameters`.
    """
    if not isinstance(published, Mapping):
        raise ValueError(f"config.json must be an object, got {published!r:.80}")
    given = dict(published)
    family = _choose("model_type", given.pop("model_type", None), "deepseek_v3", "deepseek_v2")
    given = (_V3 if family == "deepseek_v3" else _V2) | _OPTIONAL | given
    for key, only in (_FIXED | _FIXED_UNPUBLISHED).items():
        if (value := given.pop(key, only)) != only and (only or value):
            raise ValueError(f"{key} must be {only!r}, got {value!r:.80}")
    if (heads := given.get("num_key_value_heads")) not in (None, given.get("num_attention_heads")):
        raise ValueError(f"num_key_value_heads must equal num_attention_heads, got {heads!r:.80}")
    changes = _rope_fields(given) | _router_fields(given, family) | _precision_fields(given)
    for key in ("q_lora_rank", "n_shared_experts"):
        if key in given and given[key] is None:
            given[key] = 0  # null says that there is none
    changes |= {field: given.pop(key, None) for field, key in _NAMES.items()}
    own = given.pop("minids", {})
    if unknown := sorted(given.keys() - _IGNORED):
        raise ValueError(f"unknown key {unknown[0]!r} = {given[unknown[0]]!r:.80} in config.json")
    try:
        silent = _without_effect(Config(**changes))  # an absent key is None here
        if not isinstance(own, dict) or own.keys() - silent:
            raise ValueError(f"minids may hold {sorted(silent)} for these keys, got {own!r:.80}")
        return Config(**changes | own)
    except ValueError as error:  # say it in the words of the file
        names = _NAMES | _ROPE
        words = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), str(error))
        raise ValueError(words) from None


def _without_effect(cfg: Config) -> set[str]:
    """Name the fields that no published key holds and a forward pass of `cfg` does not read."""
    rope = _ROPE.keys() - {"rope_factor"} if cfg.rope_factor == 1 else set()
    return _OWN | rope | ({"group_score"} if cfg.n_limited_groups == cfg.n_expert_groups else set())


def _choose(key: str, value: Any, *choices: str) -> str:
    if value not in choices:
        raise ValueError(f"{key} must be one of {', '.join(choices)}, got {value!r:.80}")
    return value


def _rope_fields(given: dict[str, Any]) -> dict[str, Any]:
    """Take the rotary settings out of `given`, in the spelling of either generation."""
    new, old = given.pop("rope_parameters", None), given.pop("rope_scaling", None)
    rope = old if new is None else new
    if not isinstance(rope, dict | None) or (new is not None and old is not None):
        raise ValueError(f"rope_scaling or rope_parameters must be one object, got {rope!r:.80}")
    rope = {"rope_theta": given.pop("rope_theta", 10_000.0)} | (rope or {})
    kind = rope.pop("type", "default")
    kind = _choose("rope type", rope.pop("rope_type", kind), "default", "yarn")
    found = {"rope_theta": rope.pop("rope_theta")}
    if kind == "default":
        found["original_seq_len"] = given.get("max_position_embeddings")
    else:
        rope = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": None} | rope
        if not rope["mscale"] or rope.pop("mscale") != rope.get("mscale_all_dim"):
            raise ValueError(f"yarn needs mscale = mscale_all_dim, not 0, got {rope!r:.200}")
        found |= {field: rope.pop(key, None) for field, key in _ROPE.items()}
    if rope:
        raise ValueError(f"unknown rotary settings {rope!r:.80} for rope type {kind!r}")
    return found


def _router_fields(given: dict[str, Any], family: str) -> dict[str, Any]:
    """Take out how experts and groups are scored; topk_method `greedy` has no groups."""
    method, score = given.pop("topk_method"), given.pop("scoring_func")
    if family == "deepseek_v3":
        _choose("topk_method", method, "noaux_tc")
        return dict(score_func=_choose("scoring_func", score, "sigmoid"), group_score="top2")
    if _choose("topk_method", method, "group_limited_greedy", "greedy") == "greedy":
        given.update(n_group=1, topk_group=1)
    score = _choose("scoring_func", score, "softmax")
    return dict(score_func=score, group_score="max", bias_speed=0.0, seq_loss_alpha=0.0)


def _precision_fields(given: dict[str, Any]) -> dict[str, Any]:
    """Take out how weights are stored; a quantised file must be in DeepSeek's FP8 layout."""
    old, quantised = given.pop("torch_dtype", None), given.pop("quantization_config", None)
    dtype = _choose("torch_dtype", given.pop("dtype", None) or old or "float32", *_DTYPES)
    if quantised is None:
        return {"precision": _DTYPES[dtype]}
    read = dict(fmt="e4m3") | quantised if isinstance(quantised, dict) else {}
    if _FP8 != {key: read.get(key) for key in _FP8}:
        raise ValueError(f"quantization_config must hold {_FP8}, got {quantised!r:.200}")
    scale_fmt = read.get("scale_fmt")  # transformers leaves `fmt` out and calls FP32 "float"
    return {"precision": "fp8", "scale_fmt": None if scale_fmt == "float" else scale_fmt}


def to_hf(cfg: Config, stored: str | None = None) -> dict[str, Any]:
    """Return the published config.json of a Config, weights `stored` as "fp32", "bf16" or "fp8".

    By default they are stored in the precision of training. ValueError for a Config that no file of
    its family can say: other attention than MLA, the other family's group score.
    """
    if cfg.attn != "mla":
        raise ValueError(f"attn must be 'mla' to be published, got {cfg.attn!r}")
    stored = _choose("stored", stored or cfg.precision, "fp32", "bf16", "fp8")
    v3 = cfg.score_func == "sigmoid"
    family, name = ("deepseek_v3", "DeepseekV3") if v3 else ("deepseek_v2", "DeepseekV2")
    if cfg.group_score != ("top2" if v3 else "max") and "group_score" not in _without_effect(cfg):
        raise ValueError(f"group_score cannot be published as {family}, got {cfg.group_score!r}")
    values = asdict(cfg)
    values |= {f.name: float(values[f.name]) for f in fields(cfg) if f.type is float}  # 1 is 1.0
    out = {"architectures": [f"{name}ForCausalLM"], "model_type": family}
    out |= (_V3 if v3 else _V2) | _FIXED | {key: values[field] for field, key in _NAMES.items()}
    if not v3 and cfg.n_expert_groups == 1:
        out["topk_method"] = "greedy"
    out |= dict(
        num_key_value_heads=cfg.n_heads, q_lora_rank=cfg.q_lora_rank or None,
        rope_theta=values["rope_theta"], rope_scaling=None, bos_token_id=0, eos_token_id=1,
        use_cache=True, torch_dtype="float32" if stored == "fp32" else "bfloat16",
    )  # fmt: skip
    if cfg.rope_factor != 1:
        out["rope_scaling"] = {"type": "yarn", "mscale": values["mscale"]}
        out["rope_scaling"] |= {key: values[field] for field, key in _ROPE.items()}
    if stored == "fp8":
        out["quantization_config"] = _FP8 | ({"scale_fmt": cfg.scale_fmt} if cfg.scale_fmt else {})
    read = asdict(from_hf(out))
    own = {field: value for field, value in values.items() if read[field] != value}
    return out | ({"minids": own} if own else {})
