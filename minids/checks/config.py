"""What a Config refuses: a field of the wrong type or range, fields that do not go together.

Paper   none: rules of what can be computed.
Dims    none.
Book    book/01_count.ipynb             Kernel  none
"""

import sys
from dataclasses import fields

CHOICES = {
    "attn": ("mla", "mha", "gqa", "mqa"),
    "score_func": ("sigmoid", "softmax"),
    "group_score": ("top2", "max"),
    "precision": ("fp32", "bf16", "fp8"),
    "scale_fmt": (None, "ue8m0"),
}
MAY_BE_ZERO = {"n_dense_layers", "q_lora_rank", "n_shared_experts", "mtp_depth"}


def check_values(cfg) -> None:
    """Raise ValueError for a single field of the wrong type or out of its range."""
    for field in fields(cfg):
        name, value = field.name, getattr(cfg, field.name)
        if name in CHOICES:
            if value not in CHOICES[name]:
                raise ValueError(f"{name} must be one of {CHOICES[name]}, got {value!r}")
        elif field.type is bool:
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be true or false, got {value!r}")
        elif field.type is int:
            least = 0 if name in MAY_BE_ZERO else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
        elif not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{name} must be a number, got {value!r}")
        elif not 0 <= value <= sys.float_info.max:
            raise ValueError(f"{name} must be finite and not negative, got {value!r}")


def check_combinations(cfg) -> None:
    """Raise ValueError for fields that are legal alone and impossible together."""
    groups, kept = cfg.n_expert_groups, cfg.n_limited_groups * cfg.experts_per_group
    at_most = [
        ("n_dense_layers", cfg.n_dense_layers, "n_layers", cfg.n_layers),
        ("n_limited_groups", cfg.n_limited_groups, "n_expert_groups", groups),
        ("n_activated_experts", cfg.n_activated_experts, "the kept groups' experts", kept),
        ("beta_slow", cfg.beta_slow, "beta_fast", cfg.beta_fast),
        ("1", 1, "rope_factor", cfg.rope_factor),
    ]
    multiples = [
        ("n_heads", cfg.n_heads, "n_kv_heads", cfg.kv_heads),
        ("n_routed_experts", cfg.n_routed_experts, "n_expert_groups", groups),
        ("the rotated width of a head", cfg.rotated_dim, "2", 2),
    ]
    for name, value, limit, bound in at_most:
        if value > bound:
            raise ValueError(f"{name} must be at most {limit}, got {value} and {bound}")
    for name, value, divisor, by in multiples:
        if value % by:
            raise ValueError(f"{name} must be a multiple of {divisor}, got {value} and {by}")
    for name in ("norm_eps", "init_std", "rope_theta", "beta_slow"):
        if not getattr(cfg, name) > 0:
            raise ValueError(f"{name} must be above 0, got {getattr(cfg, name)}")
