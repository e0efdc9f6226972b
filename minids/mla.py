"""Latent attention: all heads' keys and values come from one small vector, the only one kept.

Paper   DeepSeek-V3 (arXiv:2412.19437), section 2.1.1, Eqs. 1-11;
        absorbed form: DeepSeek-V2 (arXiv:2405.04434), 2.1.2.
Dims    B batch, T queries, S keys, D width, H heads, N R V head widths, C KV and Q query latent.
Book    book/04_mla.ipynb, book/05_absorb.ipynb   Kernel  minids_kernels/mla_{prefill,decode}.py
Differs two pairs of matrices are stored as one, as in DeepSeek's release: W^DKV, W^KR (`w_dkv`),
        W^UQ with W^QR (`w_uq`, head by head), W^UK with W^UV (`w_ukv`, head by head).
        Both latents are normalised (section 4.2; not in the equations), the rotary key is not.
"""

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Complex, Float
from torch import Tensor, nn

from minids.attention import Causal, attend
from minids.cache import CacheLayer
from minids.config import Config
from minids.fp8 import AFTER_ATTENTION, recipe
from minids.impl import kernels
from minids.linear import Linear
from minids.norm import RMSNorm
from minids.rope import rotate, softmax_scale
from minids.serve.pages import Pages


def absorbing_is_cheaper(cfg: Config, queries: int, keys: int) -> bool:
    """Compare multiply-adds a head: absorb W^UK and W^UV into the queries, or expand every key?"""
    nope, rope = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim
    value, latent = cfg.v_head_dim, cfg.kv_lora_rank
    absorb = queries * latent * (nope + value) + queries * keys * (2 * latent + rope)
    expand = keys * latent * (nope + value) + queries * keys * (nope + rope + value)
    return absorb < expand


def attend_expanded(
    q_nope: Float[Tensor, "B T H N"],
    q_rope: Float[Tensor, "B T H R"],
    k_nope: Float[Tensor, "B S H N"],
    k_rope: Float[Tensor, "B S R"],
    v: Float[Tensor, "B S H V"],
    mask: Bool[Tensor, "#B T S"] | Causal | None,
    scale: float,
    impl: str = "torch",
) -> Float[Tensor, "B T H V"]:
    """Attend with every head's own keys beside one rotary key for all; None sees every key."""
    if impl == "triton":
        return kernels().attend_expanded(q_nope, q_rope, k_nope, k_rope, v, mask, scale)
    k_rope = repeat(k_rope, "b s r -> b s h r", h=k_nope.shape[2])
    q, k = torch.cat([q_nope, q_rope], dim=-1), torch.cat([k_nope, k_rope], dim=-1)  # Eq. 4
    return attend(q, k, v, mask, scale)  # Eq. 10


def attend_latent(
    q_latent: Float[Tensor, "B T H C"],
    q_rope: Float[Tensor, "B T H R"],
    held: Float[Tensor, "B S CR"] | Pages,
    mask: Bool[Tensor, "#B T S"] | Causal | None,
    scale: float,
    impl: str = "torch",
) -> Float[Tensor, "B T H C"]:
    """Attend to the latents themselves, keys and values in one, as one head that serves all.

    In pages, the queries are those of each row's last T tokens, and `mask` is not read: query t
    sees the first length - T + t + 1 slots. A query that sees none gets 0.
    """
    if impl == "triton":
        return kernels().attend_latent(q_latent, q_rope, held, mask, scale)
    if isinstance(held, Pages):
        seen = held.mask(q_rope.shape[1])
        return attend_latent(q_latent, q_rope, held.latent(), seen, scale)
    q, kv = torch.cat([q_latent, q_rope], dim=-1), held[:, :, None]
    return attend(q, kv, kv, mask, scale)[..., : q_latent.shape[-1]]


