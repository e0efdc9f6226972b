"""One product in eight levels: each equals the product, loads what it says, fits the card."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import getsource, getsourcelines
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from compiled import CARDS, HOPPER, compile_calls
from kernel_inputs import LAYOUTS, assert_caught, bitwise_equal, laid_out, poisoned_memory
from kernel_products import ON_A_CARD, ROUNDED, SAME_ORDER, draw, error, exact
from minids_kernels import cards
from minids_kernels.levels import LEVELS, described, loads, loop, persistent, rasterised
from minids_kernels.levels import scaled as scaled_file
from minids_kernels.levels import swapped as swapped_file
from minids_kernels.levels import tiled as tiled_file
from minids_kernels.levels.level import Level, Walk
from torch import Tensor

from minids.formats.groups import BLOCK, TILE, Scaled, quantise

pytestmark = pytest.mark.usefixtures("interpreter")

NAMES = [level.name for level in LEVELS]
PLAIN, NARROW = LEVELS[:6], LEVELS[6:]
# FP32: up to 500 products in another order, relative to the norm of the result: about
# 2^-24 sqrt(500 / 6) = 5.4e-7 where they are added one by one; interpreted, 2e-7 was seen
FP32 = 1e-6
# M, N, K: one number; less than a tile; one more; whole tiles; rows that are not 16 bytes aligned
SHAPES = [(1, 1, 1), (7, 100, 127), (129, 130, 129), (128, 256, 256), (257, 129, 70)]
SMALL = [(1, 1, 1), (3, 7, 127), (5, 2, 300)]  # for the level whose programs are numbers


def name(x) -> str:
    return getattr(x, "name", str(x))


def shapes(level: Level) -> list[tuple[int, int, int]]:
    return SMALL if level.number == 1 and cards.interpreted() else SHAPES


CASES = [(level, n) for level in LEVELS for n in range(len(SHAPES))]
CASES = [(level, n) for level, n in CASES if n < len(shapes(level))]


def drawn(level: Level, m: int, n: int, k: int, dtype=torch.float32, device: str = "cpu"):
    """Return operands, the quantised ones among NaN; plain ones are ordinary numbers."""
    if level.scaled:
        return draw(m, k, 1, device), draw(n, k, 128, device, seed=1)
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(r, k, generator=generator).to(dtype).to(device) for r in (m, n))


def right(a, b) -> Tensor:
    """Return the product in FP64."""
    return exact(a, b) if isinstance(a, Scaled) else a.double() @ b.double().mT


def tolerance(a, dtype: torch.dtype) -> float:
    if isinstance(a, Scaled):
        return (SAME_ORDER if cards.interpreted() else ON_A_CARD) + ROUNDED[dtype]
    return FP32 + ROUNDED[dtype]


def multiplied(multiply, a, b, *rest) -> Tensor:
    """Return a product in memory that was full of NaN; all of it must be written."""
    with poisoned_memory():
        y = multiply(a, b, *rest)
    assert y.isfinite().all(), "a number that was not written, or padding, came through"
    return y


def check(level: Level, m: int, n: int, k: int, dtype=torch.float32, device: str = "cpu") -> None:
    a, b = drawn(level, m, n, k, dtype, device)
    y = multiplied(level.multiply, a, b)
    assert y.shape == (m, n)
    assert y.dtype == (torch.float32 if level.scaled else dtype)
    assert error(y, right(a, b)) < tolerance(a, y.dtype)


# Ring 1: the product


@pytest.mark.parametrize("level", LEVELS, ids=NAMES)
def test_example_by_hand(level, device):
    """[1 2 3] times [4 5 6], and times [0 0 1]; scaled, 6 is the product of six ones and scales."""
    if level.scaled:
        ones = torch.ones(2, 129, device=device).to(torch.float8_e4m3fn)
        a = Scaled(ones, torch.tensor([[2.0, 3.0]] * 2, device=device), TILE)
        b = Scaled(ones[:1], torch.tensor([[5.0, 7.0]], device=device), BLOCK)
        assert level.multiply(a, b).tolist() == [[1301.0]] * 2  # 128 * 2 * 5 + 3 * 7
    else:
        a, b = torch.tensor([[1.0, 2, 3]]), torch.tensor([[4.0, 5, 6], [0, 0, 1]])
        assert level.multiply(a.to(device), b.to(device)).tolist() == [[32.0, 3.0]]


@pytest.mark.parametrize(("level", "n"), CASES, ids=name)
def test_equals_the_product(level, n, device):
    check(level, *shapes(level)[n], device=device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("level", PLAIN, ids=NAMES[:6])
def test_sums_are_rounded_once(level, dtype, device):
    check(level, *shapes(level)[2], dtype, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("level", NARROW, ids=NAMES[6:])
def test_scaled_sums_are_rounded_once(level, dtype, device):
    a, b = drawn(level, 20, 130, 300, device=device)
    y = multiplied(level.multiply, a, b, dtype)
    assert torch.equal(y, level.multiply(a, b).to(dtype))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
@pytest.mark.parametrize("level", [LEVELS[0], LEVELS[1], LEVELS[5], LEVELS[7]], ids=name)
def test_any_layout(level, layout, device):
    """Rows that do not lie along K in steps of 16 bytes are copied."""
    a, b = drawn(level, 5, 6, 40, device=device)
    if level.scaled:
        odd = (Scaled(laid_out(x.values, layout), laid_out(x.scale, layout), x.group)
               for x in (a, b))  # fmt: skip
    else:
        odd = (laid_out(x, layout) for x in (a, b))
    assert torch.equal(multiplied(level.multiply, *odd), level.multiply(a, b))


@pytest.mark.parametrize("level", [LEVELS[5], *NARROW], ids=name)
def test_two_runs_are_bitwise_equal(level, device):
    a, b = drawn(level, 130, 200, 200, device=device)
    bitwise_equal(lambda: level.multiply(a, b))


@pytest.mark.parametrize("level", NARROW, ids=NAMES[6:])
def test_cards_without_fp8_decode_bytes(level, monkeypatch, device):
    a, b = drawn(level, 20, 70, 300, device=device)
    y = level.multiply(a, b)
    real = cards.card("a test", a.values)
    monkeypatch.setattr(cards, "card", lambda *_: real._replace(capability=(8, 0)))
    assert error(multiplied(level.multiply, a, b), y) < tolerance(a, y.dtype)


def _bad(device: str):
    """Yield a level, what it cannot multiply, and words of its refusal."""
    one = torch.ones(2, 3, device=device)
    a, b = draw(2, 200, 1, device), draw(3, 200, 128, device)
    for level in PLAIN:
        yield level, (one, one[:, :2]), r"got \(2, 3\) and \(2, 2\)"
        yield level, (one[:0], one), r"empty, got \(0, 3\)"
        yield level, (one[0], one), r"got \(3,\)"
        yield level, (one, one.half()), "float32 and torch.float16"
        yield level, (one.double(), one.double()), "float64"
    yield LEVELS[0], (one[:1].expand(2**16, 3), one[:1].expand(2**15, 3)), "65536 x 32768"
    for level in NARROW:
        yield level, (b, b), r"a must hold .*\(1, 128\)"
        yield level, (a, a), r"b must hold .*\(128, 128\)"
        yield level, (a._replace(values=a.values.half()), b), "float16"
        yield level, (a._replace(scale=a.scale.half()), b), "float16"
        yield level, (a._replace(scale=a.scale[:1]), b), r"\(2, 2\) scales, got \(1, 2\)"
        yield level, (draw(2, 100, 1, device), b), r"got \(2, 100\)"
        yield level, (a, b, torch.float64), "float64"


@pytest.mark.parametrize("n", range(45))
def test_refuses_with_its_name_and_the_value(n, device):
    level, operands, words = list(_bad(device))[n]
    with pytest.raises(ValueError, match=f"levels.{level.name}: .*{words}"):
        level.multiply(*operands)


def test_all_refusals_are_tried(device):
    assert len(list(_bad(device))) == 45


# What chapter 12 shows


def test_levels_are_numbered_and_say_their_idea():
    assert [level.number for level in LEVELS] == list(range(1, 9))
    for level in LEVELS:
        doc = level.module.__doc__
        assert doc.startswith(f"Level {level.number}: ")
        assert f" - {level.idea}.\n\n" in doc
        assert re.search(r"^Gains ", doc, re.MULTILINE)
        assert re.search(r"^Bound ", doc, re.MULTILINE)


@pytest.mark.parametrize("level", LEVELS, ids=NAMES)
def test_a_level_fits_a_cell(level):
    """Its lines are as wide as a page, its kernel as long as a cell; level 4 has level 3's."""
    source = getsource(level.module)
    assert max(map(len, source.splitlines())) <= 88
    kernel = getattr(level.module, "kernel", None)
    assert (kernel is None) == (level.name == "pipelined")
    assert kernel is None or len(getsourcelines(kernel.fn)[0]) <= 40


