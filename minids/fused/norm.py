"""RMSNorm with its neighbours: the residual path before it, the FP8 product behind it.

Paper   DeepSeek-V3 (arXiv:2412.19437), Figure 2 and section 3.3.2; RMSNorm, arXiv:1910.07467.
Dims    D any normalised width.
Book    book/12_kernels.ipynb           Kernel  minids_kernels/norm_rms.py
"""

from jaxtyping import Float
from torch import Tensor

from minids.formats.groups import TILE, Scaled, quantise
from minids.impl import kernels
from minids.norm import rms_norm


def add_rms_norm(
    x: Float[Tensor, "*shape D"],
    y: Float[Tensor, "*shape D"],
    gain: Float[Tensor, " D"],
    eps: float,
    impl: str = "torch",
) -> tuple[Float[Tensor, "*shape D"], Float[Tensor, "*shape D"]]:
    """Return x + y, the residual path that goes on, and its norm."""
    if impl == "triton":
        return kernels().add_rms_norm(x, y, gain, eps)
    total = x + y
    return total, rms_norm(total, gain, eps)


def rms_norm_quantise(
    x: Float[Tensor, "*shape D"],
    gain: Float[Tensor, " D"],
    eps: float,
    scale_fmt: str | None = None,
    floor: float = 0.0,
    impl: str = "torch",
) -> Scaled:
    """Return the norm in FP8 by tiles; forward only."""
    if impl == "triton":
        return Scaled(*kernels().rms_norm_quantise(x, gain, eps, scale_fmt, floor))
    return quantise(rms_norm(x, gain, eps), TILE, scale_fmt, floor)


def add_rms_norm_quantise(
    x: Float[Tensor, "*shape D"],
    y: Float[Tensor, "*shape D"],
    gain: Float[Tensor, " D"],
    eps: float,
    scale_fmt: str | None = None,
    floor: float = 0.0,
    impl: str = "torch",
) -> tuple[Float[Tensor, "*shape D"], Scaled]:
    """Return x + y and its norm in FP8 by tiles; forward only."""
    if impl == "triton":
        total, codes = kernels().add_rms_norm_quantise(x, y, gain, eps, scale_fmt, floor)
        return total, Scaled(*codes)
    total = x + y
    return total, rms_norm_quantise(total, gain, eps, scale_fmt, floor)