class MLA(nn.Module):
    """Multi-head latent attention, naive (keys and values expanded) and absorbed, side by side."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg, self.impl = cfg, "torch"  # impl.py sets it
        self.scale = softmax_scale(cfg)
        how, q_dim = recipe(cfg), cfg.n_heads * cfg.qk_head_dim
        if cfg.q_lora_rank:
            self.w_dq = Linear(cfg.dim, cfg.q_lora_rank, how)
            self.q_norm = RMSNorm(cfg.q_lora_rank, cfg.norm_eps)
            self.w_uq = Linear(cfg.q_lora_rank, q_dim, how)
        else:
            self.w_q = Linear(cfg.dim, q_dim, how)
        self.w_dkv = Linear(cfg.dim, cfg.kv_lora_rank + cfg.qk_rope_head_dim, how)
        self.kv_norm = RMSNorm(cfg.kv_lora_rank, cfg.norm_eps)
        kv_dim = cfg.n_heads * (cfg.qk_nope_head_dim + cfg.v_head_dim)
        self.w_ukv = Linear(cfg.kv_lora_rank, kv_dim, how)
        self.w_o = Linear(cfg.n_heads * cfg.v_head_dim, cfg.dim, recipe(cfg, AFTER_ATTENTION))

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        phase: Complex[Tensor, "#B T R_half"],
        mask: Bool[Tensor, "#B T S"] | Causal | None,
        cache: CacheLayer | None = None,
        absorb: bool | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Attend; `absorb=None` takes the form with fewer multiply-adds; both give the same."""
        q_nope, q_rope = self.queries(x, phase)
        latent = self.latents(x, phase)
        paged = cache if cache and cache.cache.pages else None
        if absorb is None:
            # an absorbed matrix is no FP8 product; kernels absorb where latents lie in pages
            never = (self.training and self.w_ukv.recipe) or (self.impl == "triton" and not paged)
            keys = x.shape[1] + (max(cache.cache.lengths) if cache else 0)
            absorb = not never and absorbing_is_cheaper(self.cfg, x.shape[1], keys)
        if absorb and paged:
            o = self.attend_absorbed(q_nope, q_rope, paged.write(latent), mask)
        else:
            attend = self.attend_absorbed if absorb else self.attend_naive
            o = attend(q_nope, q_rope, cache.append(latent) if cache else latent, mask)
        return self.w_o(rearrange(o, "b t h v -> b t (h v)"))  # Eq. 11

    def queries(
        self, x: Float[Tensor, "B T D"], phase: Complex[Tensor, "#B T R_half"]
    ) -> tuple[Float[Tensor, "B T H N"], Float[Tensor, "B T H R"]]:
        """Return each head's query without position and its rotated part."""
        compressed = self.cfg.q_lora_rank
        q = self.w_uq(self.q_norm(self.w_dq(x))) if compressed else self.w_q(x)  # Eq. 6, 7
        q = rearrange(q, "b t (h d) -> b t h d", h=self.cfg.n_heads)
        q_nope, q_rope = q.split([self.cfg.qk_nope_head_dim, self.cfg.qk_rope_head_dim], dim=-1)
        return q_nope, rotate(q_rope, phase, self.impl)  # Eq. 8, 9

    def latents(
        self, x: Float[Tensor, "B T D"], phase: Complex[Tensor, "#B T R_half"]
    ) -> Float[Tensor, "B T CR"]:
        """Return what is cached: the normalised latent c_kv, then all heads' one rotated key."""
        c_kv, k_rope = self._split_latent(self.w_dkv(x))  # Eq. 1
        return torch.cat([self.kv_norm(c_kv), rotate(k_rope, phase, self.impl)], dim=-1)  # Eq. 3

    def attend_naive(
        self,
        q_nope: Float[Tensor, "B T H N"],
        q_rope: Float[Tensor, "B T H R"],
        latent: Float[Tensor, "B S CR"],
        mask: Bool[Tensor, "#B T S"] | Causal | None,
    ) -> Float[Tensor, "B T H V"]:
        """Expand every head's keys and values from the latent, then attend as MHA does."""
        c_kv, k_rope = self._split_latent(latent)
        kv = rearrange(self.w_ukv(c_kv), "b s (h d) -> b s h d", h=self.cfg.n_heads)  # Eq. 2, 5
        k_nope, v = kv.split([self.cfg.qk_nope_head_dim, self.cfg.v_head_dim], dim=-1)
        return attend_expanded(q_nope, q_rope, k_nope, k_rope, v, mask, self.scale, self.impl)

    def attend_absorbed(
        self,
        q_nope: Float[Tensor, "B T H N"],
        q_rope: Float[Tensor, "B T H R"],
        held: Float[Tensor, "B S CR"] | Pages,
        mask: Bool[Tensor, "#B T S"] | Causal | None,
    ) -> Float[Tensor, "B T H V"]:
        """Fold W^UK into the queries and W^UV into the output: MQA over the latent itself."""
        # plain products: einsum costs a third of a step where the model is small
        batch, heads, nope = len(q_nope), self.cfg.n_heads, self.cfg.qk_nope_head_dim
        w_ukv = rearrange(self.w_ukv.weight, "(h d) c -> h d c", h=heads)
        w_uk, w_uv = w_ukv[:, :nope], w_ukv[:, nope:]
        q_latent = rearrange(q_nope, "b t h n -> h (b t) n") @ w_uk
        q_latent = rearrange(q_latent, "h (b t) c -> b t h c", b=batch)
        z = attend_latent(q_latent, q_rope, held, mask, self.scale, self.impl)
        o = rearrange(z, "b t h c -> h (b t) c") @ w_uv.mT
        return rearrange(o, "h (b t) v -> b t h v", b=batch)

    def _split_latent(
        self, latent: Float[Tensor, "B S CR"]
    ) -> tuple[Float[Tensor, "B S C"], Float[Tensor, "B S R"]]:
        c_kv, k_rope = latent.split([self.cfg.kv_lora_rank, self.cfg.qk_rope_head_dim], dim=-1)
        return c_kv, k_rope
