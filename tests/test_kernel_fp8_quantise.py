"""Quantisation in Triton: codes and scales equal minids.formats.groups bit by bit."""

import itertools
import re

import pytest
import torch
import triton
import triton.language as tl
from compiled import CARDS, HOPPER, compile_calls
from hypothesis import given, settings
from kernel_inputs import (
    LAYOUTS,
    SPECIAL,
    assert_caught,
    bits,
    bitwise_equal,
    is_written,
    laid_out,
    poisoned_memory,
    shapes,
    special,
)
from minids_kernels import cards, configs, e4m3, fp8_quantise
from minids_kernels.fp8_quantise import CANDIDATES, quantise, quantise_twice, requantise
from minids_kernels.scaled import Scaled

from minids.formats import groups
from minids.formats.bits import E5M6, round_to
from minids.formats.groups import BLOCK, COLUMN, TILE

pytestmark = pytest.mark.usefixtures("interpreter")

GROUPS = (TILE, BLOCK, COLUMN)
PAIRS = tuple(itertools.product((TILE, BLOCK), (COLUMN, BLOCK)))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = (None, "ue8m0")
# 131 rows and 133 columns: ragged groups of 3 and 5 behind whole ones, no multiple of 4 or 16
SHAPE = (131, 133)


def is_equal(a, b) -> bool:
    """Say whether two quantised matrices hold the same bits; a NaN has no sign and no digits."""
    return tuple(a.group) == tuple(b.group) and all(
        same_bits(*pair) for pair in zip(a[:2], b[:2], strict=True)
    )


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = a.cpu().contiguous(), b.cpu().contiguous()
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    nan = a.float().isnan()
    return torch.equal(nan, b.float().isnan()) and bool(((bits(a) == bits(b)) | nan).all())


def draw(shape, dtype=torch.float32, device="cpu") -> torch.Tensor:
    """Return normal numbers whose groups differ in size by a factor of up to 2^20."""
    x = torch.randn(shape) * 2.0 ** torch.randint(-10, 11, shape)
    return x.to(dtype).to(device)


# The wrappers against the reference


def test_example_by_hand():
    """One tile of 896, 1, 3: scale 2, and 0.5 and 1.5 exist in E4M3; the next has a scale of 1."""
    x = torch.zeros(1, 130)
    x[0, :3], x[0, 128:] = torch.tensor([896.0, 1.0, -3.0]), torch.tensor([448.0, -13.5])
    y = quantise(x)
    assert y.scale.tolist() == [[2.0, 1.0]]
    assert y.values[0, :3].tolist() == [448.0, 0.5, -1.5]
    assert y.values[0, 128:].tolist() == [448.0, -14.0]  # 13.5 lies between 13 and 14: to even


@pytest.mark.parametrize("group", GROUPS, ids=str)
@pytest.mark.parametrize("name", SPECIAL)
def test_equals_reference_for_special_numbers(name, group, device):
    for n, dtype in enumerate(DTYPES):
        rows, cols = (9, 130) if group == TILE else (130, 60)
        x = special(name, rows, cols, dtype, device)
        how = (group, FORMATS[(n + len(name)) % 2])
        assert is_equal(quantise(x, *how), groups.quantise(x.cpu(), *how)), dtype


@pytest.mark.parametrize("group", GROUPS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_reference_in_any_layout(layout, group, device):
    """Between the numbers lies NaN: a group that read it would be NaN."""
    x = draw(SHAPE, torch.bfloat16)
    y = quantise(laid_out(x.to(device), layout), group)
    assert is_equal(y, groups.quantise(x, group))


@pytest.mark.parametrize("scale_fmt", FORMATS)
@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_floor_lifts_small_groups(group, scale_fmt, device):
    x = draw((5, 260)) * 1e-5
    y = quantise(x.to(device), group, scale_fmt, floor=1e-4)
    assert is_equal(y, groups.quantise(x, group, scale_fmt, floor=1e-4))


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_batches_are_matrices_of_their_own(group, device):
    x = draw((2, 2, 3, 140), torch.bfloat16, device)
    assert is_equal(quantise(x, group), groups.quantise(x.cpu(), group))
    apart = laid_out(x, "every second column").transpose(0, 1)
    assert is_equal(quantise(apart, group), groups.quantise(x.cpu().transpose(0, 1), group))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 3, 7)], ids=str)
