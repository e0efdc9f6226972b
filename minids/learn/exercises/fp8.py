"""Exercises of chapter 11: codes, tiles, underflow, scales that are exponents, a checkpoint.

Paper   DeepSeek-V3 (arXiv:2412.19437), section 3.3, Figure 7; inference/kernel.py and
        README_WEIGHTS.md of the release.
Dims    rows and cols of a matrix; one scale for a tile of 1 x 128 or a block of 128 x 128.
Book    book/11_fp8.ipynb               Kernel  none
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minids.formats import groups
from minids.formats.bits import E4M3
from minids.learn.check import Exercise, Property, differs, within

_FP8 = torch.float8_e4m3fn
_VALUES = torch.frombuffer(bytearray(range(256)), dtype=_FP8).tolist()  # of each code, by torch

Test = Callable[[Any], str | None]
Runs = tuple[tuple[float, int], ...]  # numbers, and how often each stands in a row


def _each(*tests: Test) -> Test:
    """Return the first trouble of several tests."""
    return lambda answer: next(filter(None, (test(answer) for test in tests)), None)


def _changed(source: str, changes: dict[str, tuple[str, str]]) -> dict[str, str]:
    """Return the source with each mistake in turn: a piece of it, and what stands there instead."""
    assert all(source.count(right) == 1 for right, _ in changes.values()), "no such piece"
    return {mistake: source.replace(*pieces) for mistake, pieces in changes.items()}


def _decodes(*codes: int) -> Test:
    def test(answer: Any) -> str | None:
        for code in codes:
            call = f"decode({code:#04x}), bits {code >> 7} {code >> 3 & 15:04b} {code & 7:03b},"
            got, want = answer(code), _VALUES[code]
            both_nan = math.isnan(want) and isinstance(got, float | Tensor) and math.isnan(got)
            if trouble := None if both_nan else differs(call, got, want, 0):
                return trouble
        return None

    return test


def _encodes(*numbers: float) -> Test:
    """Compare with torch's cast, clamped first: what it does with overflow varies by device."""

    def test(answer: Any) -> str | None:
        for x in numbers:
            cast = torch.tensor(x).clamp(-E4M3.max, E4M3.max).to(_FP8).item()
            want = 0x7F if math.isnan(x) else _VALUES.index(cast)
            got, call = answer(x), f"encode({x:.8g})"
            if type(got) is not int and getattr(got, "ndim", None) != 0:  # or a tensor's, NumPy's
                return differs(call, got, want) or f"{call} must be an integer, got {got!r:.60}."
            if {0x80: 0x00, 0xFF: 0x7F}.get(int(got), got) != want:  # two zeros, two NaNs
                return f"{call} gave {_code(int(got))}, expected {_code(want)}."
        return None

    return test


def _code(code: int) -> str:
    return f"{code:#04x} ({_VALUES[code]:g})" if 0 <= code < 256 else f"{code}, which is no code"


def _row(runs: Runs) -> list[float]:
    return [number for number, times in runs for _ in range(times)]


def _told(runs: Runs) -> str:
    return ", ".join(f"{times} x {number:.7g}" for number, times in runs)


def _pair(call: str, names: tuple[str, str], got: Any, wants: tuple[Any, ...]) -> str | None:
    if not isinstance(got, tuple | list) or len(got) != 2:
        missing = ": is a `return` missing?" if got is None else "."
        return f"{call} expected a pair ({', '.join(names)}), got {type(got).__name__}{missing}"
    parts = zip(names, got, wants, strict=True)
    return next(filter(None, (differs(f"{call} {n}", g, w, 1e-6) for n, g, w in parts)), None)


def _tiles(*rows: Runs) -> Test:
    x = torch.tensor([_row(runs) for runs in rows], dtype=torch.float32)
    values, scale, _ = groups.quantise(x, floor=groups.ACTIVATION_FLOOR)
    told = "; ".join(f"row {n} holds {_told(runs)}" for n, runs in enumerate(rows))
    call = f"quantise_tiles(x), where {told}:"
    return lambda answer: _pair(call, ("values", "scale"), answer(x.clone()), (values, scale))


