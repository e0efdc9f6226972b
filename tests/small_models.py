"""Small configs, every variant of the model among them; models whose weights all matter."""

import torch

from minids import Config, Transformer

BASE = dict(
    vocab_size=61, dim=48, n_layers=3, n_dense_layers=1, inter_dim=64, moe_inter_dim=24,
    n_heads=4, q_lora_rank=20, kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=8,
    v_head_dim=12, original_seq_len=64, max_seq_len=64, n_routed_experts=8, n_activated_experts=3,
    n_expert_groups=4, n_limited_groups=2, route_scale=2.5, seq_loss_alpha=0.0, mtp_depth=1,
    init_std=0.15,
)  # fmt: skip
V2 = dict(score_func="softmax", norm_topk=False, group_score="max")
YARN = dict(rope_factor=4.0, original_seq_len=16, rope_theta=1000.0)

# seq_loss_alpha is 0 in all: transformers has no balance loss to compare with
CONFIGS = {
    "v3": {},
    "no_query_latent": dict(q_lora_rank=0, n_expert_groups=1, n_limited_groups=1, n_dense_layers=0),
    "yarn_3_dense": dict(YARN, n_layers=4, n_dense_layers=3, n_expert_groups=2, n_limited_groups=1),
    "no_shared": dict(n_shared_experts=0, n_expert_groups=2, n_limited_groups=2, route_scale=1.0),
    "two_shared_mtp_2": dict(n_shared_experts=2, mtp_depth=2, n_dense_layers=0),
    "negative_bias": dict(n_limited_groups=1, n_activated_experts=2),
    "yarn_mtp_2": dict(YARN, mtp_depth=2, q_lora_rank=0, n_shared_experts=0, mscale=0.707),
    "odd_widths": dict(vocab_size=37, dim=21, n_heads=3, q_lora_rank=7, kv_lora_rank=5,
                       qk_nope_head_dim=3, qk_rope_head_dim=2, v_head_dim=5, inter_dim=13,
                       moe_inter_dim=9, n_routed_experts=6, n_expert_groups=2, n_limited_groups=1,
                       init_std=0.3),
    "not_normalised": dict(norm_topk=False, n_routed_experts=16, n_activated_experts=6),
    "all_experts": dict(n_activated_experts=8, n_limited_groups=4, n_dense_layers=0),
    "dense": dict(n_dense_layers=3, mtp_depth=0),
    "v2": dict(V2, route_scale=16.0, n_shared_experts=2),
    "v2_lite": dict(V2 | YARN, q_lora_rank=0, n_expert_groups=1, n_limited_groups=1, mscale=0.707,
                    n_shared_experts=2, route_scale=1.0, mtp_depth=0),
}  # fmt: skip
BIAS_MEAN = {"negative_bias": -3.0}  # below every sigmoid: groups masked with 0 would win
WITH_MTP = [name for name, changes in CONFIGS.items() if (BASE | changes)["mtp_depth"]]


def drawn(name: str, impl: str = "torch") -> tuple[Transformer, torch.Generator]:
    """Return a model with random gains and biases too, and the generator that drew them."""
    model = Transformer(Config(**BASE | CONFIGS[name]), impl, seed=1)
    draw = torch.Generator().manual_seed(2)
    for parameter_name, weight in model.named_parameters():
        if parameter_name.endswith("gain"):
            weight.data.normal_(1.0, 0.3, generator=draw)
    for router in model.routers:
        if router.bias is not None:
            router.bias.normal_(BIAS_MEAN.get(name, 0.0), 0.3, generator=draw)
    return model, draw