@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_nothing_is_quantised_to_nothing(group, shape, device):
    y = quantise(torch.empty(shape, device=device), group)
    assert y.values.shape == shape
    assert y.scale.shape == groups.scale_shape(shape, group)


@settings(max_examples=5)
@given(shape=shapes(140, 270))
def test_equals_reference_for_any_shape(shape, device):
    x = draw(shape, torch.bfloat16)
    for group in GROUPS:
        assert is_equal(quantise(x.to(device), group), groups.quantise(x, group)), group


@pytest.mark.parametrize("scale_fmt", FORMATS)
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_twice_is_two_calls(pair, scale_fmt, device):
    x = draw(SHAPE, torch.bfloat16)
    group, turned = pair
    first, second = quantise_twice(x.to(device), group, turned, scale_fmt, 1e-4)
    assert is_equal(first, groups.quantise(x, group, scale_fmt, 1e-4))
    assert is_equal(second, groups.quantise(x, turned, scale_fmt, 1e-4).mT)


@pytest.mark.parametrize("name", ["infinities", "NaN", "any bits", "subnormals"])
def test_twice_equals_reference_for_special_numbers(name, device):
    x = special(name, 130, 130, torch.float32, device)
    first, second = quantise_twice(x, TILE, COLUMN)
    assert is_equal(first, groups.quantise(x.cpu(), TILE))
    assert is_equal(second, groups.quantise(x.cpu(), COLUMN).mT)


@pytest.mark.parametrize("group", GROUPS, ids=str)
@pytest.mark.parametrize("cached", [torch.float8_e4m3fn, torch.bfloat16], ids=str)
def test_requantise_is_two_steps(cached, group, device):
    x = draw(SHAPE)
    tiles = groups.quantise(x)
    if cached == torch.bfloat16:  # E5M6, as behind attention
        finer = round_to(groups.dequantise(groups.Scaled(x, 1 / tiles.scale, TILE)), E5M6)
        tiles = groups.Scaled(finer.bfloat16(), tiles.scale, TILE)
    right = groups.quantise(groups.dequantise(tiles), group, "ue8m0", 1e-4)
    tiles = Scaled(tiles.values.to(device), tiles.scale.to(device), TILE)
    assert is_equal(requantise(tiles, group, "ue8m0", 1e-4), right)


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_requantise_of_special_scales(group, device):
    """An infinite scale makes infinities of codes and NaN of zeros, and nothing beyond the edge."""
    tiles = groups.quantise(draw(SHAPE) + 1.0)
    tiles.scale[3, 1], tiles.scale[7, 0], tiles.scale[130, 1] = torch.inf, torch.nan, 3e38
    tiles = Scaled(tiles.values.to(device), tiles.scale.to(device), TILE)
    right = groups.quantise(tiles.values.cpu().float() * spread(tiles.scale.cpu()), group)
    assert is_equal(requantise(tiles, group), right)


def spread(scale: torch.Tensor) -> torch.Tensor:
    return scale.repeat_interleave(128, -1)[:, : SHAPE[1]]


# What is promised of memory


