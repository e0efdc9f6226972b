"""Floating point from its bits: a sign, an exponent, a mantissa, and what is left out.

Paper   DeepSeek-V3 (arXiv:2412.19437), sections 3.3.2 (E4M3 everywhere) and 3.3.3 (E5M6);
        E4M3 and E5M2: arXiv:2209.05433.
Dims    none.
Book    book/11_fp8.ipynb               Kernel  none
Differs E5M6 has no published definition but its name: here it is built as E5M2, bias 15 and a top
        exponent that holds infinities and NaN.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor


class Format(NamedTuple):
    """A sign bit, then exponent and mantissa; without `infinity` one code a sign is left to NaN."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    infinity: bool = True  # the top exponent holds infinities and NaN, as in FP16

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def max(self) -> float:
        """The largest finite value."""
        if self.infinity:
            return (2 - 2.0**-self.mantissa_bits) * 2.0**self.bias
        return (2 - 2 * 2.0**-self.mantissa_bits) * 2.0 ** (self.bias + 1)  # below NaN's code

    @property
    def min_normal(self) -> float:
        return 2.0 ** (1 - self.bias)

    @property
    def min_subnormal(self) -> float:
        return self.min_normal * 2.0**-self.mantissa_bits


class Fields(NamedTuple):
    """The three parts of a code, as whole numbers."""

    sign: Integer[Tensor, "*shape"]
    exponent: Integer[Tensor, "*shape"]
    mantissa: Integer[Tensor, "*shape"]


E4M3 = Format("E4M3", 4, 3, infinity=False)  # torch.float8_e4m3fn
E5M2 = Format("E5M2", 5, 2)  # torch.float8_e5m2
E5M6 = Format("E5M6", 5, 6)  # 12 bits


def round_to(x: Float[Tensor, "*shape"], fmt: Format) -> Float[Tensor, "*shape"]:
    """Return the nearest value of `fmt`, ties to even; what is larger than `max` becomes `max`.

    Infinities become `max` too, NaN stays NaN.
    """
    x = x.clamp(-fmt.max, fmt.max)
    _, exponent = torch.frexp(x)  # |x| in [1/2, 1) * 2^exponent
    least = 2 - fmt.bias  # subnormals have the spacing of the smallest normal numbers
    step = exponent.clamp(min=least) - 1 - fmt.mantissa_bits
    return torch.ldexp(torch.ldexp(x, -step).round(), step)


def fields(code: Integer[Tensor, "*shape"], fmt: Format) -> Fields:
    """Cut codes into sign, exponent and mantissa, from the top bit down."""
    code, m = code.long(), fmt.mantissa_bits
    top = 2**fmt.exponent_bits - 1
    return Fields(code >> (fmt.bits - 1) & 1, code >> m & top, code & (2**m - 1))


def decode(code: Integer[Tensor, "*shape"], fmt: Format) -> Float[Tensor, "*shape"]:
    """Return the values of codes, in FP32.

    A normal number is (1 + mantissa / 2^m) 2^(exponent - bias); exponent 0 has no leading 1 and
    counts as 1. Codes of infinity and NaN give infinity and NaN.
    """
    sign, exponent, mantissa = fields(code, fmt)
    steps = torch.where(exponent > 0, mantissa + 2**fmt.mantissa_bits, mantissa)
    last_digit = exponent.clamp(min=1) - fmt.bias - fmt.mantissa_bits
    value = torch.ldexp(steps.float(), last_digit)
    top, full = exponent == 2**fmt.exponent_bits - 1, mantissa == 2**fmt.mantissa_bits - 1
    if fmt.infinity:
        value = value.masked_fill(top, torch.nan).masked_fill(top & (mantissa == 0), torch.inf)
    else:
        value = value.masked_fill(top & full, torch.nan)
    return torch.where(sign == 1, -value, value)


def encode(x: Float[Tensor, "*shape"], fmt: Format) -> Integer[Tensor, "*shape"]:
    """Return the codes of the nearest values, ties to even: uint8, or int16 above eight bits.

    What is larger than `max`, infinities too, becomes the code of `max` with its sign, as in
    `round_to`: the code of infinity is never written. Every NaN becomes one code, all ones behind
    a sign of 0.
    """
    wide = x.double().nan_to_num(nan=0.0).clamp(-fmt.max, fmt.max)  # exact: FP64 holds any input
    fraction, exponent = torch.frexp(wide.abs())  # |x| = fraction * 2^exponent, [1/2, 1)
    significand = (fraction * 2**53).long()  # all 53 digits, a whole number
    least = 2 - fmt.bias  # the exponent of the smallest normal number and of all below it
    dropped = 52 - fmt.mantissa_bits + (least - exponent).clamp(min=0)
    kept = _drop_digits(significand, dropped.clamp(max=54))
    # A normal number keeps its leading 1, which is worth one step of the exponent; where rounding
    # carries over to the next power of two, the mantissa is 0 and the exponent has grown.
    code = ((exponent - least).clamp(min=0) << fmt.mantissa_bits) + kept
    code = code.masked_fill(wide == 0, 0) | x.signbit().long() << (fmt.bits - 1)
    code = code.masked_fill(x.isnan(), 2 ** (fmt.bits - 1) - 1)
    return code.to(torch.uint8 if fmt.bits <= 8 else torch.int16)


def _drop_digits(
    whole: Integer[Tensor, "*shape"], n: Integer[Tensor, "*shape"]
) -> Integer[Tensor, "*shape"]:
    """Drop the last n >= 1 binary digits and round to nearest: half goes to the even neighbour."""
    half = torch.ones_like(whole) << (n - 1)
    odd = whole >> n & 1
    return (whole + half - 1 + odd) >> n


def encode_scale(scale: Float[Tensor, "*shape"]) -> Integer[Tensor, "*shape"]:
    """Return a power of two's byte in UE8M0, its exponent plus 127; NaN and infinities are 0xFF.

    ValueError for any other number: `next_power_of_two` rounds scales up, as the release does.
    """
    mantissa, exponent = torch.frexp(scale.double())
    byte = torch.where(scale.isfinite(), exponent - 1 + 127, 255)
    bad = scale.isfinite() & ((mantissa != 0.5) | (byte < 0) | (byte > 254))
    if bad.any():
        raise ValueError(
            f"a UE8M0 scale must be a power of two from 2^-127 to 2^127, got {scale[bad][0].item()}"
        )
    return byte.to(torch.uint8)


def decode_scale(byte: Integer[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return 2^(byte - 127) in FP32, NaN for 0xFF."""
    scale = torch.ldexp(torch.ones(byte.shape, device=byte.device), byte.int() - 127)
    return scale.masked_fill(byte == 255, torch.nan)
