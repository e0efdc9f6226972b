"""Mixture of experts: every token visits its K experts, no token is dropped.

Paper   DeepSeek-V3 (arXiv:2412.19437), section 2.1.2, Eq. 12; DeepSeekMoE, arXiv:2401.06066.
Dims    BT tokens, D width, E routed experts, K experts a token, F expert width.
Book    book/07_moe.ipynb               Kernel  none
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from minids.balance import auxiliary_loss, expert_load, sequence_loss
from minids.config import Config
from minids.experts.grouped import matmul_by_expert
from minids.ffn import SwiGLU
from minids.fp8 import INTO_EXPERTS, OUT_OF_EXPERTS, gated_experts, recipe
from minids.router import Router


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

    def forward(
        self, x: Float[Tensor, "BT D"], gate: Float[Tensor, "BT K"], ids: Int[Tensor, "BT K"]
    ) -> Float[Tensor, "BT D"]:
        """Run each expert once on the rows of the tokens that chose it, sum each token's."""
        into, out = self.recipes if self.training else (None, None)
        if len(x) == 1 and into is None:  # a decoded token has nothing to sort
            return one_token(x, gate, ids, lambda e: (self.w_gate_up[e], self.w_down[e]))
        run = self._run
        if into is not None and out is not None:
            run = partial(gated_experts, self.w_gate_up, self.w_down, into, out)
        return by_expert(x, gate, ids, len(self.w_down), run)

    def _run(
        self, visits: Float[Tensor, "visits D"], load: Int[Tensor, " E"]
    ) -> Float[Tensor, "visits D"]:
        w_gate_up = rearrange(self.w_gate_up, "e two f d -> e (two f) d")
        gate_half, up_half = matmul_by_expert(visits, w_gate_up, load).chunk(2, dim=-1)
        return matmul_by_expert(F.silu(gate_half) * up_half, self.w_down, load)


def by_expert(
    x: Float[Tensor, "BT D"],
    gate: Float[Tensor, "BT K"],
    ids: Int[Tensor, "BT K"],
    experts: int,
    run: Callable[[Tensor, Tensor], Tensor],
) -> Float[Tensor, "BT D"]:
    """Sort the BT*K visits by expert, `run` them with each expert's load, sum each token's."""
    order = rearrange(ids, "bt k -> (bt k)").argsort(stable=True)
    place = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=x.device))
    # lookups and their gradients add in a fixed order on every device, index_add does not
    visits = F.embedding(order // ids.shape[-1], x)  # rows of one expert are neighbours now
    y = run(visits, expert_load(ids, experts))
    rows = place.unflatten(-1, ids.shape)
    return F.embedding_bag(rows, y, mode="sum", per_sample_weights=gate.to(y.dtype))  # Eq. 12


def one_token(
    x: Float[Tensor, "1 D"],
    gate: Float[Tensor, "1 K"],
    ids: Int[Tensor, "1 K"],
    weights: Callable[[int], tuple[Tensor, Tensor]],
) -> Float[Tensor, "1 D"]:
    """Run a single token's experts one after the other; `weights` gives an expert's matrices."""
    y = torch.zeros_like(x)
    for weight, e in zip(gate.to(x.dtype).unbind(-1), ids[0].tolist(), strict=True):
        y = y + weight * run_expert(x, *weights(e))
    return y


def run_expert(
    x: Float[Tensor, "rows D"], w_gate_up: Float[Tensor, "2 F D"], w_down: Float[Tensor, "D F"]
) -> Float[Tensor, "rows D"]:
    """SwiGLU with given weights."""
    gate, up = F.linear(x, rearrange(w_gate_up, "two f d -> (two f) d")).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, w_down)


def dense_loop(
    experts: Experts,
    x: Float[Tensor, "BT D"],
    gate: Float[Tensor, "BT K"],
    ids: Int[Tensor, "BT K"],
) -> Float[Tensor, "BT D"]:
    """The reference of Experts: every expert sees every token, weight 0 if not chosen (Eq. 14)."""
    weight = torch.zeros(len(x), len(experts.w_down), dtype=gate.dtype, device=x.device)
    weight = weight.scatter(-1, ids, gate).to(x.dtype)
    y = torch.zeros_like(x)
    for e, (w_gate_up, w_down) in enumerate(zip(experts.w_gate_up, experts.w_down, strict=True)):
        y = y + weight[:, e, None] * run_expert(x, w_gate_up, w_down)
    return y


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
        gate, ids, score = self.router(tokens)
        y = rearrange(self.experts(tokens, gate, ids), "(b t) d -> b t d", b=len(x))
        if self.shared is not None:
            y = y + self.shared(x)
        return y, self._routed(ids, score, len(x)) if stats else None

    def _routed(self, ids: Int[Tensor, "BT K"], score: Float[Tensor, "BT E"], batch: int) -> Routed:
        loss = score.new_zeros(())
        rows = "(b t) e -> b t e"
        if self.cfg.seq_loss_alpha:
            score_rows = rearrange(score, rows, b=batch)
            alpha = self.cfg.seq_loss_alpha
            loss = loss + alpha * sequence_loss(score_rows, self.cfg.n_activated_experts)  # Eq. 17
        if self.cfg.aux_loss_alpha:
            score_rows, ids_rows = rearrange(score, rows, b=batch), rearrange(ids, rows, b=batch)
            loss = loss + self.cfg.aux_loss_alpha * auxiliary_loss(score_rows, ids_rows)
        return Routed(expert_load(ids, score.shape[-1]), loss)