def test_layouts_are_those_that_products_read(device):
    x = draw(SHAPE, device=device)
    tiles, blocks, columns = (quantise(x, group) for group in GROUPS)
    twice = quantise_twice(x, TILE, COLUMN)
    for y in (tiles, blocks, columns.mT, *twice):
        cols = y.values.shape[-1]
        assert y.values.stride() == (-(-cols // 16) * 16, 1)
        assert y.values.data_ptr() % 16 == 0
    assert tiles.scale.stride() == (1, 131)
    assert columns.mT.scale.stride() == (1, 133)
    assert twice[1].scale.stride() == (1, 133)
    assert blocks.scale.stride() == quantise_twice(x, TILE, BLOCK)[1].scale.stride() == (2, 1)


@pytest.mark.parametrize("shape", [SHAPE, (7, 16), (128, 128)], ids=str)
def test_every_output_is_written_and_nothing_else(shape, device):
    x = draw(shape, torch.bfloat16, device)
    with poisoned_memory():
        results = [quantise(x), *quantise_twice(x, TILE, COLUMN), *quantise_twice(x, BLOCK, BLOCK)]
    for y in results:
        assert is_written(y.values)
        assert is_written(y.scale)


def test_two_runs_are_bitwise_equal(device):
    x = draw((3, 133), torch.bfloat16, device)
    bitwise_equal(lambda: (quantise(x), *quantise_twice(x, TILE, COLUMN)))


def without_fp8(kernel, *tensors):
    return cards.INTERPRETER._replace(name="Ampere", capability=(8, 0))


def test_cards_without_fp8_write_the_same_bytes(device, monkeypatch):
    monkeypatch.setattr(cards, "card", without_fp8)
    for name in ("ties", "any bits", "edge of E4M3", "subnormals"):
        x = special(name, 130, 60, torch.float32, device)
        first, second = quantise_twice(x, TILE, COLUMN)
        assert is_equal(first, groups.quantise(x.cpu())), name
        assert is_equal(second, groups.quantise(x.cpu(), COLUMN).mT), name
        assert is_equal(
            requantise(first, BLOCK), groups.requantise(groups.quantise(x.cpu()), BLOCK)
        )


@pytest.mark.parametrize("config", CANDIDATES, ids=str)
def test_every_candidate_equals_reference(config, device):
    x = draw((130, 140), torch.bfloat16)
    kind = type(config).__name__
    with configs.trying(f"fp8_quantise.{kind}", config._asdict()) as trial:
        if kind == "Tiles":
            assert is_equal(quantise(x[:17].to(device)), groups.quantise(x[:17]))
        elif kind == "Square":
            first, second = quantise_twice(x.to(device), TILE, BLOCK)
            assert is_equal(first, groups.quantise(x))
            assert is_equal(second, groups.quantise(x, BLOCK).mT)
        else:
            assert is_equal(quantise(x.to(device), COLUMN), groups.quantise(x, COLUMN))
    assert trial.asked


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: quantise(x, (64, 64)), "quantise: group must be one of .*, got (64, 64)"),
        (lambda x: quantise(x, TILE, "e8m0"), "quantise: scale_fmt must be .*, got 'e8m0'"),
        (lambda x: quantise(x.double()), "quantise: x must be one of .*, got torch.float64"),
        (lambda x: quantise(x[0]), "quantise: x must have rows and columns, got 1 axes"),
        (lambda x: quantise_twice(x, COLUMN, BLOCK), "quantise_twice: group must be .*(128, 1)"),
        (lambda x: quantise_twice(x, TILE, TILE), "quantise_twice: turned must be .*(1, 128)"),
        (lambda x: requantise(quantise(x, BLOCK), TILE), "requantise: group of x must be .*128)"),
        (lambda x: requantise(Scaled(x, x, TILE), TILE), "requantise: x must be one of float8"),
        (
            lambda x: requantise(Scaled(x.bfloat16(), x, TILE), TILE),
            "requantise: the scales of these tiles must be [2, 2], got [2, 130]",
        ),
    ],
)
def test_bad_input_is_named(call, words, device):
    pattern = ".*".join(re.escape(part) for part in words.split(".*"))
    with pytest.raises(ValueError, match=pattern):
        call(torch.ones(2, 130, device=device))


