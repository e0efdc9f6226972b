"""Rotary positions: neighbouring channels turn as one complex number; YaRN slows the slow ones.

Paper   DeepSeek-V3 (arXiv:2412.19437), Eqs. 3, 8 and section 4.3;
        RoPE arXiv:2104.09864; YaRN arXiv:2309.00071.
Dims    R rotated channels (even), T positions.
Book    book/06_rope.ipynb              Kernel  minids_kernels/rope_rotate.py
Differs generic YaRN multiplies cos and sin by a temperature; DeepSeek's release multiplies the
        softmax scale by its square instead (inference/model.py), and so do we: never both.
"""

import math

import torch
from einops import rearrange
from jaxtyping import Complex, Float, Int
from torch import Tensor

from minids.config import Config
from minids.impl import kernels
from minids.norm import at_least_fp32


def ramp_bounds(cfg: Config) -> tuple[int, int]:
    """Return the pair where YaRN starts to interpolate and the pair from which it fully does.

    Pair k turns `original_seq_len * theta^(-2k/R) / 2 pi` times in the original context; the bounds
    are the pairs that turn `beta_fast` and `beta_slow` times (10 and 23 for V3).
    """

    def pair_that_turns(times: float) -> float:
        wavelength = cfg.original_seq_len / (2 * math.pi * times)
        return cfg.rotated_dim * math.log(wavelength) / (2 * math.log(cfg.rope_theta))

    low = math.floor(pair_that_turns(cfg.beta_fast))
    high = math.ceil(pair_that_turns(cfg.beta_slow))
    return max(low, 0), min(high, cfg.rotated_dim - 1)


def frequencies(cfg: Config) -> Float[Tensor, " R_half"]:
    """Return each pair's angle a position in radians, stretched by YaRN if `rope_factor` > 1."""
    dim = cfg.rotated_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    freq = 1.0 / cfg.rope_theta**exponents
    if cfg.rope_factor == 1:
        return freq
    low, high = ramp_bounds(cfg)
    span = max(high - low, 0.001)  # a ramp of no width is a step
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / span).clamp(0, 1)
    return freq * (1 - ramp) + freq / cfg.rope_factor * ramp


def softmax_scale(cfg: Config) -> float:
    """Return what scores are multiplied by: 1/sqrt(head width), times YaRN's mscale squared."""
    m = 0.1 * cfg.mscale * math.log(cfg.rope_factor) + 1.0
    return m * m / math.sqrt(cfg.qk_head_dim)


def phases(
    positions: Int[Tensor, "B T"], freq: Float[Tensor, " R_half"]
) -> Complex[Tensor, "B T R_half"]:
    """Return the unit complex numbers that turn each pair at each position."""
    angle = rearrange(positions, "b t -> b t 1") * at_least_fp32(freq)
    return torch.polar(torch.ones_like(angle), angle)


def rotate(
    x: Float[Tensor, "B T *heads R"], phase: Complex[Tensor, "#B T R_half"], impl: str = "torch"
) -> Float[Tensor, "B T *heads R"]:
    """Turn each pair of neighbouring channels (0, 1), (2, 3), ... by its position's angle."""
    if impl == "triton":
        return kernels().rotate(x, phase)
    # Complex views refuse odd storage offsets, of a slice here or of its gradient: both are copied.
    pairs = at_least_fp32(x).unflatten(-1, (-1, 2)).clone(memory_format=torch.contiguous_format)
    phase = phase[:, :, None] if x.ndim == 4 else phase  # of all heads
    turned = 1.0 * torch.view_as_real(torch.view_as_complex(pairs) * phase)
    return turned.flatten(-2).to(x.dtype)