def _outlier(answer: Any) -> str | None:
    """Find by bisection in the package where 0.01 is lost."""
    low, high = 1.0, 1e6
    while high - low > 1e-3 * low:
        middle = (low + high) / 2
        lost = groups.quantise(torch.tensor([[0.01, middle]])).values[0, 0].item() == 0
        low, high = (low, middle) if lost else (middle, high)
    return within("The outlier", answer, 0.97 * low, 1.03 * low)


def _shares(*runs: tuple[float, int]) -> Test:
    x = torch.tensor(_row(runs), dtype=torch.float32)
    step = x.abs().max().clamp(min=1e-12).item() / 127
    int8 = torch.fake_quantize_per_tensor_affine(x, step, 0, -127, 127)
    e4m3 = groups.quantise(x[None]).values[0].float()
    n = max(1, x.count_nonzero().item())
    wants = tuple(((q == 0) & (x != 0)).sum().item() / n for q in (int8, e4m3))
    call = f"flushed(x), where x holds {_told(runs)}:"
    return lambda answer: _pair(call, ("int8", "e4m3"), answer(x.clone()), wants)


def _powers(*scales: float) -> Test:
    scale = torch.tensor(scales)
    call = f"power_of_two([{', '.join(f'{s:.9g}' for s in scale.tolist())}])"
    return lambda answer: differs(call, answer(scale.clone()), groups.next_power_of_two(scale), 0)


def _fits(answer: Any) -> str | None:
    """Show what a scale that was rounded down does to the largest number of its group."""
    got = answer(torch.tensor([500 / E4M3.max]))
    stored = (500 / got).item() if isinstance(got, Tensor) and got.shape == (1,) else 0
    if stored <= E4M3.max:
        return _powers(500 / E4M3.max)(answer)
    call = f"A group's largest number is 500, 500 / 448 = {500 / E4M3.max:.4g}. With the scale"
    return f"{call} {got.item():g} it is stored as {stored:g}, and E4M3 ends at 448."


def _reads(shape: tuple[int, int], scales: list[list[float]], number: float = 1.0) -> Test:
    values, scale = torch.full(shape, number).to(_FP8), torch.tensor(scales)
    want = groups.dequantise(groups.Scaled(values, scale, groups.BLOCK))
    call = f"weight(values, scale_inv), values {list(shape)} all {number:g}, scale_inv {scales},"
    return lambda answer: differs(call, answer(values.clone(), scale.clone()), want, 1e-6)


