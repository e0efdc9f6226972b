"""Chapter 11's exercises: other right answers pass, each mistake is told by its own property."""

import math

import numpy as np
import pytest
import torch

from minids import check
from minids.formats import bits, groups
from minids.learn.check import find

HAS_KEYS = bool(find("fp8.1").solution)
needs_keys = pytest.mark.skipif(not HAS_KEYS, reason="NOT RUN: a copy without solutions")

# which mistake must be told by which property: the first property that fails is what a reader sees
TOLD = {
    "fp8.1": {
        "the bias of E5M2": "exponent and mantissa",
        "the fields of E5M2": "exponent and mantissa",
        "subnormals forgotten": "subnormal",
        "subnormals with an exponent of their own": "subnormal",
        "an infinity, as IEEE formats have one": "top exponent",
    },
    "fp8.2": {
        "half is always rounded up": "a tie goes to the even code",
        "what does not fit is cut off": "nearer neighbour",
        "below 2^-6 is zero": "2^-9",
        "overflow is NaN": "beyond 448",
    },
    "fp8.3": {
        "the scale divides": "largest number is stored as 448",
        "one scale for all": "every 128 columns",
        "tiles along the tokens": "largest number is stored as 448",
        "the largest without its sign": "sign",
        "the scale from the mean": "largest number is stored as 448",
        "the short tile is dropped": "short",
        "nothing against zeros": "zeros",
    },
    "fp8.4": {
        "the smallest normal number is the end": "within 3 %",
        "nothing below 2^-9 is rounded up": "within 3 %",
        "an INT8 tile": "within 3 %",
    },
    "fp8.5": {
        "E4M3 without subnormals": "subnormal",
        "E4M3 cuts off": "a larger one",
        "INT8 cuts off": "half a step",
        "INT8 with 255 steps to a side": "INT8's small numbers",
        "zeros count as lost": "zeros",
    },
    "fp8.6": {
        "rounded down": "still fits",
        "rounded to the nearest": "still fits",
        "powers of two are doubled": "stay as they are",
        "log2 in FP32": "right above",
    },
    "fp8.7": {
        "divides, as the name says": "factor",
        "columns before rows": "every block",
        "guesses the block from the shapes": "128 rows",
        "multiplies in BF16": "FP32",
    },
}
MISTAKES = [(which, mistake) for which, mistakes in TOLD.items() for mistake in mistakes]


def value(source: str, name: str):
    names: dict[str, object] = {}
    exec(source, names)
    return names[name]


@needs_keys
def test_every_mistake_has_a_property_of_its_own():
    assert {which: set(mistakes) for which, mistakes in TOLD.items()} == {
        which: set(find(which).wrong) for which in TOLD
    }


@needs_keys
@pytest.mark.parametrize(("which", "mistake"), MISTAKES)
def test_a_mistake_is_told_by_the_property_that_it_breaks(which, mistake):
    this = find(which)
    verdict = check(which, value(this.wrong[mistake], this.name))
    assert TOLD[which][mistake] in str(verdict.failed)


# Right answers that were reached in other ways than the worked ones


def code_by_search(x: float) -> int:
    """Find the nearest of all numbers; among two, the even code."""
    known = torch.arange(0x7F)
    size = bits.decode(known, bits.E4M3).tolist()
    if x != x:
        return 0xFF
    x, sign = (x, 0) if x >= 0 else (-x, 0x80)
    return sign + min(known.tolist(), key=lambda c: (abs(size[c] - min(x, 448.0)), c % 2))


def code_by_cast(x: float) -> torch.Tensor:
    return torch.tensor(x).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)


def code_in_numpy(x: float) -> np.uint8:
    return np.uint8(code_by_search(x))


def number_by_half_precision(code: int) -> float:
    """Put the fields where FP16 has them, whose exponent has room for more, and mend the bias."""
    if code & 0x7F == 0x7F:
        return math.nan
    half = (code & 0x80) << 8 | (code & 0x7F) << 7
    return float(np.uint16(half).view(np.float16)) * 2.0**8


