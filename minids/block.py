"""One layer: attention and feed-forward, each behind a norm and beside a residual path.

Paper   DeepSeek-V3 (arXiv:2412.19437), section 2.1, Figure 2; 4.2 (first layers dense).
Dims    B batch, T positions, S keys, D width.
Book    book/02_model.ipynb             Kernel  none
"""

from jaxtyping import Bool, Complex, Float
from torch import Tensor, nn

from minids.attention import Attention, Causal
from minids.cache import CacheLayer
from minids.config import Config
from minids.ffn import SwiGLU
from minids.fp8 import recipe
from minids.mla import MLA
from minids.moe import MoE, Routed
from minids.norm import RMSNorm


class Block(nn.Module):
    """Layer `index` of the model: MoE from `n_dense_layers` on, a dense SwiGLU before."""

    def __init__(self, cfg: Config, index: int):
        super().__init__()
        self.attn_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.attn = MLA(cfg) if cfg.attn == "mla" else Attention(cfg)
        self.ffn_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        dense = index < cfg.n_dense_layers
        self.ffn = SwiGLU(cfg.dim, cfg.inter_dim, recipe(cfg)) if dense else MoE(cfg)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        phase: Complex[Tensor, "#B T R_half"],
        mask: Bool[Tensor, "#B T S"] | Causal | None,
        cache: CacheLayer | None = None,
        stats: bool = False,
    ) -> tuple[Float[Tensor, "B T D"], Routed | None]:
        """Return the new state and, if `stats` are asked of an MoE layer, its load and loss."""
        x = x + self.attn(self.attn_norm(x), phase, mask, cache)
        if not isinstance(self.ffn, MoE):
            return x + self.ffn(self.ffn_norm(x)), None
        y, routed = self.ffn(self.ffn_norm(x), stats)
        return x + y, routed  # Eq. 12