# Loads, counted and watched


class Seen(NamedTuple):
    """A load: by which program, from which addresses inside of the matrix, bytes of a number."""

    program: int
    addresses: np.ndarray
    size: int


@contextmanager
def watched() -> Iterator[list[Seen]]:
    """Record what programs load while kernels are interpreted, through descriptors too."""
    from triton.runtime.interpreter import InterpreterBuilder, interpreter_builder

    assert cards.interpreted(), "only the interpreter can be watched"
    found: list[Seen] = []
    load = InterpreterBuilder.create_masked_load  # which loads by descriptors call too

    def recorded(self, pointers, mask, *rest, **named):
        x, y, _ = (int(n) for n in interpreter_builder.grid_idx)
        size = pointers.dtype.scalar.element_ty.primitive_bitwidth // 8
        addresses = np.unique(pointers.data[mask.data])
        found.append(Seen(x + y * interpreter_builder.grid_dim[0], addresses, size))
        return load(self, pointers, mask, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", recorded)
        yield found


def measured(found: list[Seen], at_once: int, steps: int) -> tuple[int, int]:
    """Return the bytes of all loads, and those that differ among `at_once` tiles at a time.

    A tile is `steps` loads of one program; persistent programs make one tile in each round.
    """
    n_programs = 1 + max(seen.program for seen in found)
    made: Counter[int] = Counter()  # loads of each program until now
    rounds: dict[tuple[int, int], list[np.ndarray]] = defaultdict(list)
    for program, addresses, size in found:
        tile = program + made[program] // steps * n_programs
        made[program] += 1
        rounds[tile // at_once, size].append(addresses)
    apart = sum(size * len(np.unique(np.concatenate(a))) for (_, size), a in rounds.items())
    return sum(len(seen.addresses) * seen.size for seen in found), apart


@pytest.mark.parametrize("level", LEVELS, ids=NAMES)
def test_loads_are_what_the_interpreter_sees(level, device):
    """On a card of three multiprocessors; ragged tiles, a last round that is not full."""
    if device != "cpu":
        pytest.skip("NOT RUN: watched in the interpreter")
    m, n, k = (7, 23, 40) if level.number == 1 else (1200 if level.scaled else 700, 400, 40)
    m = 40 if level.number == 8 else m
    a, b = drawn(level, m, n, k)
    with watched() as found:
        level.multiply(a, b)
    depth = 128 if level.scaled or level.number == 1 else 32
    steps = -(-k // depth) * (4 if level.scaled else 2)  # values and scales of both operands
    walk = level.walk
    expected = loads(level, m, n, k, n_sm=3, bytes_each=4)
    assert measured(found, 3 * walk.programs, steps) == tuple(expected)


def test_loads_by_hand():
    """4 x 4 tiles, 4 programs at a time: a row needs 1 + 4 strips, a square 2 + 2."""
    row = Level(2, tiled_file, Walk(128, 128))
    square = row._replace(walk=Walk(128, 128, group=2))
    strip = 128 * 64 * 2
    assert loads(row, 512, 512, 64, n_sm=4) == (2 * 16 * strip, 4 * 5 * strip)
    assert loads(square, 512, 512, 64, n_sm=4) == (2 * 16 * strip, 4 * 4 * strip)
    one = LEVELS[0]._replace(walk=Walk(1, 1))
    assert loads(one, 3, 5, 7, n_sm=1, bytes_each=4) == (2 * 15 * 28, 2 * 15 * 28)


def test_each_idea_loads_less():
    """8192 x 8192 x 8192 on Hopper: tiles ask for less, squares fetch less, E4M3 half of it."""
    size = (8192,) * 3
    along, square, *_, narrow, _ = (loads(level, *size) for level in LEVELS[1:])
    assert loads(LEVELS[0], 1024, 1024, 64).l2 == 128 * loads(LEVELS[1], 1024, 1024, 64).l2
    assert along.l2 == square.l2
    assert square.memory < 0.65 * along.memory
    assert narrow.l2 < 0.52 * square.l2
    few = [loads(level, 16, 8192, 8192) for level in NARROW]
    assert few[1].memory == few[0].memory  # the weight, once


# Planted bugs


def caught(module: ModuleType, number: int, m: int, n: int, k: int, old: str, new: str) -> None:
    level = LEVELS[number - 1]
    key = (number, m, n, k)
    if key not in _checks:
        _checks[key] = lambda copy: check(level._replace(module=copy), m, n, k)
    assert_caught(module, _checks[key], old, new)


_checks: dict = {}
TILES, EIGHT = (257, 129, 70), (33, 70, 300)
BUGS = [
    (loop, 1, (3, 7, 300), "a_row + k, mask=k < K", "a_row + k, mask=k < K - 1"),
    (loop, 1, (3, 7, 300), "tl.program_id(0) // N", "tl.program_id(0) % N"),
    (loop, 1, (3, 7, 300), "range(0, K, BLOCK_K)", "range(0, K - BLOCK_K, BLOCK_K)"),
    (tiled_file, 2, TILES, "inside = first + k < K", "inside = first + k < K + 1"),
    (tiled_file, 2, TILES, "(rows < M)", "(rows <= M)"),
    (tiled_file, 2, TILES, "(cols < N)", "(cols < N - 1)"),
    (tiled_file, 2, TILES, "tl.dot(left, right.T, sums,", "tl.dot(left, right.T,"),
    (tiled_file, 2, TILES, "tl.program_id(0) // tiles_n", "tl.program_id(0) % tiles_n"),
    (rasterised, 3, TILES, "tiles_m, tiles_n, GROUP_M)", "tiles_n, tiles_m, GROUP_M)"),
    (described, 5, TILES, "b.load([n, k])", "b.load([m, k])"),
    (described, 5, TILES, "range(0, K, BLOCK_K)", "range(0, K - BLOCK_K + 1, BLOCK_K)"),
    (persistent, 6, TILES, "tiles_m * tiles_n, step", "step, step"),
    (persistent, 6, TILES, "c.store([m, n]", "c.store([m, 0]"),
    (scaled_file, 7, EIGHT, "tl.dot(left, right.T) * scale", "tl.dot(left, right.T)"),
    (scaled_file, 7, EIGHT, "a_scales += a_k", "a_scales += 0"),
    (scaled_file, 7, EIGHT, "b_scales += b_k", "b_scales += 0"),
    (swapped_file, 8, EIGHT, "tl.program_id(1) * BLOCK_M", "0"),
    (swapped_file, 8, EIGHT, "a_scale += a_k", "a_scale += 0"),
    (swapped_file, 8, EIGHT, "put(c, sums.T, m, n, M, N, c_row)", "put(c, sums.T, m, n, M, 16, 1)"),
]


@pytest.mark.parametrize("bug", BUGS, ids=[f"{bug[0].__name__.split('.')[-1]} {bug[-1]}"
                                           for bug in BUGS])  # fmt: skip
def test_planted_bug_is_seen(bug, device):
    if device != "cpu":
        pytest.skip("NOT RUN: planted in the interpreter")
    module, number, shape, old, new = bug
    caught(module, number, *shape, old, new)


# Ring 2: what the compiler makes of it


def launch(number: int, m: int, n: int, k: int, dtype: str) -> None:
    level = LEVELS[number - 1]
    if not level.scaled:
        a, b = (torch.empty(r, k, dtype=getattr(torch, dtype), device="meta") for r in (m, n))
        level.multiply(a, b)
        return
    groups = -(-k // 128)
    scales = torch.empty(groups, m, device="meta").mT, torch.empty(-(-n // 128), groups,
                                                                   device="meta")  # fmt: skip
    a, b = (torch.empty(r, k, dtype=torch.float8_e4m3fn, device="meta") for r in (m, n))
    level.multiply(Scaled(a, scales[0], TILE), Scaled(b, scales[1], BLOCK), getattr(torch, dtype))


def call(level: Level, m: int = 8192, dtype: str = "bfloat16") -> dict:
    m = 16 if level.number == 8 else m
    return {"number": level.number, "m": m, "n": 8192, "k": 8192, "dtype": dtype}


@pytest.mark.slow
def test_hopper_runs_every_level_from_registers():
    """No spills; the tensor cores, copies and programs on a multiprocessor that each idea is."""
    calls = [call(level) for level in LEVELS]
    compiled = compile_calls("test_kernel_levels", "launch", calls)
    for level, (kernel,) in zip(LEVELS, compiled, strict=True):
        found = kernel.instructions
        assert kernel.spilled_bytes == 0, kernel
        assert not found.keys() & {"STL", "LDL", "HMMA", "QMMA"}, kernel
        assert bool(found.get("HGMMA")) == (2 <= level.number <= 6), kernel
        assert bool(found.get("QGMMA")) == level.scaled, kernel
        assert bool(found.get("LDGSTS")) == (level.number == 4), kernel
        assert bool(found.get("LDG.128")) == (level.number in (2, 3)), kernel
        assert bool(found.get("UTMALDG")) == (level.number >= 5), kernel
        assert bool(found.get("UTMASTG")) == (level.number in (5, 6, 7)), kernel
        assert "STG" not in found or level.number == 1, kernel
        # one warp a program: the hardware holds 32 programs, which `compiled` does not know
        assert min(kernel.programs_on_an_sm, 32) == level.walk.programs, kernel


@pytest.mark.slow
@pytest.mark.parametrize("capability", [key for key in CARDS if key != HOPPER], ids=str)
def test_other_cards_compile(capability):
    """All with a ring of buffers. What level 7 spills before Hopper its file says."""
    numbers = (4, 5, 6, 8) if capability[0] == 8 else (4, 5, 6, 7, 8)
    calls = [call(LEVELS[n - 1]) for n in numbers]
    wanted = {8: {"HMMA", "QMMA"}, 10: {"UTCHMMA", "UTCQMMA"}, 12: {"HMMA", "QMMA"}}
    compiled = compile_calls("test_kernel_levels", "launch", calls, capability)
    for (kernel,) in compiled:
        found = kernel.instructions
        assert not found.get("LDL"), kernel  # sm_120 keeps 8 bytes on the stack, never looks
        assert kernel.spilled_bytes <= 8, kernel
        assert wanted[capability[0]] & found.keys(), kernel


# Ring 3: on a card


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("level", PLAIN, ids=NAMES[:6])
def test_many_rounds_on_a_card(level, dtype):
    """Ragged, more tiles than multiprocessors."""
    m, n, k = (301, 277, 500) if level.number == 1 else (2177, 1999, 500)
    check(level, m, n, k, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("level", NARROW, ids=NAMES[6:])
def test_scaled_products_on_a_card(level):
    m = 16 if level.number == 8 else 2177
    for n, k in ((4096, 7168), (2111, 1000)):
        x, w = torch.randn(m, k, device="cuda"), torch.randn(n, k, device="cuda")
        a, b = quantise(x, TILE), quantise(w, BLOCK)
        y = multiplied(level.multiply, a, b, torch.bfloat16)
        assert error(y, exact(a, b)) < ON_A_CARD + ROUNDED[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("level", LEVELS, ids=NAMES)
def test_graph_is_captured_and_replayed(level):
    a, b = drawn(level, 300, 264, 512, torch.bfloat16, "cuda")
    expected = level.multiply(a, b)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = level.multiply(a, b)
    y.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)
