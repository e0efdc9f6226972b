"""One frozen Config describes every model here, from a toy to the published 671B.

Paper   DeepSeek-V3 (arXiv:2412.19437), section 4.2; names of DeepSeek's inference/configs/*.json.
Dims    the fields below are the letters of every other module (D is `dim`, H is `n_heads`, ...).
Book    book/01_count.ipynb             Kernel  none
"""

from dataclasses import dataclass, fields, replace
from typing import Any

from minids.checks.config import check_combinations, check_values


@dataclass(frozen=True, kw_only=True)
class Config:
    """Shape and training constants of one model; an illegal combination raises ValueError here."""

    vocab_size: int
    dim: int  # D, the paper's d
    n_layers: int
    n_dense_layers: int = 0  # the first layers keep a dense FFN
    inter_dim: int  # F of a dense FFN
    moe_inter_dim: int  # F of one expert
    n_heads: int  # H, n_h
    # attention
    attn: str = "mla"
    n_kv_heads: int = 1  # read by attn="gqa" alone
    q_lora_rank: int = 0  # Q, d_c'; 0 = queries are not compressed
    kv_lora_rank: int  # C, d_c
    qk_nope_head_dim: int  # N, d_h
    qk_rope_head_dim: int  # R, d_h^R
    v_head_dim: int  # V
    # position
    rope_theta: float = 10_000.0
    original_seq_len: int = 4096  # tokens, before YaRN
    max_seq_len: int = 4096  # tokens
    rope_factor: float = 1.0  # s; 1 = no YaRN
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    # experts
    n_routed_experts: int = 1  # E, N_r
    n_shared_experts: int = 1  # N_s
    n_activated_experts: int = 1  # K, K_r
    n_expert_groups: int = 1  # G
    n_limited_groups: int = 1  # M
    score_func: str = "sigmoid"
    norm_topk: bool = True
    group_score: str = "top2"
    route_scale: float = 1.0
    # balance
    bias_speed: float = 0.001  # gamma
    seq_loss_alpha: float = 0.0001  # alpha
    aux_loss_alpha: float = 0.0  # the classical loss, for comparison
    # multi-token prediction
    mtp_depth: int = 0  # the paper's D
    mtp_weight: float = 0.3  # lambda
    # numerics
    norm_eps: float = 1e-6
    init_std: float = 0.006
    precision: str = "fp32"  # of training
    scale_fmt: str | None = None  # of FP8 scales

    def __post_init__(self):
        check_values(self)
        check_combinations(self)

    @property
    def experts_per_group(self) -> int:
        return self.n_routed_experts // self.n_expert_groups

    @property
    def kv_heads(self) -> int:
        """Heads that keys and values have: H for MLA once expanded, and for MHA."""
        return {"gqa": self.n_kv_heads, "mqa": 1}.get(self.attn, self.n_heads)

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head: N + R for MLA, N (all of it rotated) for the others."""
        return self.qk_nope_head_dim + (self.qk_rope_head_dim if self.attn == "mla" else 0)

    @property
    def rotated_dim(self) -> int:
        return self.qk_rope_head_dim if self.attn == "mla" else self.qk_nope_head_dim

    @property
    def cache_dim(self) -> int:
        """Numbers cached a token a layer: C + R for MLA, else key and value of every KV head."""
        if self.attn == "mla":
            return self.kv_lora_rank + self.qk_rope_head_dim
        return self.kv_heads * (self.qk_head_dim + self.v_head_dim)


# fmt: off
_TINY = dict(n_heads=4, q_lora_rank=96, kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16,
             v_head_dim=32, original_seq_len=1024, max_seq_len=1024, n_dense_layers=1,
             init_std=0.02)
_PUBLISHED = dict(q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
                  v_head_dim=128, n_heads=128, rope_factor=40.0, max_seq_len=163_840)
_V2 = dict(_PUBLISHED, vocab_size=102_400, n_dense_layers=1, n_shared_experts=2,
           n_activated_experts=6, score_func="softmax", norm_topk=False, group_score="max",
           bias_speed=0.0, seq_loss_alpha=0.0, precision="bf16")
_V3 = dict(_PUBLISHED, vocab_size=129_280, dim=7168, inter_dim=18_432, moe_inter_dim=2048,
           n_routed_experts=256, n_activated_experts=8, n_expert_groups=8, n_limited_groups=4,
           route_scale=2.5, precision="fp8")

PRESETS: dict[str, dict[str, Any]] = {
    "toy": dict(_TINY, vocab_size=32, dim=8, n_layers=2, inter_dim=16, moe_inter_dim=8, n_heads=2,
                q_lora_rank=6, kv_lora_rank=4, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=4,
                n_routed_experts=8, n_activated_experts=2, n_expert_groups=4, n_limited_groups=2,
                original_seq_len=64, max_seq_len=64, mtp_depth=1),
    "nano": dict(_TINY, vocab_size=1024, dim=128, n_layers=2, inter_dim=192, moe_inter_dim=64,
                 n_routed_experts=8, n_activated_experts=2, mtp_depth=1, init_std=0.04),
    "micro": dict(_TINY, vocab_size=1024, dim=160, n_layers=4, inter_dim=200, moe_inter_dim=40,
                  n_routed_experts=16, n_activated_experts=4, n_expert_groups=4, n_limited_groups=2,
                  mtp_depth=1),
    "small": dict(_TINY, vocab_size=8192, dim=512, n_layers=10, inter_dim=1536, moe_inter_dim=256,
                  n_heads=8, q_lora_rank=384, kv_lora_rank=128, qk_nope_head_dim=64,
                  qk_rope_head_dim=32, v_head_dim=64, original_seq_len=4096, max_seq_len=4096,
                  n_routed_experts=32, n_activated_experts=4, n_expert_groups=4, n_limited_groups=2,
                  mtp_depth=1, precision="bf16"),
    "v2_lite": dict(_V2, dim=2048, n_layers=27, inter_dim=10_944, moe_inter_dim=1408, n_heads=16,
                    q_lora_rank=0, n_routed_experts=64, mscale=0.707),
    "v2": dict(_V2, dim=5120, n_layers=60, inter_dim=12_288, moe_inter_dim=1536, route_scale=16.0,
               n_routed_experts=160, n_expert_groups=8, n_limited_groups=3),
    "v3": dict(_V3, n_layers=61, n_dense_layers=3, mtp_depth=1),
    "v3_layer": dict(_V3, n_layers=1),
}
# fmt: on


def preset(name: str, **changes: Any) -> Config:
    """Return a preset with some fields replaced; ValueError for an unknown name or field."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    known = {field.name for field in fields(Config)}
    if unknown := sorted(set(changes) - known):
        raise ValueError(f"unknown field {unknown[0]!r}; Config has {', '.join(sorted(known))}")
    return replace(Config(**PRESETS[name]), **changes)
