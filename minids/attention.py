"""Multi-head, grouped-query and multi-query attention: what MLA is compared with.

Paper   MHA arXiv:1706.03762, MQA arXiv:1911.02150, GQA arXiv:2305.13245;
        DeepSeek-V2 (arXiv:2405.04434), Table 1.
Dims    B batch, T queries, S keys, D width, H query heads, G key heads, N key and V value width.
Book    book/03_cache.ipynb             Kernel  none
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor, nn

from minids.cache import CacheLayer
from minids.config import Config
from minids.fp8 import AFTER_ATTENTION, recipe
from minids.linear import Linear
from minids.rope import rotate, softmax_scale


def causal_mask(
    query_positions: Int[Tensor, "#B T"],
    key_positions: Int[Tensor, " S"],
    documents: Int[Tensor, "#B S"] | None = None,
) -> Bool[Tensor, "#B T S"]:
    """True where a query may look: keys not after it, of its own document (T = S) if given."""
    seen = key_positions <= query_positions[..., None]
    if documents is not None:
        seen = seen & (documents[..., None] == rearrange(documents, "b s -> b 1 s"))
    return seen


class Causal(NamedTuple):
    """The same in numbers, for kernels, which store no mask: query t of row b is at start_b + t.

    With documents, queries and keys are the same tokens: T = S and start is 0.
    """

    start: Int[Tensor, " B"]
    documents: Int[Tensor, "B S"] | None = None

    def mask(self, queries: int, keys: int) -> Bool[Tensor, "B T S"]:
        """Return the mask that says so."""
        at = self.start[:, None] + torch.arange(queries, device=self.start.device)
        return causal_mask(at, torch.arange(keys, device=at.device), self.documents)


def attend(
    q: Float[Tensor, "B T H N"],
    k: Float[Tensor, "B S G N"],
    v: Float[Tensor, "B S G V"],
    mask: Bool[Tensor, "#B T S"] | Causal | None,
    scale: float,
) -> Float[Tensor, "B T H V"]:
    """Return softmax(q k^T * scale) v, with weight 0 where the mask is False; None sees all keys.

    Each of the G key and value heads serves H / G query heads: more rows of one product.
    Softmax is taken in FP32 at least, in tiles, so that no [T, S] matrix is ever stored.
    """
    if isinstance(mask, Causal):
        mask = mask.mask(q.shape[1], k.shape[1])
    (heads, value_dim), (groups, width) = (q.shape[2], v.shape[3]), k.shape[2:]
    q = rearrange(q, "b t (g h) n -> b g (h t) n", g=groups)
    # einops would look up its pattern anew for each length of a growing cache
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # b g s n
    if mask is not None:
        mask = repeat(mask, "b t s -> b 1 (h t) s", h=heads // groups)
    if value_dim < width:  # torch has a tiled kernel for equal widths alone
        v = F.pad(v, (0, width - value_dim))
    o = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)[..., :value_dim]
    return rearrange(o, "b g (h t) v -> b t (g h) v", h=heads // groups)


class Attention(nn.Module):
    """H query heads share `kv_heads` key and value heads: H of them is MHA, 1 is MQA, else GQA."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg, how = cfg, recipe(cfg)
        self.scale, self.impl = softmax_scale(cfg), "torch"
        self.w_q = Linear(cfg.dim, cfg.n_heads * cfg.qk_head_dim, how)
        self.w_k = Linear(cfg.dim, cfg.kv_heads * cfg.qk_head_dim, how)
        self.w_v = Linear(cfg.dim, cfg.kv_heads * cfg.v_head_dim, how)
        self.w_o = Linear(cfg.n_heads * cfg.v_head_dim, cfg.dim, recipe(cfg, AFTER_ATTENTION))

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        phase: Complex[Tensor, "#B T N_half"],
        mask: Bool[Tensor, "#B T S"] | None,
        cache: CacheLayer | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Attend; `mask=None` lets every query see every key (one new token after a cache)."""
        groups, width = self.cfg.kv_heads, self.cfg.qk_head_dim
        q = rearrange(self.w_q(x), "b t (h n) -> b t h n", n=width)
        k = rearrange(self.w_k(x), "b t (g n) -> b t g n", g=groups)
        q, k, v = rotate(q, phase, self.impl), rotate(k, phase, self.impl), self.w_v(x)
        if cache is not None:
            held = cache.append(torch.cat([rearrange(k, "b s g n -> b s (g n)"), v], dim=-1))
            flat_k, v = held.split([groups * width, groups * self.cfg.v_head_dim], dim=-1)
            k = rearrange(flat_k, "b s (g n) -> b s g n", g=groups)
        v = rearrange(v, "b s (g v) -> b s g v", g=groups)
        o = attend(q, k, v, mask, self.scale)
        return self.w_o(rearrange(o, "b t h v -> b t (h v)"))
