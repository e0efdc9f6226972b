"""Wrong on purpose: routers, attentions and rotations, each with a mistake that someone made.

Paper   DeepSeek-V3 (arXiv:2412.19437); test_mistakes.py has the property that exposes each of them.
Dims    as in the module that each mistake replaces.
"""

import math

import torch
from einops import einsum, rearrange
from torch import nn

from minids.linear import Linear
from minids.mla import MLA
from minids.rope import ramp_bounds, rotate
from minids.router import Router, Routes

# router


class BiasedGate(Router):
    """Weighs the chosen experts by their biased scores."""

    def forward(self, x):
        _, ids, score, load = super().forward(x)
        gate = (score + self.bias).gather(-1, ids)
        return Routes(self.cfg.route_scale * gate / gate.sum(-1, keepdim=True), ids, score, load)


class BiasInsideSigmoid(Router):
    """Adds the bias to the logits."""

    def forward(self, x):
        score = (einsum(x, self.centroids, "bt d, e d -> bt e") + self.bias).sigmoid()
        return pick(self.cfg, score)


class SoftmaxAffinity(Router):
    """Scores experts against each other, as V2 did."""

    def forward(self, x):
        return pick(self.cfg, einsum(x, self.centroids, "bt d, e d -> bt e").softmax(-1))


class CosineAffinity(Router):
    """Scores by the angle to the centroid alone."""

    def forward(self, x):
        unit = nn.functional.normalize
        return pick(self.cfg, einsum(unit(x), unit(self.centroids), "bt d, e d -> bt e"))


def pick(cfg, score):
    """Choose and weigh by one and the same score."""
    gate, ids = score.topk(cfg.n_activated_experts)
    return cfg.route_scale * gate / gate.sum(-1, keepdim=True), ids, score


class BiasAtFullSizeOnly(Router):
    """Has a bias where `dim` is 7168, as the release's demo code."""

    def __init__(self, cfg):
        super().__init__(cfg)
        if cfg.dim != 7168:
            self.bias = None

    def forward(self, x):
        return pick(self.cfg, einsum(x, self.centroids, "bt d, e d -> bt e").sigmoid())


def limit_groups_with_zeros(choice, groups, keep, best):
    grouped = rearrange(choice, "bt (g e) -> bt g e", g=groups)
    kept = grouped.topk(best, dim=-1).values.sum(-1).topk(keep, dim=-1).indices
    dropped = torch.ones(grouped.shape[:2], dtype=torch.bool).scatter(-1, kept, False)
    return rearrange(grouped.masked_fill(dropped[..., None], 0.0), "bt g e -> bt (g e)")


# latent attention


class RotaryKeyPerHead(MLA):
    """Gives every head a rotary key of its own."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.w_dkv = Linear(cfg.dim, cfg.kv_lora_rank + cfg.n_heads * cfg.qk_rope_head_dim)

    def latents(self, x, phase):
        c_kv, keys = self.w_dkv(x).tensor_split([self.cfg.kv_lora_rank], dim=-1)
        keys = rotate(rearrange(keys, "b t (h r) -> b t h r", h=self.cfg.n_heads), phase)
        return torch.cat([self.kv_norm(c_kv), rearrange(keys, "b t h r -> b t (h r)")], dim=-1)

    def attend_naive(self, q_nope, q_rope, latent, mask):
        c_kv, keys = latent.tensor_split([self.cfg.kv_lora_rank], dim=-1)
        keys = rearrange(keys, "b s (h r) -> b s h r", h=self.cfg.n_heads)
        return attend_kv(self, q_nope, q_rope, self.w_ukv(c_kv), keys, mask)


class RotaryKeyFromLatent(MLA):
    """Makes the rotary key from c_kv."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.w_kr = Linear(cfg.kv_lora_rank, cfg.qk_rope_head_dim)

    def latents(self, x, phase):
        c_kv = self.kv_norm(self.w_dkv(x)[..., : self.cfg.kv_lora_rank])
        return torch.cat([c_kv, rotate(self.w_kr(c_kv), phase)], dim=-1)


class NoPosition(MLA):
    """Never rotates."""

    def forward(self, x, phase, mask, cache=None, absorb=None):
        return super().forward(x, torch.ones_like(phase), mask, cache, absorb)


