"""Floating point from its bits: a sign, an exponent, a mantissa, and what is left out.

Paper   DeepSeek-V3 (arXiv:2412.19437), sections 3.3.2 (E4M3 everywhere) and 3.3.3 (E5M6).
Dims    none.
Book    book/11_fp8.ipynb               Kernel  none
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Format(NamedTuple):
    """A sign bit, then exponent and mantissa; `max` is the largest finite value."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    max: float

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def min_normal(self) -> float:
        return 2.0 ** (1 - self.bias)

    @property
    def min_subnormal(self) -> float:
        return self.min_normal * 2.0**-self.mantissa_bits


E4M3 = Format("E4M3", 4, 3, 448.0)  # no infinity: its top exponent holds numbers, one code is NaN
E5M2 = Format("E5M2", 5, 2, 57344.0)
E5M6 = Format("E5M6", 5, 6, 65024.0)  # 12 bits


def round_to(x: Float[Tensor, "*shape"], fmt: Format) -> Float[Tensor, "*shape"]:
    """Return the nearest value of `fmt`, ties to even; what is larger than `max` becomes `max`.

    Infinities become `max` too, NaN stays NaN.
    """
    _, exponent = torch.frexp(x)  # |x| in [1/2, 1) * 2^exponent
    least = 2 - fmt.bias  # subnormals have the spacing of the smallest normal numbers
    step = exponent.clamp(min=least) - 1 - fmt.mantissa_bits
    rounded = torch.ldexp(torch.ldexp(x, -step).round(), step)
    return torch.where(x.isinf(), x, rounded).clamp(-fmt.max, fmt.max)