def tiles_by_reciprocal(x: torch.Tensor):
    """Multiply by 448 / amax, as many kernels do, in a padded copy."""
    rows, cols = x.shape
    n_tiles = -(-cols // 128)
    padded = torch.zeros(rows, n_tiles * 128)
    padded[:, :cols] = x
    tiles = padded.unflatten(1, (n_tiles, 128))
    amax = tiles.abs().amax(-1).clamp(min=1e-4)
    values = (tiles * (448 / amax)[..., None]).flatten(1)[:, :cols]
    return [values.clamp(-448, 448).to(torch.float8_e4m3fn), amax / 448]


def shares_by_cast(x: torch.Tensor):
    if not x.any():
        return 0.0, 0.0
    there, amax = x != 0, x.abs().max()
    int8 = (x / (amax / 127)).round().to(torch.int8) == 0
    e4m3 = (x / (amax / 448)).to(torch.float8_e4m3fn).float() == 0
    return int8[there].double().mean(), e4m3[there].double().mean()


def power_by_loop(scale: torch.Tensor):
    powers = [2.0**n for n in range(-126, 128)]
    return torch.tensor([next(p for p in powers if p >= s) for s in scale.tolist()])


def weight_by_loop(values: torch.Tensor, scale_inv: torch.Tensor):
    weight = np.empty(values.shape, dtype=np.float32)
    for (row, col), number in np.ndenumerate(values.float().numpy()):
        weight[row, col] = np.float32(number) * scale_inv.numpy()[row // 128, col // 128]
    return torch.from_numpy(weight)


@pytest.mark.parametrize(
    ("which", "answer"),
    [
        ("fp8.1", number_by_half_precision),
        ("fp8.1", lambda code: bits.decode(torch.tensor(code), bits.E4M3)),
        ("fp8.2", code_by_search),
        ("fp8.2", code_by_cast),
        ("fp8.2", code_in_numpy),
        ("fp8.2", lambda x: bits.encode(torch.tensor(x), bits.E4M3)),
        ("fp8.3", tiles_by_reciprocal),
        ("fp8.3", lambda x: groups.quantise(x, floor=groups.ACTIVATION_FLOOR)[:2]),
        ("fp8.4", 4587.52),
        ("fp8.4", 4500),
        ("fp8.5", shares_by_cast),
        ("fp8.6", power_by_loop),
        ("fp8.6", lambda scale: torch.exp2(scale.double().log2().ceil()).float()),
        ("fp8.7", weight_by_loop),
        ("fp8.7", lambda v, s: groups.dequantise(groups.Scaled(v, s, groups.BLOCK))),
    ],
)
def test_another_right_answer_passes(which, answer):
    verdict = check(which, answer)
    assert verdict.right, verdict.text


# Mistakes that no wrong answer of the exercises makes: each breaks one property more


def number(code: int) -> float:
    return bits.decode(torch.tensor(code), bits.E4M3).item()


def code_without_carry(x: float) -> int:
    """Keep the exponent of `x` where rounding goes beyond its last mantissa."""
    if not abs(x) <= 448:
        return code_by_search(x)
    k = math.frexp(max(abs(x), 2.0**-6))[1] - 1
    digits = min(round(abs(x) / 2.0 ** (k - 3)), 15)
    return code_by_search(math.copysign(2.0 ** (k - 3) * digits, x))


def tiles_of_all_rows(x: torch.Tensor):
    scale = tiles_by_reciprocal(x.abs().amax(0, keepdim=True))[1].repeat(len(x), 1)
    spread = scale.repeat_interleave(128, 1)[:, : x.shape[1]]
    return (x / spread).to(torch.float8_e4m3fn), scale


def tiles_with_a_floor_for_zeros_alone(x: torch.Tensor):
    values, scale = tiles_by_reciprocal(1e6 * x)
    return (values, scale / 1e6) if x.any() else tiles_by_reciprocal(x)


def shares_without_size(x: torch.Tensor):
    """Compare the number, not its size: whatever is negative counts as lost."""
    there, most = x[x != 0], x.abs().max()
    if len(there) == 0:
        return 0.0, 0.0
    return (there <= most / 254).double().mean(), (there <= most / 448 / 1024).double().mean()


def weight_of_few_columns(values: torch.Tensor, scale_inv: torch.Tensor):
    width = -(-values.shape[1] // scale_inv.shape[1])
    scale = scale_inv.repeat_interleave(128, 0).repeat_interleave(width, 1)
    return values.float() * scale[: len(values), : values.shape[1]]


SUBTLE = [
    ("fp8.1", lambda code: abs(number(code)), "the top bit is the sign"),
    ("fp8.1", lambda code: -480.0 if code & 127 == 127 else number(code), "0x7F and 0xFF are NaN"),
    ("fp8.1", lambda code: number(code) + (code == 0xA1), "all 256 codes are what torch makes"),
    ("fp8.2", lambda x: code_by_search(abs(x)), "each normal number has its own code"),
    ("fp8.2", code_without_carry, "rounding may carry into the next exponent"),
    ("fp8.2", lambda x: 0 if math.isnan(x) else code_by_search(x), "NaN stays NaN"),
    ("fp8.3", tiles_of_all_rows, "every row has its own scale"),
    ("fp8.3", tiles_with_a_floor_for_zeros_alone, "below 1e-4 numbers stay small"),
    ("fp8.5", shares_without_size, "near numbers survive in both"),
    ("fp8.6", lambda s: 2.0 ** (s.log2() - 0.02).ceil(), "all others go up to the next"),
    ("fp8.7", weight_of_few_columns, "so has it 128 columns"),
]


@pytest.mark.parametrize(("which", "answer", "told"), SUBTLE)
def test_a_subtler_mistake_is_told_too(which, answer, told):
    verdict = check(which, answer)
    assert str(verdict.failed).startswith(told), verdict.text


def test_every_property_is_seen_to_fail():
    seen = {(which, told) for which, _, told in SUBTLE}
    seen |= {(which, told) for which, mistakes in TOLD.items() for told in mistakes.values()}
    for which in TOLD:
        for required in find(which).properties:
            assert any(at == which and told in required.name for at, told in seen), required.name


# What a reader is told


@pytest.mark.parametrize("which", ["fp8.1", "fp8.2", "fp8.3", "fp8.5", "fp8.6", "fp8.7"])
def test_a_missing_return_is_told(which):
    verdict = check(which, lambda *_given: None)
    assert not verdict.right
    assert "is a `return` missing?" in verdict.text


@pytest.mark.parametrize(
    ("which", "answer", "told"),
    [
        ("fp8.1", lambda code: 1.0 if code == 0x38 else 2.0, "decode(0x3c), bits 0 0111 100, gave"),
        ("fp8.2", lambda x: 300, "300, which is no code, expected 0x08 (0.015625)"),
        ("fp8.2", lambda x: 56.5, "gave 56.5, expected 8"),
        ("fp8.2", lambda x: float(code_by_search(x)), "must be an integer, got 8.0"),
        ("fp8.2", lambda x: code_by_search(x) == 8, "gave True, expected 8"),
        ("fp8.3", lambda x: x, "expected a pair (values, scale), got Tensor."),
        ("fp8.3", lambda x: (x, x, x), "expected a pair (values, scale), got tuple."),
        ("fp8.3", lambda x: (x, x / 448), "row 0 holds 1 x 3.5, 127 x 1: values at [0, 0] gave"),
        ("fp8.4", 40_000, "The outlier is too large: 40,000"),
        ("fp8.5", lambda x: (0.0, 0.0), "x holds 1 x 300, 127 x -1: int8 gave 0, expected 0.99"),
        ("fp8.6", lambda scale: scale / 2, "500 / 448 = 1.116. With the scale 0.558036 it is"),
        ("fp8.6", lambda scale: scale[0], "has shape [], expected [1]"),
        ("fp8.7", lambda values, scale: values, "gave -448, expected -0.109375"),
    ],
)
def test_what_is_told(which, answer, told):
    assert told in check(which, answer).text


@needs_keys
@pytest.mark.parametrize("which", ["fp8.3", "fp8.5", "fp8.6", "fp8.7"])
def test_an_answer_that_changes_what_it_is_given_spoils_no_later_one(which):
    right = value(find(which).solution, find(which).name)

    def in_place(*given: torch.Tensor):
        answer = right(*(part.clone() for part in given))
        for part in given:
            part.zero_()
        return answer

    assert check(which, in_place).right
    assert check(which, right).right
