"""Sums that lose digits: the rule by hand, in exact fractions, and what it costs."""

from fractions import Fraction

import pytest
import torch

from minids.formats.accumulate import matmul_limited


def by_factors(products: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return operands of one row each whose products these are."""
    return torch.tensor([products]), torch.ones(1, len(products))


def random_e4m3(draw, m: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return [m, k] and [n, k] random numbers, rounded to E4M3."""
    return tuple(draw(rows, k).to(torch.float8_e4m3fn).double() for rows in (m, n))


# by hand


@pytest.mark.parametrize(
    ("products", "bits", "group", "want"),
    [
        ([1.0, 2**-13], 13, 32, 1 + 2**-13),  # the last digit of 1 is worth 2^-13 ...
        ([1.0, 2**-14], 13, 32, 1.0),  # ... what is smaller is lost
        ([1.0, 2**-14], 14, 32, 1 + 2**-14),
        ([-1.0, -(2**-14)], 13, 32, -1.0),  # towards zero
        ([1.0, -(2**-14)], 13, 32, 1.0),
        ([1.0, *[2**-14] * 31], 13, 32, 1.0),  # each is cut before they are added
        ([*[2**-14] * 31, 1.0], 13, 31, 1 + 15 * 2**-13),  # a group earlier: 31 = 15 * 2 + 1
        ([1.875, 1.25], 3, 32, 3.0),  # 3.125 needs a digit more than the register has
        ([1.75, 1.5, 0.25], 2, 1, 3.0),  # 3.25 -> 3 of two digits, the last one 0.5; 0.25 is less
        ([3.0, -3.0, 2**-20], 13, 1, 2**-20),  # nothing is lost where the sum is 0
        ([0.0, 0.0], 13, 32, 0.0),
    ],
)
def test_by_hand(products, bits, group, want):
    assert matmul_limited(*by_factors(products), bits=bits, group=group).item() == want


def test_promotion_by_hand():
    """128 products make 1, 128 more 2^-7; beside 1 each of these is too small to count."""
    operands = by_factors([2**-7] * 128 + [2**-14] * 128)
    assert matmul_limited(*operands).item() == 1.0
    assert matmul_limited(*operands, promote=128).item() == 1 + 2**-7


def test_what_is_left_after_the_last_promotion_counts():
    assert matmul_limited(*by_factors([1.0] * 130), promote=128).item() == 130


def test_the_accumulator_of_promotion_is_fp32():
    """2^24 + 1 is no FP32 number: added one at a time, both ones are lost."""
    operands = by_factors([2.0**24, *[0.0] * 31, 1.0, *[0.0] * 31, 1.0])
    assert matmul_limited(*operands, bits=52).item() == 2**24 + 2
    assert matmul_limited(*operands, bits=52, promote=32).item() == 2**24


# oracle: exact fractions, one product at a time


def cut(x: Fraction, last_digit: int) -> Fraction:
    unit = Fraction(2) ** last_digit
    return int(x / unit) * unit  # int cuts towards zero


def exponent(x: Fraction) -> int:
    """Return floor(log2 |x|) by trial."""
    power = 0
    while abs(x) >= Fraction(2) ** (power + 1):
        power += 1
    while abs(x) < Fraction(2) ** power:
        power -= 1
    return power


def tensor_core(a: list[float], b: list[float], bits: int, group: int, promote: int | None):
    total = register = Fraction(0)
    for start in range(0, len(a), group):
        terms = [register]
        for i in range(start, min(start + group, len(a))):
            terms.append(Fraction(a[i]) * Fraction(b[i]))
        if any(terms):
            last_digit = max(exponent(term) for term in terms if term) - bits
            register = sum((cut(term, last_digit) for term in terms), Fraction(0))
            if register:
                register = cut(register, exponent(register) - bits)
        if promote and (start + group) % promote == 0:
            total = Fraction(torch.tensor(float(total + register)).item())  # FP32
            register = Fraction(0)
    return float(total + register)


@pytest.mark.parametrize("draw", [torch.rand, torch.randn])
@pytest.mark.parametrize(
    ("k", "bits", "group", "promote"),
    [(1, 13, 32, None), (100, 13, 32, None), (100, 5, 8, None), (77, 3, 1, None),
     (200, 13, 32, 64), (100, 6, 8, 16)],
)  # fmt: skip
def test_equals_exact_fractions(draw, k, bits, group, promote):
    a, b = random_e4m3(draw, 3, 4, k)
    got = matmul_limited(a, b, bits, group, promote)
    want = [[tensor_core(p, q, bits, group, promote) for q in b.tolist()] for p in a.tolist()]
    assert got.tolist() == want


@pytest.mark.parametrize("group", [1, 32, 1000])
def test_with_all_digits_of_fp64_nothing_is_lost(group):
    a, b = random_e4m3(torch.randn, 5, 6, 1000)
    assert torch.equal(matmul_limited(a, b, bits=52, group=group), a @ b.T)


def test_it_takes_e4m3_tensors_themselves():
    a, b = (torch.randn(3, 64).to(torch.float8_e4m3fn) for _ in range(2))
    assert torch.equal(matmul_limited(a, b), matmul_limited(a.float(), b.float()))


# what it costs


def worst_error(draw, k: int, promote: int | None, size: int = 64) -> float:
    """Return the largest error in per cent: of each sum of positive numbers, else of their RMS."""
    a, b = random_e4m3(draw, size, size, k)
    exact = a @ b.T
    scale = exact if draw is torch.rand else exact.square().mean().sqrt()
    return 100 * ((matmul_limited(a, b, promote=promote) - exact).abs() / scale).max().item()


@pytest.mark.parametrize(
    ("draw", "promote", "least", "most"),
    [
        (torch.rand, None, 6.8, 7.2),  # 7.0 %
        (torch.rand, 128, 0.053, 0.062),  # 0.06 %
        # the worst of 4,096 errors of either sign: it varies with the draw
        (torch.randn, None, 0.7, 1.5),  # 1.2 %
        (torch.randn, 128, 0.03, 0.07),  # 0.05 %
    ],
)
def test_error_of_4096_products(draw, promote, least, most):
    """Uniform on [0, 1) and Gaussian, 64 x 64 sums; the report's "nearly 2 %" lies between."""
    assert least < worst_error(draw, 4096, promote) < most


def test_error_grows_with_k_unless_promoted():
    lengths = [512, 1024, 2048, 4096, 8192]
    plain = [worst_error(torch.rand, k, None, size=8) for k in lengths]
    promoted = [worst_error(torch.rand, k, 128, size=8) for k in lengths]
    assert plain == sorted(plain)
    assert plain[-1] > 10 * plain[0]
    assert max(promoted) < 0.1


def test_error_shrinks_with_digits():
    a, b = random_e4m3(torch.rand, 8, 8, 2048)
    errors = [(matmul_limited(a, b, bits=bits) - a @ b.T).abs().max() for bits in (8, 13, 18, 28)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0  # from 2^-18, a product of subnormals, to 2^9 are 28 digits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(bits=0), "bits must be from 1 to 52, the digits of FP64, got 0"),
        (dict(bits=53), "bits must be from 1 to 52, the digits of FP64, got 53"),
        (dict(group=0), "group must be 1 or more, got 0"),
        (dict(promote=100), "promote must be a multiple of group, got 100 and 32"),
        (dict(promote=0), "promote must be a multiple of group, got 0 and 32"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        matmul_limited(torch.ones(1, 32), torch.ones(1, 32), **arguments)
