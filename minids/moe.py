"""Mixture of experts: every token visits its K experts, no token is dropped.

Paper   DeepSeek-V3 (arXiv:2412.19437), section 2.1.2, Eq. 12; DeepSeekMoE, arXiv:2401.06066.
Dims    BT tokens, D width, E routed experts, K experts a token, F expert width.
Book    book/07_moe.ipynb               Kernel  minids_kernels/moe_experts.py
"""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from minids.balance import auxiliary_loss, sequence_loss
from minids.config import Config
from minids.experts.grouped import one_token, run_experts
from minids.experts.scaled import train_experts
from minids.ffn import SwiGLU
from minids.fp8 import INTO_EXPERTS, OUT_OF_EXPERTS, recipe
from minids.router import Router, Routes


class Routed(NamedTuple):
    """What training must know of one MoE layer's routing; outputs, so recomputing it is free."""

    load: Int[Tensor, " E"]  # tokens a routed expert received
    balance_loss: Float[Tensor, ""]  # weighted by the config's alphas


class Experts(nn.Module):
    """The E routed experts, stacked; gate and up projection lie side by side."""

    def __init__(self, cfg: Config):
        super().__init__()
        experts, width, hidden = cfg.n_routed_experts, cfg.dim, cfg.moe_inter_dim
        self.w_gate_up = nn.Parameter(torch.empty(experts, 2, hidden, width))
        self.w_down = nn.Parameter(torch.empty(experts, width, hidden))
        self.recipes = recipe(cfg, INTO_EXPERTS), recipe(cfg, OUT_OF_EXPERTS)
        self.impl = "torch"

    def forward(
        self, x: Float[Tensor, "BT D"], gate: Float[Tensor, "BT K"], ids: Int[Tensor, "BT K"]
    ) -> Float[Tensor, "BT D"]:
        """Run each expert once on the rows of the tokens that chose it, sum each token's."""
        into, out = self.recipes if self.training else (None, None)
        if into is not None and out is not None:
            return train_experts(x, gate, ids, self.w_gate_up, self.w_down, into, out, self.impl)
        if len(x) == 1 and self.impl == "torch":  # a decoded token has nothing to sort
            return one_token(x, gate, ids, lambda e: (self.w_gate_up[e], self.w_down[e]))
        return run_experts(x, gate, ids, self.w_gate_up, self.w_down, self.impl)


class MoE(nn.Module):
    """Routed experts plus shared ones: one SwiGLU of `n_shared_experts` times the width."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.router = Router(cfg)
        self.experts = Experts(cfg)
        width = cfg.n_shared_experts * cfg.moe_inter_dim
        self.shared = SwiGLU(cfg.dim, width, recipe(cfg)) if width else None

    def forward(
        self, x: Float[Tensor, "B T D"], stats: bool = False
    ) -> tuple[Float[Tensor, "B T D"], Routed | None]:
        """Return the layer's output and, if `stats` are asked for, its load and balance loss."""
        tokens = rearrange(x, "b t d -> (b t) d")
        routes = self.router(tokens)
        y = rearrange(self.experts(tokens, *routes[:2]), "(b t) d -> b t d", b=len(x))
        if self.shared is not None:
            y = y + self.shared(x)
        return y, self._routed(routes, len(x)) if stats else None

    def _routed(self, routes: Routes, batch: int) -> Routed:
        score, ids = routes.score, routes.ids
        loss = score.new_zeros(())
        rows = "(b t) e -> b t e"
        if self.cfg.seq_loss_alpha:
            score_rows = rearrange(score, rows, b=batch)
            alpha = self.cfg.seq_loss_alpha
            loss = loss + alpha * sequence_loss(score_rows, self.cfg.n_activated_experts)  # Eq. 17
        if self.cfg.aux_loss_alpha:
            score_rows, ids_rows = rearrange(score, rows, b=batch), rearrange(ids, rows, b=batch)
            loss = loss + self.cfg.aux_loss_alpha * auxiliary_loss(score_rows, ids_rows)
        return Routed(routes.load, loss)
