"""Multi-head, grouped-query and multi-query attention: what MLA is compared with.

Paper   MHA arXiv:1706.03762, MQA arXiv:1911.02150, GQA arXiv:2305.13245; DeepSeek-V2 (arXiv:2405.04434), Table 1.
Dims    B batch, T queries, S keys, D width, H heads, N query and key head width, V value head width.
Book    book/03_cache.ipynb             Kernel  none
"""

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor, nn

from minids.cache import CacheLayer
from minids.config import Config
from minids.linear import Linear
from minids.norm import at_least_fp32
from minids.rope import rotate, softmax_scale


def causal_mask(
    query_positions: Int[Tensor, "#B T"],
    key_positions: Int[Tensor, " S"],
    documents: Int[Tensor, "#B S"] | None = None,
) -> Bool[Tensor, "#B T S"]:
    """True where a query may look: keys not after it and, with `documents` (T = S), in its own one."""
    seen = key_positions <= query_positions[..., None]
    if documents is not None:
        seen = seen & (documents[..., None] == rearrange(documents, "b s -> b 1 s"))
    return seen


def attention_weights(
    score: Float[Tensor, "B H T S"], mask: Bool[Tensor, "#B T S"] | None
) -> Float[Tensor, "B H T S"]:
    """Softmax over keys in FP32, with zero weight where the mask is False."""
    if mask is not None:
        score = score.masked_fill(~rearrange(mask, "b t s -> b 1 t s"), -torch.inf)
    return at_least_fp32(score).softmax(-1).to(score.dtype)


class Attention(nn.Module):
    """H query heads share `kv_heads` key and value heads: H of them is MHA, one is MQA, else GQA."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.scale = softmax_scale(cfg)
        self.w_q = Linear(cfg.dim, cfg.n_heads * cfg.qk_head_dim)
        self.w_k = Linear(cfg.dim, cfg.kv_heads * cfg.qk_head_dim)
        self.w_v = Linear(cfg.dim, cfg.kv_heads * cfg.v_head_dim)
        self.w_o = Linear(cfg.n_heads * cfg.v_head_dim, cfg.dim)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        phase: Complex[Tensor, "#B T N_half"],
        mask: Bool[Tensor, "#B T S"] | None,
        cache: CacheLayer | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Attend; `mask=None` lets every query see every key (one new token after a cache)."""
        groups, width = self.cfg.kv_heads, self.cfg.qk_head_dim
        q = rearrange(self.w_q(x), "b t (g h n) -> b t (g h) n", g=groups, n=width)
        k = rearrange(self.w_k(x), "b t (g n) -> b t g n", g=groups)
        q, k, v = rotate(q, phase), rotate(k, phase), self.w_v(x)
        if cache is not None:
            held = cache.append(torch.cat([rearrange(k, "b s g n -> b s (g n)"), v], dim=-1))
            flat_k, v = held.split([groups * width, groups * self.cfg.v_head_dim], dim=-1)
            k = rearrange(flat_k, "b s (g n) -> b s g n", g=groups)
        q = rearrange(q, "b t (g h) n -> b t g h n", g=groups)
        v = rearrange(v, "b s (g v) -> b s g v", g=groups)
        score = einsum(q, k, "b t g h n, b s g n -> b g h t s") * self.scale
        weight = attention_weights(rearrange(score, "b g h t s -> b (g h) t s"), mask)
        weight = rearrange(weight, "b (g h) t s -> b g h t s", g=groups)
        o = einsum(weight, v, "b g h t s, b s g v -> b t g h v")
        return self.w_o(rearrange(o, "b t g h v -> b t (g h v)"))
