"""RMSNorm: divide by the root mean square, then scale each channel.

Paper   DeepSeek-V3 (arXiv:2412.19437), section 4.2 (on both latents too); RMSNorm arXiv:1910.07467.
Dims    D any normalised width (model width, query latent, KV latent).
Book    book/02_model.ipynb             Kernel  none
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn


def at_least_fp32(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Widen sixteen-bit numbers to FP32, where sums and exponentials need digits; FP64 stays."""
    return x.float() if x.element_size() < 4 else x


class RMSNorm(nn.Module):
    """Normalise the last axis in FP32 (or FP64), return the input's dtype."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "*shape D"]) -> Float[Tensor, "*shape D"]:
        wide = at_least_fp32(x)
        mean_square = torch.linalg.vecdot(wide, wide)[..., None] / wide.shape[-1]
        return self.gain * (wide * (mean_square + self.eps).rsqrt()).to(x.dtype)
