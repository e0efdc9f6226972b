"""Multi-token prediction: a module looks one token further, from the last state and the next word.

Paper   DeepSeek-V3 (arXiv:2412.19437), section 2.2, Eqs. 21-25.
Dims    B batch, T positions, D width; depth k = 1, 2, ... is the module's number.
Book    book/09_mtp.ipynb               Kernel  none
Differs Eq. 21 prints [hidden; embedding]; released weights (`eh_proj`) want [embedding; hidden].
        The report leaves open which state is read: here the one after the final norm, by deeper
        modules the one after their own norm, as in transformers. Positions are those of the
        embedded token, i + k.
"""

import torch
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor, nn

from minids.attention import Causal
from minids.block import Block
from minids.cache import CacheLayer
from minids.config import Config
from minids.linear import Linear
from minids.moe import Routed
from minids.norm import RMSNorm


class MTP(nn.Module):
    """One depth: merge state and embedding, then run one Transformer block and a norm."""

    def __init__(self, cfg: Config, block: Block):
        super().__init__()
        self.embedding_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.hidden_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.w_merge = Linear(2 * cfg.dim, cfg.dim)  # M_k
        self.block = block  # TRM_k
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)

    def forward(
        self,
        hidden: Float[Tensor, "B T D"],
        embedding: Float[Tensor, "B T D"],
        phase: Complex[Tensor, "#B T R_half"],
        mask: Bool[Tensor, "#B T S"] | Causal | None,
        cache: CacheLayer | None = None,
        stats: bool = False,
    ) -> tuple[Float[Tensor, "B T D"], Routed | None]:
        """Return h^k_i from h^(k-1)_i and Emb(t_(i+k)): what the head and the next depth read."""
        merged = torch.cat([self.embedding_norm(embedding), self.hidden_norm(hidden)], dim=-1)
        out, routed = self.block(self.w_merge(merged), phase, mask, cache, stats)  # Eq. 21, 22
        return self.norm(out), routed


def shift(
    tokens: Int[Tensor, "B T1"], depth: int
) -> tuple[Int[Tensor, "B Tk"], Int[Tensor, "B Tk"]]:
    """Return which token each position embeds, t_(i+k), and which it predicts, t_(i+k+1).

    Of T + 1 tokens the main model reads T; depth k has T - k positions i, from 0 on.
    """
    return tokens[:, depth:-1], tokens[:, depth + 1 :]