# The arithmetic that stands in for a division


@triton.jit
def _arithmetic(x, scale, y, KIND: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if KIND == "scale":
        tl.store(y + at, e4m3.scale_of(e4m3.magnitude(tl.load(x + at)), 0.0, STEPS == 0))
    elif KIND == "reciprocal":
        tl.store(y + at, e4m3.reciprocal(tl.load(x + at)))
    elif KIND == "divide":
        tl.store(y + at, e4m3.divide(tl.load(x + at), tl.load(scale + at), STEPS))
    else:
        code = e4m3.to_e4m3(tl.load(x + at), STEPS)
        tl.store(y + at, e4m3.from_e4m3(code, STEPS))


def arithmetic(kind: str, x, scale=None, steps=2, device="cpu") -> torch.Tensor:
    """Run a function of e4m3 on FP32 numbers."""
    x = x.float().to(device)
    scale = x if scale is None else scale.float().to(device).contiguous()
    y, block = torch.empty_like(x), min(len(x) & -len(x), 2**18)
    _arithmetic[(len(x) // block,)](x, scale, y, kind, steps, block)
    return y.cpu()


def mantissas(step: int = 1) -> torch.Tensor:
    """Return FP32 numbers in [1, 2): all of them, or the last ones and every so-manieth."""
    whole = torch.arange(2**23, dtype=torch.int32)
    whole = whole if step == 1 else torch.cat((whole[:: 2**14], whole[-512:]))
    return (whole | 0x3F800000).view(torch.float32)


EXHAUSTIVE = [pytest.param(2, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)]


@pytest.mark.parametrize("step", EXHAUSTIVE)
def test_reciprocal_is_rounded_to_nearest(step, device):
    m = mantissas(step)
    assert torch.equal(arithmetic("reciprocal", m, device=device), 1 / m)


@pytest.mark.parametrize("step", EXHAUSTIVE)
def test_scale_is_the_quotient_by_448(step, device):
    """All mantissas at the least scales; where none is rounded twice, every 16th is as good."""
    m = mantissas(step)
    for exponent in (-117, 0, 127):
        x = (m if exponent < 0 or device != "cpu" else m[::16]) * 2.0**exponent
        x = x.where(x >= 448 * 2.0**-126, 1.0)
        assert torch.equal(arithmetic("scale", x, device=device), x / 448)


def hard_quotients(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x and m whose quotients lie as close to the middle of two FP32 numbers as any.

    For an odd M of 24 bits, X 2^25 mod M is 1 or M - 1 for some X: the quotient X / M is then
    1 / 2M of a last digit from a number with one digit more.
    """
    pairs = []
    for whole in torch.randint(2**22, 2**23, (n,), generator=torch.Generator().manual_seed(1)):
        m = 2 * int(whole) + 1
        inverse = pow(2**25, -1, m)
        for x in (inverse, m - inverse):
            while x < 2**23:
                x *= 2
            pairs.append((x, m))
    whole = torch.tensor(pairs, dtype=torch.float64) / 2**23
    return whole[:, 0].float(), whole[:, 1].float()


def test_quotients_are_rounded_as_a_division_does(device):
    x, m = hard_quotients(2**11)
    for e_x, e_m in ((0, 0), (100, 100), (-120, -110), (90, 119), (-149, -126)):
        x_e, m_e = torch.ldexp(x, torch.tensor(e_x)), torch.ldexp(m, torch.tensor(e_m))
        assert torch.equal(arithmetic("divide", x_e, m_e, 2, device), x_e / m_e)


def test_one_step_is_enough_for_16_bits(device):
    """All mantissas of BF16 over scales at which codes turn, and their neighbours in FP32."""
    x = mantissas()[:: 2**16].repeat_interleave(15 * 8 * 2)
    ties = (torch.arange(17, 32) / 16).repeat_interleave(16).repeat(128)
    scale = ((x / ties).view(torch.int32) + (torch.arange(16) - 8).repeat(128 * 15).int()).view(
        torch.float32
    )
    got = arithmetic("divide", x, scale, 1, device)
    right = (x / scale).to(torch.float8_e4m3fn).float()
    assert torch.equal(got.to(torch.float8_e4m3fn).float(), right)


def test_zeros_keep_their_sign_and_infinite_scales_give_zeros(device):
    x = torch.tensor([0.0, -0.0, 1.0, -1.0] * 256)
    for scale in (1.5, torch.inf):
        y = arithmetic("divide", x, torch.tensor(scale).expand(1024), 2, device)
        assert torch.equal(bits(y), bits(x / scale))


@pytest.mark.parametrize("fp8", [True, False])
def test_e4m3_saturates_and_rounds_to_even(fp8, device):
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (codes[1:] + codes[:-1]) / 2
    x = torch.cat((codes, ties, ties.nextafter(codes[1:]), ties.nextafter(codes[:-1])))
    x = torch.cat((x, torch.tensor([449.0, 464.0, 464.1, 1e30, torch.inf, 2.0**-149, 0.0])))
    x = torch.cat((x, -x, torch.full((1024 - 2 * len(x),), torch.nan)))
    right = x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert same_bits(arithmetic("codes", x, steps=fp8, device=device), right)


# Bugs that the tests above would see


def check(module) -> None:
    """Compare what a copy of the kernels' file does with the reference."""
    x = draw((130, 140), torch.bfloat16) * 1e-4
    for group, layout in ((TILE, "rows 3 apart"), (COLUMN, "contiguous"), (BLOCK, "transposed")):
        y = module.quantise(laid_out(x[:, :130], layout), group, None, 1e-4)
        assert is_equal(y, groups.quantise(x[:, :130], group, None, 1e-4)), group
    first, second = module.quantise_twice(x, TILE, COLUMN)
    assert is_equal(first, groups.quantise(x))
    assert is_equal(second, groups.quantise(x, COLUMN).mT)
    x[3, 128:] = 1.0  # no zero: of infinities alone the scale is infinite
    tiles = groups.quantise(x.float())
    tiles.scale[3, 1] = torch.inf
    assert is_equal(module.requantise(tiles, TILE), groups.requantise(tiles, TILE))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return max(floor, SMALLEST)", "return SMALLEST"),
        ("(k < K)[None, :]\n    at = x", "(k <= K)[None, :]\n    at = x"),
        ("(j * 128 < K)[None, :])", "(j * 128 < K - 128)[None, :])"),
        ("by = scales[:, None]", "by = turned_by"),
        ("j * x_scale_j", "0 * x_scale_j"),
        ("<< (8 * q)", "<< (24 - 8 * q)"),
        ("wide = tl.where(inside, wide, 0.0)", "wide = wide"),
        ("tl.max(columns, axis=0)", "tl.max(q0)"),
        ("for q in tl.static_range(1, 4)", "for q in tl.static_range(1, 3)"),
        ("(batch * G + g) * K + k", "g * K + k + 1"),
    ],
    ids=["floor", "mask", "last group", "axis", "neighbour", "order", "edge", "block", "quarter",
         "place"],
)  # fmt: skip
def test_planted_bug_is_caught(old, new):
    if not cards.interpreted():
        pytest.skip("NOT RUN: bugs are planted where the interpreter runs, on CPU")
    assert_caught(fp8_quantise, check, old, new)


# What the compiler makes of it for Hopper, and that it compiles for other cards


def launch(call, shape, dtype, args, config=None):
    """Call a wrapper as on a GPU, on memory that is not there."""
    x = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
    groups_of = [tuple(arg) if isinstance(arg, list) else arg for arg in args]
    if call == "requantise":
        x = Scaled(x, torch.empty(-(-shape[1] // 128), shape[0], device="meta").mT, TILE)
    function = {"quantise": quantise, "quantise_twice": quantise_twice, "requantise": requantise}
    if config is None:
        function[call](x, *groups_of)
        return
    with configs.trying(config[0], config[1]) as trial:
        function[call](x, *groups_of)
    assert trial.asked, f"{call} asks for no {config[0]}"


def calls_of(config) -> list[tuple]:
    """Return what a candidate is for: call, its groups, dtype."""
    wide = ("bfloat16", "float32")
    kind = type(config).__name__
    if kind == "Tiles":
        calls = [("quantise", (TILE,), dtype) for dtype in wide]
        return [*calls, ("quantise", (TILE, "ue8m0"), "bfloat16")]
    if kind == "Columns":
        calls = [("quantise", (COLUMN,), dtype) for dtype in wide]
        return [*calls, ("requantise", (COLUMN, "ue8m0"), "float8_e4m3fn")]
    return [
        ("quantise_twice", (TILE, COLUMN), "bfloat16"),
        ("quantise_twice", (TILE, COLUMN), "float32"),
        ("quantise_twice", (BLOCK, BLOCK), "float32"),
        ("quantise_twice", (BLOCK, COLUMN), "bfloat16"),
        ("quantise_twice", (TILE, BLOCK), "bfloat16"),
        ("quantise", (BLOCK,), "float32"),
        ("requantise", (BLOCK,), "float8_e4m3fn"),
    ]


V3 = [(4096, 7168), (4096, 18432), (7168, 18432), (4096, 576)]
COMPILED = [
    {"call": call, "shape": (4096, 7168), "dtype": dtype, "args": args,
     "config": (f"fp8_quantise.{type(config).__name__}", config._asdict())}
    for config in CANDIDATES for call, args, dtype in calls_of(config)
]  # fmt: skip
BY_RULE = [
    {"call": call, "shape": shape, "dtype": "bfloat16", "args": args}
    for shape in V3
    for call, args in (("quantise", (TILE,)), ("quantise", (COLUMN,)), ("quantise", (BLOCK,)),
                       ("quantise_twice", (TILE, COLUMN)), ("quantise_twice", (BLOCK, BLOCK)))
]  # fmt: skip
MOST_REGISTERS = 128  # two programs of 8 warps, so that one loads while the other computes


@pytest.fixture(scope="module")
def compiled():
    found = compile_calls("test_kernel_fp8_quantise", "launch", [*COMPILED, *BY_RULE])
    return list(zip([*COMPILED, *BY_RULE], found, strict=True))


def mixes(call) -> bool:
    """Say whether two kinds of groups are made of one read."""
    return call["call"] == "quantise_twice" and call["args"] != (BLOCK, BLOCK)


def test_nothing_spills_and_programs_fit_beside_each_other(compiled):
    for call, kernels in compiled:
        for kernel in kernels:
            assert kernel.spilled_bytes == 0, call
            if not mixes(call) or kernel.warps == 16:
                assert kernel.registers <= MOST_REGISTERS, call
            assert kernel.programs_on_an_sm * kernel.warps >= 8, call


def test_no_instruction_is_approximate(compiled):
    assert all(not kernel.inexact for _, kernels in compiled for kernel in kernels)


def test_memory_is_moved_16_bytes_at_a_time(compiled):
    """Only scales are read and written by 4; codes of mixed groups are written by 8."""
    for call, kernels in compiled:
        for kernel in kernels:
            loads = {n for n in kernel.instructions if n.startswith("LDG")}
            stores = {n for n in kernel.instructions if n.startswith("STG")}
            if call["call"] == "requantise":  # by 8 where a thread has less than 16 codes of a row
                codes = call["config"][1].get("BLOCK_K", 128) // kernel.warps
                assert loads <= {"LDG", "LDG.64", "LDG.128"}, call
                assert codes < 16 or "LDG.128" in loads, call
            else:
                assert loads == {"LDG.128"}, call
            assert stores & {"STG.128", "STG.64"}, call
            assert stores <= {"STG.128", "STG.64", "STG"}, call


@pytest.mark.slow
@pytest.mark.parametrize("capability", [card for card in CARDS if card != HOPPER], ids=str)
def test_compiles_for_other_cards(capability):
    calls = [call for call in BY_RULE if call["shape"] == V3[0]]
    calls.append({**COMPILED[-1], "config": None})
    for kernels in compile_calls("test_kernel_fp8_quantise", "launch", calls, capability):
        assert all(kernel.spilled_bytes == 0 for kernel in kernels)


# What only a GPU can show


@pytest.mark.gpu
@pytest.mark.parametrize("group", GROUPS, ids=str)
@pytest.mark.parametrize("scale_fmt", FORMATS)
def test_every_bf16_number_is_cast_as_on_a_cpu(scale_fmt, group):
    """All 2^16 patterns, each beside a largest number that gives them a scale of its own."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    numbers = patterns.view(torch.bfloat16).float()
    for most in (448.0, 1.0, 3.140625, 1e30, 3e38, 1e-30, 2.0**-117, 2.0**-125):
        held = numbers.where(numbers.abs() <= most, 0.0).view(-1, 64)
        x = torch.cat((held, torch.full_like(held, most)), 1).bfloat16()
        assert is_equal(quantise(x.cuda(), group, scale_fmt), groups.quantise(x, group, scale_fmt))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_matrices_equal_reference(dtype):
    for name in ("any bits", "NaN", "infinities", "edge of E4M3"):
        x = special(name, 1027, 7168, dtype, "cpu")
        tiles, columns = quantise_twice(x.cuda(), TILE, COLUMN)
        assert is_equal(tiles, groups.quantise(x)), name
        assert is_equal(columns, groups.quantise(x, COLUMN).mT), name
        assert is_equal(quantise(x.cuda(), TILE), groups.quantise(x)), name
        assert is_equal(quantise(x.cuda(), BLOCK), groups.quantise(x, BLOCK)), name


@pytest.mark.gpu
def test_twenty_runs_are_bitwise_equal():
    x = draw((4096, 7168), torch.bfloat16, "cuda")
    bitwise_equal(lambda: (quantise(x), *quantise_twice(x, TILE, COLUMN)), times=20)


@pytest.mark.gpu
def test_is_captured_in_a_graph_and_replayed_with_new_numbers():
    x = draw((300, 1000), torch.bfloat16, "cuda")
    run = lambda: (quantise(x), *quantise_twice(x, TILE, COLUMN), requantise(quantise(x), COLUMN))  # noqa: E731
    run()  # compiles, which a capture must not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    x.copy_(draw((300, 1000), torch.bfloat16))
    graph.replay()
    torch.cuda.synchronize()
    for got, right in zip(captured, run(), strict=True):
        assert is_equal(got, right)


@pytest.mark.gpu
def test_offsets_pass_two_billion():
    rows = 2**31 // 7168 + 300
    needed = rows * 7168 * 4
    free, _ = torch.cuda.mem_get_info()
    if free < 2 * needed:
        pytest.skip(f"NOT RUN: needs {2 * needed / 2**30:.0f} GiB of free memory on the GPU")
    x = torch.zeros(rows, 7168, dtype=torch.bfloat16, device="cuda")
    last = 2**31 // 7168 // 128 * 128
    x[last:] = draw((rows - last, 7168), torch.bfloat16, "cuda")
    tail = x[last:].cpu()
    tiles = quantise(x)
    assert same_bits(tiles.values[last:], groups.quantise(tail).values)
    assert same_bits(tiles.scale[last:], groups.quantise(tail).scale)
    del tiles
    columns = quantise(x, COLUMN)
    assert same_bits(columns.values[last:], groups.quantise(tail, COLUMN).values)
