"""Sigmoid routing: a bias picks the experts, the unbiased score weighs them.

Paper   DeepSeek-V3 (arXiv:2412.19437), section 2.1.2, Eqs. 13-16, "Node-Limited Routing";
        V2's rule: arXiv:2405.04434, Eqs. 20-22.
Dims    BT tokens, D width, E routed experts, K experts per token, G expert groups.
Book    book/07_moe.ipynb               Kernel  none
Differs scores are FP32 whatever the model's dtype, and the normaliser adds 1e-20 (transformers does
        both): sixteen-bit scores tie, and a sum of underflowed sigmoids is 0.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from minids.config import Config
from minids.norm import at_least_fp32


def limit_groups(
    choice: Float[Tensor, "BT E"], groups: int, keep: int, best: int
) -> Float[Tensor, "BT E"]:
    """Set experts outside the `keep` best groups to -inf; a group is worth its `best` top ones."""
    if keep == groups:
        return choice
    grouped = rearrange(choice, "bt (g e) -> bt g e", g=groups)
    worth = grouped.topk(best, dim=-1).values.sum(-1)
    kept = worth.topk(keep, dim=-1).indices
    dropped = torch.ones_like(worth, dtype=torch.bool).scatter(-1, kept, False)
    return rearrange(grouped.masked_fill(dropped[..., None], -torch.inf), "bt g e -> bt (g e)")


class Router(nn.Module):
    """Choose K experts for each token and weigh them."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.centroids = nn.Parameter(torch.empty(cfg.n_routed_experts, cfg.dim))  # e_i
        biased = cfg.score_func == "sigmoid"  # V2 has no bias
        self.bias = nn.Buffer(torch.zeros(cfg.n_routed_experts)) if biased else None  # b_i

    def forward(
        self, x: Float[Tensor, "BT D"]
    ) -> tuple[Float[Tensor, "BT K"], Int[Tensor, "BT K"], Float[Tensor, "BT E"]]:
        """Return each token's K gate weights, the expert ids they belong to, and all its scores."""
        cfg = self.cfg
        half = torch.is_autocast_enabled(x.device.type)
        with torch.autocast(x.device.type, enabled=False) if half else nullcontext():
            logit = F.linear(at_least_fp32(x), at_least_fp32(self.centroids))  # u_t . e_i
        score = logit.sigmoid() if self.bias is not None else logit.softmax(-1)  # Eq. 15
        choice = score.detach() if self.bias is None else score.detach() + self.bias
        best = min(2, cfg.experts_per_group) if cfg.group_score == "top2" else 1
        choice = limit_groups(choice, cfg.n_expert_groups, cfg.n_limited_groups, best)
        ids = choice.topk(cfg.n_activated_experts, dim=-1).indices  # Eq. 16: the bias picks ...
        gate = score.gather(-1, ids)  # ... but does not weigh
        if cfg.norm_topk:
            gate = gate / (gate.sum(-1, keepdim=True) + 1e-20)  # Eq. 13
        return cfg.route_scale * gate, ids, score
