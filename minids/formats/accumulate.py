"""A sum that loses digits, as Hopper's tensor cores add FP8 products, and its cure: promotion.

Paper   DeepSeek-V3 (arXiv:2412.19437), sections 3.3.2 ("Increasing Accumulation Precision",
        Figure 7b) and 3.5.2; 32 products, 13 digits, FP22: arXiv:2505.09343, section 3.1.
Dims    M and N rows of the operands; K their common axis, along which is summed.
Book    book/11_fp8.ipynb               Kernel  none
Differs the hardware's exact sum is not published. Assumed: what lies below the last digit is cut
        off towards zero, products and the running sum alike; all that is left is added exactly; the
        result is cut to as many digits once more, where it goes back to its register. The report
        says "nearly 2 %" for K = 4096 and does not say for which numbers.
"""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor


def matmul_limited(
    a: Float[Tensor, "M K"],
    b: Float[Tensor, "N K"],
    bits: int = 13,
    group: int = 32,
    promote: int | None = None,
) -> Float[Tensor, "M N"]:
    """Return a b^T in FP64, summed `group` products at a time with `bits` digits behind the point.

    Each product and the running sum are aligned to the largest of them. With `promote` (the
    report's N_C, 128) the sum moves to an FP32 accumulator after that many products and starts
    again from 0. Products are exact where FP64 holds them: those of E4M3 and BF16 values are.
    """
    _check(bits, group, promote)
    total = register = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    parts = zip(a.double().split(group, -1), b.double().split(group, -1), strict=True)
    for n_groups, (a_part, b_part) in enumerate(parts, start=1):
        products = rearrange(a_part, "m k -> m 1 k") * b_part
        register = _add(register, products, bits)
        if promote and n_groups * group % promote == 0:
            total = (total + register).float().double()
            register = torch.zeros_like(register)
    return (total + register).float().double() if promote else register


def _add(
    register: Float[Tensor, "M N"], products: Float[Tensor, "M N group"], bits: int
) -> Float[Tensor, "M N"]:
    """Add products to the register on the grid of the largest number among them."""
    largest = torch.maximum(products.abs().amax(-1), register.abs())
    last_digit = _exponent(largest) - bits
    aligned = _cut(products, rearrange(last_digit, "m n -> m n 1")).sum(-1)
    result = _cut(register, last_digit) + aligned
    return _cut(result, _exponent(result) - bits)


def _exponent(x: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Return floor(log2 |x|)."""
    return torch.frexp(x).exponent - 1


def _cut(x: Float[Tensor, "*shape"], last_digit: Int[Tensor, "*#shape"]) -> Float[Tensor, "*shape"]:
    """Keep the multiples of 2^last_digit, towards zero."""
    unit = torch.exp2(last_digit.double())
    return (x / unit).trunc() * unit


def _check(bits: int, group: int, promote: int | None) -> None:
    if not 1 <= bits <= 52:
        raise ValueError(f"bits must be from 1 to 52, the digits of FP64, got {bits}")
    if group < 1:
        raise ValueError(f"group must be 1 or more, got {group}")
    if promote is not None and (promote < 1 or promote % group):
        raise ValueError(f"promote must be a multiple of group, got {promote} and {group}")
