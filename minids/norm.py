"""RMSNorm: divide by the root mean square, then scale each channel.

Paper   DeepSeek-V3 (arXiv:2412.19437), section 4.2 (on both latents too); RMSNorm arXiv:1910.07467.
Dims    D any normalised width (model width, query latent, KV latent).
Book    book/02_model.ipynb             Kernel  minids_kernels/norm_rms.py
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minids.impl import kernels


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Return a context in which what is computed on x keeps its dtype."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def at_least_fp32(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Widen sixteen-bit numbers to FP32, where sums and exponentials need digits; FP64 stays."""
    return x.float() if x.element_size() < 4 else x


def rms_norm(
    x: Float[Tensor, "*shape D"], gain: Float[Tensor, " D"], eps: float, impl: str = "torch"
) -> Float[Tensor, "*shape D"]:
    """Normalise the last axis in FP32 (or FP64), round to the input's dtype, apply the gain."""
    if impl == "triton":
        return kernels().rms_norm(x, gain, eps)
    wide = at_least_fp32(x)
    with without_autocast(x):
        mean_square = torch.linalg.vecdot(wide, wide)[..., None] / wide.shape[-1]
    return gain * (wide * (mean_square + eps).rsqrt()).to(x.dtype)


class RMSNorm(nn.Module):
    """Normalise the last axis, then scale each channel by a learned gain."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps, self.impl = eps, "torch"
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "*shape D"]) -> Float[Tensor, "*shape D"]:
        return rms_norm(x, self.gain, self.eps, self.impl)
