"""Sigmoid routing: a bias picks the experts, the unbiased score weighs them.

Paper   DeepSeek-V3 (arXiv:2412.19437), section 2.1.2, Eqs. 13-16, "Node-Limited Routing";
        V2's rule: arXiv:2405.04434, Eqs. 20-22.
Dims    BT tokens, D width, E routed experts, K experts per token, G expert groups.
Book    book/07_moe.ipynb               Kernel  minids_kernels/router_topk.py
Differs scores are FP32 whatever the model's dtype, and the normaliser adds 1e-20 (transformers does
        both): sixteen-bit scores tie, and a sum of underflowed sigmoids is 0.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from minids.balance import expert_load
from minids.config import Config
from minids.impl import kernels
from minids.norm import at_least_fp32, without_autocast


class Routes(NamedTuple):
    """Where each token goes, with which weights, and what balance must know."""

    gate: Float[Tensor, "BT K"]
    ids: Int[Tensor, "BT K"]
    score: Float[Tensor, "BT E"]
    load: Int[Tensor, " E"]  # tokens an expert received


def top(x: Float[Tensor, "BT n"], k: int) -> Int[Tensor, "BT k"]:
    """Return the places of the k largest numbers; of equal ones the first come first."""
    return x.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def limit_groups(
    choice: Float[Tensor, "BT E"], groups: int, keep: int, best: int
) -> Float[Tensor, "BT E"]:
    """Set experts outside the `keep` best groups to -inf; a group is worth its `best` top ones."""
    if keep == groups:
        return choice
    grouped = rearrange(choice, "bt (g e) -> bt g e", g=groups)
    worth = grouped.topk(best, dim=-1).values.sum(-1)
    dropped = torch.ones_like(worth, dtype=torch.bool).scatter(-1, top(worth, keep), False)
    return rearrange(grouped.masked_fill(dropped[..., None], -torch.inf), "bt g e -> bt (g e)")


def route(
    logit: Float[Tensor, "BT E"],
    bias: Float[Tensor, " E"] | None,
    groups: int,
    keep: int,
    best: int,
    k: int,
    normalise: bool,
    scale: float,
    impl: str = "torch",
) -> Routes:
    """Choose k experts a token, within its `keep` best groups; without a bias by V2's softmax."""
    if impl == "triton":
        return Routes(*kernels().route(logit, bias, groups, keep, best, k, normalise, scale))
    score = logit.sigmoid() if bias is not None else logit.softmax(-1)  # Eq. 15
    choice = score.detach() if bias is None else score.detach() + bias
    ids = top(limit_groups(choice, groups, keep, best), k)  # Eq. 16: the bias picks ...
    gate = score.gather(-1, ids)  # ... but does not weigh
    if normalise:
        gate = gate / (gate.sum(-1, keepdim=True) + 1e-20)  # Eq. 13
    return Routes(scale * gate, ids, score, expert_load(ids, logit.shape[-1]))


class Router(nn.Module):
    """Choose K experts for each token and weigh them."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg, self.impl = cfg, "torch"
        self.centroids = nn.Parameter(torch.empty(cfg.n_routed_experts, cfg.dim))  # e_i
        biased = cfg.score_func == "sigmoid"  # V2 has no bias
        self.bias = nn.Buffer(torch.zeros(cfg.n_routed_experts)) if biased else None  # b_i

    def forward(self, x: Float[Tensor, "BT D"]) -> Routes:
        """Return each token's K gate weights, the experts they belong to, all scores, the load."""
        cfg = self.cfg
        with without_autocast(x):
            logit = F.linear(at_least_fp32(x), at_least_fp32(self.centroids))  # u_t . e_i
        best = min(2, cfg.experts_per_group) if cfg.group_score == "top2" else 1
        limits = (cfg.n_expert_groups, cfg.n_limited_groups, best, cfg.n_activated_experts)
        return route(logit, self.bias, *limits, cfg.norm_topk, cfg.route_scale, self.impl)