class SinusoidalPosition(MLA):
    """Adds the position to the input instead of turning queries and keys."""

    def forward(self, x, phase, mask, cache=None, absorb=None):
        wave = rearrange(torch.view_as_real(phase), "b t r two -> b t (r two)")
        x = x + nn.functional.pad(wave, (0, x.shape[-1] - wave.shape[-1]))
        return super().forward(x, torch.ones_like(phase), mask, cache, absorb)


class ExpandedCache(MLA):
    """Caches every head's keys and values."""

    def forward(self, x, phase, mask, cache=None, absorb=None):
        cfg, latent = self.cfg, self.latents(x, phase)
        kv = self.w_ukv(latent[..., : cfg.kv_lora_rank])
        held = torch.cat([kv, latent[..., cfg.kv_lora_rank :]], dim=-1)
        if cache is not None:
            held = cache.append(held)
        kv, k_rope = held.split([kv.shape[-1], cfg.qk_rope_head_dim], dim=-1)
        o = attend_kv(self, *self.queries(x, phase), kv, k_rope[:, :, None], mask)
        return self.w_o(rearrange(o, "b t h v -> b t (h v)"))


def attend_kv(mla, q_nope, q_rope, kv, k_rope, mask):
    """Attend with given keys and values; `k_rope` has H heads or one."""
    kv = rearrange(kv, "b s (h d) -> b s h d", h=mla.cfg.n_heads)
    k_nope, v = kv.tensor_split([mla.cfg.qk_nope_head_dim], dim=-1)
    score = einsum(q_nope, k_nope, "b t h n, b s h n -> b h t s")
    k_rope = k_rope.expand(-1, -1, mla.cfg.n_heads, -1)
    score = score + einsum(q_rope, k_rope, "b t h r, b s h r -> b h t s")
    score = (score * mla.scale).masked_fill(~mask[:, None], -torch.inf)
    return einsum(score.softmax(-1), v, "b h t s, b s h v -> b t h v")


class QueriesCompressedInTrainingOnly(MLA):
    """Uses one folded matrix, without the norm between, once trained."""

    def queries(self, x, phase):
        if self.training:
            return super().queries(x, phase)
        q = rearrange(self.w_uq(self.w_dq(x)), "b t (h d) -> b t h d", h=self.cfg.n_heads)
        q_nope, q_rope = q.tensor_split([self.cfg.qk_nope_head_dim], dim=-1)
        return q_nope, rotate(q_rope, phase)


class NoLatentNorm(MLA):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.kv_norm = nn.Identity()


class NoQueryNorm(MLA):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.q_norm = nn.Identity()


def memory_without_rotary_key(cfg):
    return cfg.n_layers * cfg.kv_lora_rank


# YaRN


def scale_without_mscale(cfg):
    return 1 / math.sqrt(cfg.qk_head_dim)


def scale_not_squared(cfg):
    return (0.1 * cfg.mscale * math.log(cfg.rope_factor) + 1) / math.sqrt(cfg.qk_head_dim)


def scale_reversed(cfg):
    m = 0.1 * cfg.mscale * math.log(cfg.rope_factor) + 1
    return 1 / (m * m * math.sqrt(cfg.qk_head_dim))


def scale_from_wrong_field(cfg):
    m = 0.1 * math.log(cfg.rope_factor) + 1  # for mscale 1, whatever the config says
    return m * m / math.sqrt(cfg.qk_head_dim)


def _stretched(cfg, ramp):
    pairs = torch.arange(0, cfg.rotated_dim, 2)
    plain = cfg.rope_theta ** (-pairs / cfg.rotated_dim)
    return plain * (1 - ramp) + plain / cfg.rope_factor * ramp


def ramp_by_index(cfg):
    return _stretched(cfg, torch.linspace(0, 1, cfg.rotated_dim // 2))


def ramp_reversed(cfg):
    low, high = ramp_bounds(cfg)
    return _stretched(
        cfg, 1 - ((torch.arange(cfg.rotated_dim // 2) - low) / (high - low)).clamp(0, 1)
    )


def all_pairs_stretched(cfg):
    return _stretched(cfg, torch.ones(cfg.rotated_dim // 2))


def no_pair_stretched(cfg):
    return _stretched(cfg, torch.zeros(cfg.rotated_dim // 2))