EXERCISES = (
    Exercise(
        name="decode",
        title="A number from eight bits",
        statement="Write `decode(code)`: the float that an E4M3 code, an integer from 0 to 255, "
        "stands for, worked out from its bits. From the top: one bit of sign, four of exponent "
        "$e$, three of mantissa $m$. The value is $2^{e-7} (1 + m/8)$; codes with $e = 0$ are "
        "subnormal, $2^{-6} \\cdot m/8$. The top exponent, $e = 15$, holds numbers too: there is "
        "no infinity, and with it only $m = 7$ is NaN.",
        start="def decode(code):\n    raise NotImplementedError\n",
        properties=(
            Property("exponent and mantissa make the number", _decodes(0x38, 0x3C, 0x41, 0x77)),
            Property("the top bit is the sign", _decodes(0xB8, 0xC4)),
            Property("codes 0 to 7 are subnormal", _decodes(*range(9))),
            Property("the top exponent holds numbers, up to 448", _decodes(0x78, 0x7E, 0xFE)),
            Property("0x7F and 0xFF are NaN", _decodes(0x7F, 0xFF)),
            Property("all 256 codes are what torch makes of them", _decodes(*range(256))),
        ),
        hints=(
            "Cut the code into its three fields first: shift right, then mask with &.",
            "code >> 7, code >> 3 & 15 and code & 7. Which two cases does the formula not cover?",
            "sign * 2**-6 * m / 8 where e is 0, math.nan where code & 127 is 127, else "
            "sign * 2 ** (e - 7) * (1 + m / 8).",
        ),
        solution="""import math


def decode(code):
    sign = -1.0 if code >> 7 else 1.0
    e, m = code >> 3 & 15, code & 7
    if e == 15 and m == 7:
        return math.nan  # the only code that is lost, once for each sign
    if e == 0:
        return sign * 2**-6 * m / 8  # no leading 1, and the exponent of e = 1
    return sign * 2 ** (e - 7) * (1 + m / 8)
""",
        wrong=_changed(
            """def decode(code):
    sign = -1.0 if code >> 7 else 1.0
    e, m = code >> 3 & 15, code & 7
    if e == 15 and m == 7:
        return float("nan")
    return sign * 2.0 ** max(e - 7, -6) * ((e > 0) + m / 8)
""",
            {
                "the bias of E5M2": ("max(e - 7, -6)", "max(e - 15, -14)"),
                "the fields of E5M2": (">> 3 & 15, code & 7", ">> 2 & 31, code & 3"),
                "subnormals forgotten": ("max(e - 7, -6) * ((e > 0)", "(e - 7) * (1"),
                "subnormals with an exponent of their own": ("max(e - 7, -6)", "(e - 7)"),
                "an infinity, as IEEE formats have one": (
                    '15 and m == 7:\n        return float("nan")',
                    '15:\n        return float("nan") if m else sign * float("inf")',
                ),
            },
        ),
    ),
    Exercise(
        name="encode",
        title="Eight bits from a number",
        statement="Write `encode(x)`: the code, an integer from 0 to 255, of the E4M3 number "
        "nearest to the float `x`. A tie goes to the code whose last bit is 0. What is larger than "
        "448 becomes 448 with its sign, infinities too; NaN stays NaN. Below $2^{-6}$ the numbers "
        "lie $2^{-9}$ apart. Either code of zero is right, and either of NaN.",
        start="def encode(x):\n    raise NotImplementedError\n",
        properties=(
            Property(
                "each normal number has its own code",
                _encodes(*(value for value in _VALUES if abs(value) >= E4M3.min_normal)),
            ),
            Property("the nearer neighbour wins", _encodes(1.05, 1.07, -3.3, 101.0, 0.3)),
            Property("a tie goes to the even code", _encodes(1.0625, 1.1875, -17.0, -19.0)),
            Property(
                "below 2^-6 the steps are 2^-9", _encodes(0.003, *(n / 1024 for n in range(16)))
            ),
            Property("rounding may carry into the next exponent", _encodes(1.97, 0.0155, 15.6)),
            Property("beyond 448 it is 448", _encodes(460.0, -465.0, 1e9, math.inf, -math.inf)),
            Property("NaN stays NaN", _encodes(math.nan)),
        ),
        hints=(
            "How far apart are the numbers of the format around x? Count x in such steps.",
            "With 2^k <= |x| < 2^(k+1) the step is 2^(k-3), but never less than 2^-9. math.frexp "
            "knows k; Python's round takes ties to even.",
            "n = round(|x| / 2^(k-3)), with k at least -6. The code is 8 (k + 6) + n, and 128 more "
            "for the sign: subnormals and carries come out right by themselves.",
        ),
        solution="""import math


def encode(x):
    if math.isnan(x):  # of no size
        return 0x7F
    size = min(abs(x), 448.0)
    # frexp: size = f * 2^(k + 1) with f in [1/2, 1); smaller ones keep the step of 2^-6
    k = math.frexp(max(size, 2.0**-6))[1] - 1
    n = round(size / 2.0 ** (k - 3))  # an exact quotient; round takes ties to even
    # normal: n = 8 + m and e = k + 7, so 8 e + m = 8 (k + 6) + n; for subnormals k + 6 is 0
    return 0x80 * (x < 0) + 8 * (k + 6) + n
""",
        wrong=_changed(
            """import math


def encode(x):
    if math.isnan(x):
        return 0x7F
    size = min(abs(x), 448.0)
    k = math.frexp(max(size, 2.0**-6))[1] - 1
    n = size / 2.0 ** (k - 3)
    return 0x80 * (x < 0) + 8 * (k + 6) + round(n)
""",
            {
                "half is always rounded up": ("round(n)", "math.floor(n + 0.5)"),
                "what does not fit is cut off": ("round(n)", "int(n)"),
                "below 2^-6 is zero": ("round(n)", "round(n) * (n >= 8)"),
                "overflow is NaN": ("math.isnan(x)", "not abs(x) <= 464"),
            },
        ),
    ),
    Exercise(
        name="quantise_tiles",
        title="Tiles of 1 x 128",
        statement="Write `quantise_tiles(x)` for activations `x`, FP32 `[rows, cols]`. A tile is "
        "128 neighbours of one row; the last tile of a row holds what is left. Return `(values, "
        "scale)`: `scale`, FP32 `[rows, tiles]`, is the factor that makes `x` of `values` again, "
        "nearly, so that a tile's largest number is stored as 448 or -448. `values` has the shape "
        "of `x` and dtype `torch.float8_e4m3fn`. A tile whose largest size is below 1e-4, such as "
        "a tile of zeros, is scaled as if it were 1e-4.",
        start="def quantise_tiles(x):\n    raise NotImplementedError\n",
        properties=(
            Property("a tile's largest number is stored as 448", _tiles(((3.5, 1), (1, 127)))),
            Property("the sign does not count for the largest", _tiles(((-7, 1), (1, 127)))),
            Property("every 128 columns have their own scale", _tiles(((100, 128), (0.01, 128)))),
            Property("every row has its own scale", _tiles(((100, 128),), ((0.01, 128),))),
            Property(
                "the last tile may be short",
                _each(_tiles(((1, 128), (8, 2))), _tiles(((0.5, 1), (-2, 2)))),
            ),
            Property("zeros have a scale, and stay zeros", _tiles(((0, 128),))),
            Property("below 1e-4 numbers stay small", _tiles(((1e-6, 1), (2e-7, 127)))),
        ),
        hints=(
            "By which factor must 448 be multiplied to give the largest size of a tile?",
            "x.split(128, dim=-1) cuts a tile from every row, short ones at the end. Of each: "
            "abs().amax(-1, keepdim=True).clamp(min=1e-4).",
            "scale = that / 448; keep (tile / scale).to(torch.float8_e4m3fn) and scale of every "
            "tile, and torch.cat each along the last axis.",
        ),
        solution="""import torch


def quantise_tiles(x):
    values, scales = [], []
    for tile in x.split(128, dim=-1):  # the last one as short as it comes
        amax = tile.abs().amax(-1, keepdim=True).clamp(min=1e-4)  # no division by zero
        scale = amax / 448  # multiplies what is stored
        values.append((tile / scale).to(torch.float8_e4m3fn))
        scales.append(scale)
    return torch.cat(values, -1), torch.cat(scales, -1)
""",
        wrong=_changed(
            """import torch


def quantise_tiles(x):
    values, scales = [], []
    for tile in x.split(128, dim=-1):
        scale = tile.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448
        values.append((tile / scale).clamp(-448, 448).to(torch.float8_e4m3fn))
        scales.append(scale)
    return torch.cat(values, -1), torch.cat(scales, -1)
""",
            {
                "the scale divides": ("scales.append(scale)", "scales.append(1 / scale)"),
                "one scale for all": (
                    "tile.abs().amax(-1, keepdim=True)",
                    "x.abs().amax().repeat(len(x), 1)",
                ),
                "tiles along the tokens": ("x.split", "x.T.split"),
                "the largest without its sign": ("tile.abs().amax(", "tile.amax("),
                "the scale from the mean": ("amax", "mean"),
                "the short tile is dropped": ("x.split", "x[:, : len(x[0]) // 128 * 128].split"),
                "nothing against zeros": (".clamp(min=1e-4)", ""),
            },
        ),
    ),
    Exercise(
        name="outlier",
        title="What an outlier costs its neighbours",
        statement="A tile holds numbers of about 0.01 and one outlier, which is stored as 448. How "
        "large may the outlier be before 0.01 is rounded to zero? The smallest number above zero "
        "is $2^{-9}$. Work it out on paper and replace `...`; an answer within 3 % is right.",
        start="outlier = ...\n",
        properties=(Property("beyond it minids rounds 0.01 to zero, within 3 %", _outlier),),
        hints=(
            "The scale is outlier / 448. What does 0.01 become when it is divided by that?",
            "Rounding takes it to zero when it is nearer to 0 than to 2^-9: at half of 2^-9.",
            "0.01 * 448 / outlier = 2^-10, solved for the outlier.",
        ),
        solution="# 0.01 / (outlier / 448) must stay above half the smallest number, 2^-9 / 2\n"
        "outlier = 0.01 * 448 * 2**10\n",
        wrong={
            "the smallest normal number is the end": "outlier = 0.01 * 448 * 2**6\n",
            "nothing below 2^-9 is rounded up": "outlier = 0.01 * 448 * 2**9\n",
            "an INT8 tile": "outlier = 0.01 * 127 * 2\n",
        },
    ),
    Exercise(
        name="flushed",
        title="An outlier in INT8 and in E4M3",
        statement="Write `flushed(x)` for one tile, FP32 `[n]`. Two formats store it: INT8, the "
        "integers from -127 to 127, and E4M3, which ends at 448 and whose smallest number above "
        "zero is $2^{-9}$. Each is scaled so that the tile's largest size lands on its own largest "
        "number, and rounded to the nearest, ties to even. Return `(int8, e4m3)`: of the numbers "
        "that are not zero, the share (0 to 1) that becomes zero in each format. If all of `x` is "
        "zero, both shares are 0.",
        start="def flushed(x):\n    raise NotImplementedError\n",
        properties=(
            Property("near numbers survive in both", _shares((1, 2), (-0.3, 3), (0.1, 3))),
            Property("an outlier takes INT8's small numbers", _shares((300, 1), (-1, 127))),
            Property("subnormal numbers are numbers", _shares((-448, 1), (0.01, 2), (0.003, 1))),
            Property("E4M3 loses them to a larger one", _shares((3e6, 1), (1, 5), (10, 2))),
            Property(
                "half a step is a tie and goes to zero, more does not",
                _each(
                    _shares((127, 1), (0.5, 1), (0.6, 2)),
                    _shares((448, 1), (2**-10, 1), (1.5 * 2**-10, 2)),
                ),
            ),
            Property(
                "zeros are no loss", _each(_shares((300, 1), (1, 1), (0, 6)), _shares((0, 8)))
            ),
        ),
        hints=(
            "No cast is needed: up to which size is a number, divided by the scale, rounded to 0?",
            "Up to half the smallest step, 1/2 in INT8 and 2^-10 in E4M3, where the scales are the "
            "largest size / 127 and / 448.",
            "With size the abs() of x[x != 0], INT8 loses (size <= size.max() / 127 / 2).float()."
            "mean(), and E4M3 likewise with size.max() / 448 * 2**-10.",
        ),
        solution="""def flushed(x):
    size = x[x != 0].abs()
    if len(size) == 0:
        return 0.0, 0.0
    # half the smallest step times the scale; the tie itself goes to the even neighbour, zero
    int8 = size <= size.max() / 127 / 2
    e4m3 = size <= size.max() / 448 * 2**-10
    return int8.float().mean().item(), e4m3.float().mean().item()
""",
        wrong=_changed(
            """def flushed(x):
    size = x[x != 0].abs()
    if len(size) == 0:
        return 0.0, 0.0
    int8 = size <= size.max() / 127 / 2
    e4m3 = size <= size.max() / 448 * 2**-10
    return int8.float().mean().item(), e4m3.float().mean().item()
""",
            {
                "E4M3 without subnormals": ("2**-10", "2**-6"),
                "E4M3 cuts off": ("<= size.max() / 448 * 2**-10", "< size.max() / 448 * 2**-9"),
                "INT8 cuts off": ("<= size.max() / 127 / 2", "< size.max() / 127"),
                "INT8 with 255 steps to a side": ("/ 127", "/ 255"),
                "zeros count as lost": ("x[x != 0].abs()", "x.abs()"),
            },
        ),
    ),
    Exercise(
        name="power_of_two",
        title="A scale that is only an exponent",
        statement="Scales of DeepSeek-V3.1 are powers of two (UE8M0). Write `power_of_two(scale)`: "
        "for FP32 scales `[n]`, positive and normal, the smallest powers of two that are not below "
        "them, FP32 `[n]`. Every result must be exact, also right above a power of two, where a "
        "`log2` in FP32 is rounded already.",
        start="def power_of_two(scale):\n    raise NotImplementedError\n",
        properties=(
            Property("a group's largest number still fits", _fits),
            Property("powers of two stay as they are", _powers(1.0, 0.25, 8.0, 2**-22)),
            Property("all others go up to the next", _powers(0.3, 1.01, 3.0, 1e-4 / 448)),
            Property(
                "right above a power of two it is the next one",
                _powers(1 + 2**-23, 1024 * (1 + 2**-23), 2**-22 * (1 + 2**-23)),
            ),
        ),
        hints=(
            "What would a scale that is too small do to the group's largest number, stored as 448?",
            "torch.frexp gives a mantissa in [1/2, 1) and an exponent, without rounding.",
            "scale = mantissa * 2^exponent: the answer is 2^exponent, and for mantissa 1/2, where "
            "scale is a power of two itself, 2^(exponent - 1). torch.ldexp makes it.",
        ),
        solution="""import torch


def power_of_two(scale):
    mantissa, exponent = torch.frexp(scale)  # mantissa in [1/2, 1), nothing is rounded
    exponent = exponent - (mantissa == 0.5).int()  # powers of two stay
    return torch.ldexp(torch.ones_like(scale), exponent)
""",
        wrong=_changed(
            "def power_of_two(scale):\n    return 2 ** scale.double().log2().ceil().float()\n",
            {
                "rounded down": ("ceil()", "floor()"),
                "rounded to the nearest": ("ceil()", "round()"),
                "powers of two are doubled": ("ceil()", "floor().add(1)"),
                "log2 in FP32": (".double()", ""),
            },
        ),
    ),
    Exercise(
        name="weight",
        title="A weight out of the published checkpoint",
        statement="Write `weight(values, scale_inv)`, which makes a weight of what the checkpoint "
        "holds: `values` `[rows, cols]` in `torch.float8_e4m3fn`, and as `weight_scale_inv`, FP32, "
        "one number for each block of 128 x 128; the blocks at the right and at the lower edge "
        "hold what is left. A block's largest value is stored as 448 or -448, weights are far "
        "below 1, and its number may be 0.0002: factor or divisor? Return FP32 `[rows, cols]`.",
        start="def weight(values, scale_inv):\n    raise NotImplementedError\n",
        properties=(
            Property("it is a factor, whatever its name", _reads((1, 1), [[2**-12]], -448.0)),
            Property("every block has its own", _reads((256, 256), [[1.0, 2.0], [3.0, 4.0]])),
            Property(
                "a block has 128 rows, the last one may have fewer",
                _reads((576, 1), [[1.0], [2.0], [3.0], [4.0], [5.0]]),
            ),
            Property("so has it 128 columns", _reads((2, 200), [[1.0, 2.0]])),
            Property("the product is that of FP32", _reads((1, 1), [[0.0002]], -448.0)),
        ),
        hints=(
            "448 times something is to be a weight of about 0.1.",
            "repeat_interleave(128, dim) repeats each number of scale_inv along an axis; what is "
            "too much at the end can be cut off.",
            "values.float() * scale_inv.repeat_interleave(128, 0).repeat_interleave(128, 1)"
            "[:rows, :cols]; FP8 tensors must be cast before they are multiplied.",
        ),
        solution="""def weight(values, scale_inv):
    n_rows, n_cols = values.shape
    # 128 each, always: 576 rows have 5 scales, of which the last one serves 64
    scale = scale_inv.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return values.float() * scale[:n_rows, :n_cols]
""",
        wrong=_changed(
            """def weight(values, scale_inv):
    rows, cols = values.shape
    high = wide = 128
    scale = scale_inv.repeat_interleave(high, 0).repeat_interleave(wide, 1)
    return values.float() * scale[:rows, :cols]
""",
            {
                "divides, as the name says": ("float() *", "float() /"),
                "columns before rows": ("scale_inv.rep", "scale_inv.T.rep"),
                "guesses the block from the shapes": (
                    "high = wide = 128",
                    "high, wide = (-(-n // m) for n, m in zip(values.shape, scale_inv.shape))",
                ),
                "multiplies in BF16": (
                    "values.float() * scale[:rows, :cols]",
                    "(values.bfloat16() * scale[:rows, :cols].bfloat16()).float()",
                ),
            },
        ),
    ),
)
