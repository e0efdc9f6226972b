"""Groups with a scale: equal to loops over groups, and what scales do to small and bad numbers."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from minids.formats.bits import E4M3
from minids.formats.groups import (
    ACTIVATION_FLOOR,
    BLOCK,
    COLUMN,
    TILE,
    Scaled,
    dequantise,
    next_power_of_two,
    quantise,
    scale_shape,
)

SMALL = [(1, 4), (4, 4), (4, 1), (3, 5)]  # groups that fit many times into small matrices
FORMATS = [None, "ue8m0"]
with_groups = pytest.mark.parametrize("group", [TILE, BLOCK, COLUMN], ids=str)
with_formats = pytest.mark.parametrize("scale_fmt", FORMATS)


# oracle: a loop over groups in numpy, E4M3 from its list of values

_VALUES = np.array(
    [m * 2.0**-9 for m in range(8)]
    + [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
)


def nearest_e4m3(x: float) -> float:
    """Return the nearest value by a search; of two the one with the even mantissa."""
    distance = np.abs(_VALUES - abs(x))
    near = np.flatnonzero(distance == distance.min())
    return math.copysign(_VALUES[min(near, key=lambda i: i % 2)], x)


def loop(
    x: np.ndarray, group: tuple[int, int], scale_fmt: str | None, floor: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return values, scales and what they stand for, a group and a number at a time, in FP32."""
    rows, cols = x.shape
    values, product = np.zeros_like(x), np.zeros_like(x)
    scales = np.zeros((-(-rows // group[0]), -(-cols // group[1])), dtype=np.float32)
    tiny = np.float32(448 * 2.0**-126)
    for g in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            places = [
                (r, c)
                for r in range(g * group[0], min((g + 1) * group[0], rows))
                for c in range(j * group[1], min((j + 1) * group[1], cols))
            ]
            largest = max(*(abs(x[place]) for place in places), np.float32(floor), tiny)
            scale = np.float32(largest) / np.float32(448)
            if scale_fmt == "ue8m0":
                power = 2.0**-149
                while power < scale:
                    power *= 2
                scale = np.float32(power)
            scales[g, j] = scale
            for place in places:
                values[place] = nearest_e4m3(float(x[place] / scale))
                product[place] = values[place] * scale
    return values, scales, product


def assert_equals_the_loop(x: torch.Tensor, group, scale_fmt, floor=0.0) -> None:
    got = quantise(x, group, scale_fmt, floor)
    values, scales, product = loop(x.numpy(), group, scale_fmt, floor)
    assert got.group == group
    assert got.scale.dtype == torch.float32
    assert got.scale.shape == scale_shape(tuple(x.shape), group)
    assert torch.equal(got.scale, torch.from_numpy(scales))
    assert torch.equal(got.values.float(), torch.from_numpy(values))
    assert torch.equal(dequantise(got), torch.from_numpy(product))


def scattered(*shape: int, decades: float = 3.0) -> torch.Tensor:
    """Return random numbers of both signs whose sizes differ by many powers of ten."""
    return torch.randn(shape) * 10 ** torch.empty(shape).uniform_(-decades, decades)


# by hand


def test_by_hand():
    """The larger of 3 and 0.1 lands on 448; 0.1 becomes 14.93, between 14 and 15."""
    q = quantise(torch.tensor([[3.0, 0.1]]), (1, 2))
    assert q.scale.tolist() == [[pytest.approx(3 / 448)]]
    assert q.values.float().tolist() == [[448.0, 15.0]]
    assert dequantise(q).tolist() == [[3.0, pytest.approx(15 * 3 / 448)]]


def test_power_of_two_scales_by_hand():
    """3/448 lies between 2^-8 and 2^-7; 3 becomes 384, 0.1 becomes 12.8, between 12 and 13."""
    q = quantise(torch.tensor([[3.0, 0.1]]), (1, 2), "ue8m0")
    assert q.scale.tolist() == [[2**-7]]
    assert q.values.float().tolist() == [[384.0, 13.0]]
    assert dequantise(q).tolist() == [[3.0, 13 / 128]]


def test_a_scale_above_a_power_of_two_goes_to_the_next():
    """A scale of 2^20 (1 + 2^-23): FP32 rounds its logarithm to 20."""
    q = quantise(torch.tensor([[2**20 * (448 + 2**-15)]]), scale_fmt="ue8m0")
    assert (q.scale.item(), q.values.float().item()) == (2**21, 224)


def test_groups_by_hand():
    """Largest numbers by tiles of two, by blocks, by columns, and of the whole matrix."""
    x = torch.tensor([[1.0, 2.0, 4.0, 8.0], [1.0, 1.0, 16.0, 1.0]])
    assert (448 * quantise(x, (1, 2)).scale).tolist() == [[2.0, 8.0], [1.0, 16.0]]
    assert (448 * quantise(x, (2, 2)).scale).tolist() == [[2.0, 16.0]]
    assert (448 * quantise(x, (2, 1)).scale).tolist() == [[1.0, 2.0, 16.0, 8.0]]
    assert (448 * quantise(x, (2, 4)).scale).tolist() == [[16.0]]


def test_zeros_have_the_scale_of_the_floor():
    """A max-abs below 1e-4 counts as 1e-4 (inference/kernel.py); 2^-22 is the next power."""
    zeros = torch.zeros(3, 200)
    plain = quantise(zeros, TILE, floor=ACTIVATION_FLOOR)
    assert torch.equal(plain.scale, (torch.tensor(1e-4) / 448).expand(3, 2))
    assert plain.scale[0, 0].item() == pytest.approx(2.232e-7, rel=1e-4)
    power = quantise(zeros, TILE, "ue8m0", ACTIVATION_FLOOR)
    assert power.scale.unique().tolist() == [2**-22]
    assert power.scale[0, 0].item() == pytest.approx(2.384e-7, rel=1e-4)
    for q in (plain, power):
        assert not q.values.float().any()


@pytest.mark.parametrize(
    ("shape", "group", "want"),
    [
        ((576, 7168), BLOCK, (5, 56)),  # V3's kv_a_proj_with_mqa
        ((7168, 16384), BLOCK, (56, 128)),  # o_proj
        ((2, 9, 7168), TILE, (2, 9, 56)),  # a token's scales on its way to an expert
        ((130, 3), COLUMN, (2, 3)),
        ((1, 1), BLOCK, (1, 1)),
        ((0, 256), TILE, (0, 2)),
    ],
)
def test_scale_shape(shape, group, want):
    assert scale_shape(shape, group) == want
    x = torch.zeros(shape) if math.prod(shape) < 10**6 else torch.zeros(shape, device="meta")
    assert quantise(x, group).scale.shape == want


# oracle


@with_groups
@with_formats
@pytest.mark.parametrize("width", [1, 127, 129])
def test_equals_the_loop_at_ragged_widths(group, scale_fmt, width):
    assert_equals_the_loop(scattered(130, width), group, scale_fmt)


@with_groups
@with_formats
def test_equals_the_loop_at_576(group, scale_fmt):
    """V3's latent and its rotary key: 4.5 blocks."""
    assert_equals_the_loop(scattered(5, 576), group, scale_fmt, ACTIVATION_FLOOR)


def test_middles_are_divided_by_the_scale():
    """As the release does; the inverse of the scale would round some to the other neighbour."""
    largest = torch.rand(20, 1) + 0.5
    middle = torch.from_numpy((_VALUES[1:] + _VALUES[:-1]) / 2).float()
    x = torch.cat([largest, middle * (largest / 448)], dim=1)
    assert_equals_the_loop(x, (1, x.shape[1]), None)
    scale = quantise(x, (1, x.shape[1])).scale
    assert (x * (1 / scale) != x / scale).any()


_LARGE = 247 * 2.0**120  # what is larger may come back infinite, see below


@st.composite
def matrices(draw) -> torch.Tensor:
    """Draw a small matrix: FP32 numbers, zeros and denormals often."""
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    number = st.floats(-_LARGE, _LARGE, width=32)
    small = st.sampled_from([0.0, -0.0, 2.0**-149, 2.0**-127, 2.0**-126, 1e-36, _LARGE])
    size = shape[0] * shape[1]
    numbers = draw(st.lists(number | small, min_size=size, max_size=size))
    return torch.tensor(numbers, dtype=torch.float32).reshape(shape)


groups = st.sampled_from(SMALL)
scale_formats = st.sampled_from(FORMATS)


@settings(max_examples=60)
@given(x=matrices(), group=groups, scale_fmt=scale_formats, floor=st.sampled_from([0.0, 1e-4, 5.0]))
def test_any_matrix_equals_the_loop(x, group, scale_fmt, floor):
    assert_equals_the_loop(x, group, scale_fmt, floor)


@with_groups
@with_formats
def test_a_batch_is_its_matrices(group, scale_fmt):
    x = scattered(2, 3, 130, 200)
    whole = quantise(x, group, scale_fmt)
    for i in range(2):
        for j in range(3):
            one = quantise(x[i, j], group, scale_fmt)
            assert torch.equal(whole.scale[i, j], one.scale)
            assert torch.equal(whole.values[i, j].float(), one.values.float())
    assert torch.equal(dequantise(whole)[1, 2], dequantise(quantise(x[1, 2], group, scale_fmt)))


# properties


@with_groups
@with_formats
def test_error_is_at_most_a_sixteenth(group, scale_fmt):
    """Half a step of 1/8 where E4M3 is normal; below, half of the smallest step, 2^-10 scales."""
    x = scattered(300, 300)
    q = quantise(x, group, scale_fmt)
    scale = dequantise(Scaled(torch.ones(x.shape).to(torch.float8_e4m3fn), q.scale, group)).double()
    error = (dequantise(q).double() - x).abs()
    normal = x.abs() >= E4M3.min_normal * scale
    assert 0.1 < normal.double().mean() < 0.99  # both kinds are here
    assert (error <= x.abs() / 16)[normal].all()
    assert (error / x.abs())[normal].max() > 0.05
    # products are rounded to FP32
    assert (error <= scale * 2**-10 * (1 + 2**-20))[~normal].all()


@with_groups
@with_formats
def test_powers_of_two_are_exact(group, scale_fmt):
    """With either kind of scale, as far down as E4M3 is normal below the largest."""
    x = 2.0 ** torch.randint(-3, 12, (200, 300)) * torch.randint(0, 2, (200, 300)).sub(0.5).sign()
    assert torch.equal(dequantise(quantise(x, group, scale_fmt)), x)


@with_groups
def test_a_second_time_gives_the_same_values(group):
    """The largest is 448 again, and a scale that rounds otherwise moves nothing over a middle."""
    x = scattered(300, 300)
    once = quantise(x, group)
    again = quantise(dequantise(once), group)
    assert torch.equal(again.values.float(), once.values.float())
    torch.testing.assert_close(again.scale, once.scale, rtol=2**-23, atol=0)  # one FP32 step


@with_groups
def test_a_second_time_gives_the_same_matrix_with_powers_of_two(group):
    """Where the largest was rounded down to 224 the scale halves and the values double."""
    once = dequantise(quantise(scattered(300, 300), group, "ue8m0"))
    assert torch.equal(dequantise(quantise(once, group, "ue8m0")), once)
    halved = quantise(torch.tensor([[225.0]]), TILE, "ue8m0")
    assert (halved.values.float().item(), halved.scale.item()) == (224, 1)
    doubled = quantise(dequantise(halved), TILE, "ue8m0")
    assert (doubled.values.float().item(), doubled.scale.item()) == (448, 0.5)


@with_groups
@with_formats
def test_twice_the_matrix_has_the_same_values(group, scale_fmt):
    x = scattered(140, 140)
    one, two = quantise(x, group, scale_fmt), quantise(2 * x, group, scale_fmt)
    assert torch.equal(one.values.float(), two.values.float())
    assert torch.equal(2 * one.scale, two.scale)


@with_formats
def test_the_largest_fills_the_range(scale_fmt):
    """It lands on 448, or on more than 224 where the scale is a power of two rounded up."""
    values = quantise(scattered(500, 128), TILE, scale_fmt).values.float().abs().amax(-1)
    if scale_fmt is None:
        assert values.unique().tolist() == [448]
    else:
        assert values.min() == 224  # 224 to 232 round to it
        assert values.max() == 448


@with_formats
def test_groups_do_not_see_each_other(scale_fmt):
    x = scattered(256, 384)
    q = quantise(x, BLOCK, scale_fmt)
    blocks = x.unflatten(0, (2, 128)).unflatten(2, (3, 128))  # g r j c
    moved = blocks[[1, 0]][:, :, [2, 0, 1]].flatten(2, 3).flatten(0, 1)
    p = quantise(moved, BLOCK, scale_fmt)
    assert torch.equal(p.scale, q.scale[[1, 0]][:, [2, 0, 1]])
    blocks = q.values.float().unflatten(0, (2, 128)).unflatten(2, (3, 128))
    assert torch.equal(
        p.values.float(), blocks[[1, 0]][:, :, [2, 0, 1]].flatten(2, 3).flatten(0, 1)
    )


@pytest.mark.parametrize(("group", "turned"), [(TILE, COLUMN), (BLOCK, BLOCK), (COLUMN, TILE)])
@with_formats
def test_transposing_rounds_nothing(group, turned, scale_fmt):
    x = scattered(2, 130, 200)
    q = quantise(x, group, scale_fmt)
    assert q.mT.group == turned
    assert torch.equal(dequantise(q.mT), dequantise(q).mT)
    direct = quantise(x.mT, turned, scale_fmt)
    assert torch.equal(direct.scale, q.mT.scale)
    assert torch.equal(direct.values.float(), q.mT.values.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_input_is_scaled_in_fp32(dtype):
    x = scattered(3, 200, decades=1).to(dtype)
    one, other = quantise(x), quantise(x.float())
    assert torch.equal(one.scale, other.scale)
    assert torch.equal(one.values.float(), other.values.float())


def test_the_product_is_rounded_once():
    """7/16 of a BF16 step above 1: FP32 keeps it, BF16 rounds it down; a BF16 scale would be 1."""
    q = Scaled(torch.tensor([[9.0]]).to(torch.float8_e4m3fn), torch.tensor([[1 + 7 / 2048]]), TILE)
    assert dequantise(q).item() == 9 * (1 + 7 / 2048)
    assert dequantise(q, torch.bfloat16).dtype == torch.bfloat16
    assert dequantise(q, torch.bfloat16).item() == 9.0
    wide = Scaled(q.values, torch.tensor([[1 + 13 / 2048]]), TILE)
    assert dequantise(wide, torch.bfloat16).item() == 9.0625


def by_formula(q: Scaled, dtype: torch.dtype) -> torch.Tensor:
    """Return value times scale in FP32, then rounded, an element at a time."""
    rows, cols = q.values.shape[-2:]
    r, c = torch.arange(rows) // q.group[0], torch.arange(cols) // q.group[1]
    return (q.values.float() * q.scale[..., r[:, None], c]).to(dtype)


SCALES = {
    "ordinary": lambda shape: torch.rand(shape) * 1e-3,
    "many sizes": lambda shape: scattered(*shape, decades=30).abs(),
    "denormal": lambda shape: torch.rand(shape) * 1e-39,
    "above 2^120, where 256 times a scale overflows": lambda shape: torch.rand(shape) * 1e38,
    "NaN": lambda shape: torch.where(torch.rand(shape) < 0.5, torch.nan, 1.0),
    "infinite": lambda shape: torch.where(torch.rand(shape) < 0.5, torch.inf, 1.0),
}


@with_groups
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("with_nan", [False, True], ids=["numbers", "NaN codes"])
def test_every_code_times_its_scale(group, dtype, scales, with_nan):
    """All codes, at widths that 128 does not divide, by the formula: bit for bit."""
    code = torch.arange(256, dtype=torch.uint8)
    code = code if with_nan else code[code & 0x7F != 0x7F]
    shape = (2, 200, 300)
    code = code[torch.randint(len(code), shape)]
    scale = SCALES[scales](scale_shape(shape, group))
    q = Scaled(code.view(torch.float8_e4m3fn), scale, group)
    got, want = dequantise(q, dtype), by_formula(q, dtype)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got.signbit() | got.isnan(), want.signbit() | want.isnan())
    turned = dequantise(q.mT, dtype)
    torch.testing.assert_close(turned, want.mT, rtol=0, atol=0, equal_nan=True)


@with_groups
def test_one_nan_code_is_a_nan(group):
    for code in (0x7F, 0xFF):
        codes = torch.zeros(130, 130, dtype=torch.uint8)
        codes[129, 3] = code
        q = Scaled(
            codes.view(torch.float8_e4m3fn), torch.ones(scale_shape((130, 130), group)), group
        )
        assert dequantise(q).isnan().nonzero().tolist() == [[129, 3]]


# bad numbers


@with_groups
@with_formats
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_number_spoils_its_group_and_no_other(group, scale_fmt, bad):
    x = scattered(256, 256)
    clean = dequantise(quantise(x, group, scale_fmt))
    x[130, 5] = bad
    back = dequantise(quantise(x, group, scale_fmt))
    spoilt = torch.zeros(256, 256, dtype=torch.bool)
    spoilt[
        130 // group[0] * group[0] : (130 // group[0] + 1) * group[0],
        5 // group[1] * group[1] : (5 // group[1] + 1) * group[1],
    ] = True
    assert back[spoilt].isnan().all()
    assert torch.equal(back[~spoilt], clean[~spoilt])


@with_groups
@with_formats
def test_zeros_come_back_as_zeros(group, scale_fmt):
    """Of a scale of 0 they would come back as NaN."""
    q = quantise(torch.zeros(130, 130), group, scale_fmt)
    assert (q.scale > 0).all()
    assert not dequantise(q).any()


@with_formats
def test_denormals_have_a_normal_scale(scale_fmt):
    """Below 2^-126 FP32 loses digits; such numbers count in steps of the smallest normal scale."""
    x = torch.tensor([[2.0**-127, -(2.0**-130), 2.0**-149, 0.0]])
    q = quantise(x, scale_fmt=scale_fmt)
    assert q.scale.item() == 2.0**-126
    assert dequantise(q).tolist() == [[2.0**-127, -(2.0**-130), 0.0, 0.0]]


@with_formats
def test_large_numbers_survive(scale_fmt):
    x = torch.tensor([[_LARGE, -_LARGE / 3]])
    torch.testing.assert_close(dequantise(quantise(x, scale_fmt=scale_fmt)), x, rtol=1 / 16, atol=0)


def test_the_largest_numbers_may_be_rounded_to_infinity():
    """With a power of two 248 is rounded up to 256, and 256 times 2^120 is more than FP32 holds."""
    x = torch.tensor([[248 * 2.0**120]])
    q = quantise(x, scale_fmt="ue8m0")
    assert (q.values.float().item(), q.scale.item()) == (256, 2.0**120)
    assert dequantise(q).item() == torch.inf
    assert dequantise(quantise(x)).isfinite().all()


def test_the_floor_leaves_larger_groups_alone():
    x = torch.tensor([[1e-4, 1e-9], [2.0, 1.0]])
    assert torch.equal(quantise(x, floor=1e-4).scale, quantise(x).scale)
    assert quantise(x, floor=1.0).scale.tolist() == [
        [pytest.approx(1 / 448)],
        [pytest.approx(2 / 448)],
    ]


@pytest.mark.parametrize("scale_fmt", ["fp32", "UE8M0", ""])
def test_an_unknown_format_of_scales_is_refused(scale_fmt):
    with pytest.raises(ValueError, match=f"scale_fmt must be None or 'ue8m0', got '{scale_fmt}'"):
        quantise(torch.ones(1, 1), scale_fmt=scale_fmt)


# powers of two


def test_next_power_of_two_by_hand():
    x = torch.tensor([1.0, 1.5, 2.0, 3.0, 0.3, 2**-22 + 2**-40, torch.inf])
    assert next_power_of_two(x).tolist() == [1.0, 2.0, 2.0, 4.0, 0.5, 2**-21, torch.inf]
    assert next_power_of_two(torch.tensor(torch.nan)).isnan()


def test_next_power_of_two_is_exact_at_every_exponent():
    """log2 in FP32 takes the next number above a power for the power itself."""
    power = torch.tensor([2.0**n for n in range(-126, 127)])
    above = power.nextafter(torch.tensor(torch.inf))
    assert torch.equal(next_power_of_two(power), power)
    assert torch.equal(next_power_of_two(above), 2 * power)
    assert torch.equal(next_power_of_two(power.nextafter(torch.tensor(0.0))), power)
    assert not torch.equal(torch.exp2(above.log2().ceil()), 2 * power)


# what groups are for


def flushed(x: torch.Tensor, group: tuple[int, int], scale_fmt: str | None = None) -> float:
    """Return the share of numbers that become zero, in per cent."""
    return 100 * (quantise(x, group, scale_fmt).values.float() == 0).double().mean().item()


def test_smaller_groups_flush_fewer_numbers_to_zero():
    """Log-normal numbers, sigma 3. How many a scale of the whole matrix loses is up to its largest
    number, so to chance and to the matrix's size; of tiles there are thousands."""
    x = (3 * torch.randn(1024, 1024)).exp()
    whole, tile, power = flushed(x, (1024, 1024)), flushed(x, TILE), flushed(x, TILE, "ue8m0")
    assert 50 < whole < 80
    assert tile == pytest.approx(5.3, abs=0.3)
    assert power == pytest.approx(6.6, abs=0.3)
    assert flushed(x, BLOCK) > 5 * tile


def test_rounding_alone_costs_gaussian_numbers_2_6_per_cent():
    x = torch.randn(10**6)
    error = (x.to(torch.float8_e4m3fn).float() - x).norm() / x.norm()
    assert error.item() == pytest.approx(0.026, abs=0.001)
