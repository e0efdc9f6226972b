"""Keep experts equally busy: a bias moved by sign after each step, and the losses it replaces.

Paper   DeepSeek-V3 (arXiv:2412.19437), section 2.1.2, Eqs. 17-20; bias: arXiv:2408.15664, Alg. 1.
Dims    B sequences, T tokens of each, E routed experts, K experts a token.
Book    book/08_balance.ipynb           Kernel  none
"""

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor


def expert_load(ids: Int[Tensor, "*tokens K"], n_experts: int) -> Int[Tensor, " E"]:
    """Count the tokens sent to each expert."""
    return rearrange(ids, "... k -> (... k)").bincount(minlength=n_experts)


def max_vio(load: Int[Tensor, "*layers E"]) -> Float[Tensor, "*layers"]:
    """Return (largest load - mean load) / mean load: 0 is perfect balance (arXiv:2408.15664)."""
    mean = load.float().mean(-1)
    return (load.amax(-1) - mean) / mean


@torch.no_grad()
def update_bias(bias: Float[Tensor, " E"], load: Int[Tensor, " E"], speed: float) -> None:
    """Raise in place the bias of underloaded experts by `speed`, lower that of overloaded ones.

    Call once an optimiser step with the load of its whole batch.
    """
    bias += speed * (load.float().mean() - load).sign()


def sequence_loss(score: Float[Tensor, "B T E"], n_activated: int) -> Float[Tensor, ""]:
    """Return sum_i f_i P_i of each sequence alone, averaged over sequences; 1 at perfect balance.

    Multiply by alpha for Eq. 17. f counts the K best unbiased scores, as Eq. 18 is printed; many
    implementations count the biased, group-limited choice (DeepSeek's own is not published).
    """
    return _balance_loss(score, score.topk(n_activated, dim=-1).indices)


def auxiliary_loss(score: Float[Tensor, "B T E"], ids: Int[Tensor, "B T K"]) -> Float[Tensor, ""]:
    """Return the classical loss: the same product over the whole batch, with the actual choice."""
    flat = "b t e -> 1 (b t) e"
    return _balance_loss(rearrange(score, flat), rearrange(ids, flat))


def _balance_loss(score: Float[Tensor, "B T E"], ids: Int[Tensor, "B T K"]) -> Float[Tensor, ""]:
    n_experts, (_, n_tokens, n_activated) = score.shape[-1], ids.shape
    chosen = torch.zeros_like(score).scatter(-1, ids, 1.0)
    f = reduce(chosen, "b t e -> b e", "sum") * n_experts / (n_activated * n_tokens)  # Eq. 18
    share = score / score.sum(-1, keepdim=True)  # Eq. 19
    p = reduce(share, "b t e -> b e", "mean")  # Eq. 20
    return (f * p).sum(-1).mean()
