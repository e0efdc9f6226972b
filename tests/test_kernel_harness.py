"""The harness of the kernel tests: each of its tools sees what it is there to see.

Rings: 1 Triton's interpreter, 2 the compiler without a GPU, 3 a GPU (`-m gpu`), 4 the benchmark.
"""

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from compiled import CARDS, HOPPER, Compiled, compile_calls
from hypothesis import given
from kernel_inputs import (
    LAYOUTS,
    POISON,
    SPECIAL,
    assert_caught,
    bits,
    bitwise_equal,
    gradients,
    is_written,
    laid_out,
    lengths,
    mutated,
    poison,
    poisoned,
    poisoned_memory,
    shapes,
    special,
    tensors_of,
)
from minids_kernels import cards
from torch import Tensor
from triton.runtime.errors import InterpreterError

NARROW = [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
WIDE = [torch.float32, torch.float16, *NARROW]
# a compiler has none from one FP8 to the other
CASTS = [pair for pair in itertools.permutations(WIDE, 2) if sum(x.itemsize for x in pair) > 2]
INTERPRETED = cards.interpreted()
only_interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="NOT RUN: about Triton's interpreter, and this machine has a GPU"
)


@triton.jit
def cast(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, i < n).to(y.dtype.element_ty), i < n)


@triton.jit
def combine(a, b, y, n, HOW: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b = tl.load(a + i, i < n), tl.load(b + i, i < n)
    if HOW == "add":
        c = a + b
    elif HOW == "subtract":
        c = a - b
    elif HOW == "multiply":
        c = a * b
    elif HOW == "negate":
        c = -a
    elif HOW == "abs":
        c = tl.abs(a)
    elif HOW == "where":
        c = tl.where(a < b, a, b)
    elif HOW == "scalar":
        c = a * 1.5
    elif HOW == "divide":
        c = tl.div_rn(a.to(tl.float32), b.to(tl.float32)).to(a.dtype)
    elif HOW == "divide about":
        c = (a / b).to(a.dtype)
    elif HOW == "maximum":
        c = tl.maximum(a, b).to(a.dtype)
    elif HOW == "minimum":
        c = tl.minimum(a, b).to(a.dtype)
    elif HOW == "maximum, NaN stays":
        c = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL).to(a.dtype)
    elif HOW == "clamp":
        c = tl.clamp(a, -448.0, 448.0).to(a.dtype)
    elif HOW == "clamp, NaN stays":
        c = tl.clamp(a, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(a.dtype)
    elif HOW == "fma":
        c = tl.fma(a, b, a)
    elif HOW == "exp":
        c = tl.exp(a.to(tl.float32)).to(a.dtype)
    tl.store(y + i, c, i < n)


@triton.jit
def compare(a, b, y, n, HOW: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b = tl.load(a + i, i < n), tl.load(b + i, i < n)
    if HOW == "<":
        c = a < b
    elif HOW == "<=":
        c = a <= b
    elif HOW == ">":
        c = a > b
    elif HOW == ">=":
        c = a >= b
    elif HOW == "==":
        c = a == b
    else:
        c = a != b
    tl.store(y + i, c.to(tl.int8), i < n)


@triton.jit
def reduce(x, y, HOW: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    block = tl.load(x + rows[:, None] * COLS + tl.arange(0, COLS)[None, :])
    if HOW == "max":
        z = tl.max(block, 1)
    elif HOW == "min":
        z = tl.min(block, 1)
    elif HOW == "sum":
        z = tl.sum(block, 1)
    else:
        z = tl.sum(block.to(tl.float32), 1)
    tl.store(y + rows, z.to(y.dtype.element_ty))


@triton.jit
def dot(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left = tl.load(a + m[:, None] * K + k[None, :])
    right = tl.load(b + n[None, :] * K + k[:, None])
    tl.store(c + m[:, None] * N + n[None, :], tl.dot(left, right, input_precision="ieee"))


@triton.jit
def copy_by_descriptor(x, y, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Read a ragged matrix, add zero in FP32, write it: padding must come as zeros."""
    stride = tl.cdiv(cols, 16) * 16
    source = tl.make_tensor_descriptor(x, [rows, cols], [stride, 1], [ROWS, COLS])
    target = tl.make_tensor_descriptor(y, [rows, cols], [stride, 1], [ROWS, COLS])
    for n in range(0, tl.cdiv(cols, COLS)):
        block = source.load([0, n * COLS]).to(tl.float32)
        target.store([0, n * COLS], block.to(y.dtype.element_ty))


def launch(kernel, *args: Tensor, **constants) -> Tensor:
    """Run an elementwise kernel over its arguments, the last of which is filled and returned."""
    n = args[-1].numel()
    inputs = [x.contiguous() for x in args[:-1]]
    kernel[(triton.cdiv(n, 8192),)](*inputs, args[-1], n, **constants, BLOCK=8192)
    return args[-1]


def every(dtype: torch.dtype, device: str) -> Tensor:
    """Return every number of a narrow dtype, or FP32 and FP16 of all kinds and sizes."""
    if dtype == torch.bfloat16:
        return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).to(device)
    if dtype.itemsize == 1:
        return torch.arange(256, dtype=torch.uint8).view(dtype).to(device)
    kinds = torch.cat([special(name, 1, 1000, torch.float32, "cpu") for name in SPECIAL], -1)[0]
    sizes = torch.randn(1000) * torch.logspace(-12, 6, 1000)
    return torch.cat([kinds, sizes, halfway(torch.bfloat16), halfway(torch.float8_e4m3fn)]).to(
        device, dtype
    )


def halfway(dtype: torch.dtype) -> Tensor:
    """Return what lies between each two neighbours of a narrow dtype, and on either side of it."""
    number = every(dtype, "cpu").float()
    number = number[number.isfinite()].unique()
    middle = (number[1:].double() + number[:-1].double()).div(2).float()
    up, down = (middle.nextafter(torch.tensor(side)) for side in (math.inf, -math.inf))
    return torch.cat([middle, up, down])


def saturated(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return torch's cast, FP8 clamped to its largest number first, as GPUs do."""
    if dtype.itemsize == 1:
        x = x.float().clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    return x.to(dtype)


def needs(dtypes: list[torch.dtype]) -> None:
    """Skip on a GPU that has no instruction for these dtypes."""
    if torch.float8_e4m3fn in dtypes and not cards.card("cast", torch.empty(0).to(where())).fp8:
        pytest.skip("NOT RUN: this GPU has no E4M3")


def where() -> str:
    return "cpu" if INTERPRETED else "cuda"


def same(a: Tensor, b: Tensor) -> bool:
    """Compare bits, but for NaN: its sign and digits are nobody's promise."""
    a, b = a.cpu(), b.cpu()
    nan = a.float().isnan()
    return bool((nan == b.float().isnan()).all() and (bits(a) == bits(b))[~nan].all())


# Ring 1: the interpreter, and the same on a GPU


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("source", "target"), CASTS, ids=str)
def test_casts_are_torchs(source, target, device):
    needs([source, target])
    x = every(source, device)
    if (source, target) == (torch.float8_e5m2, torch.bfloat16) and not INTERPRETED:
        x = x[x.float().isfinite()]  # Triton moves bits there, and an infinity becomes 65536
    y = launch(cast, x, torch.empty(x.shape, dtype=target, device=device))
    assert same(y, saturated(x.cpu(), target))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_integers_to_floats_and_back_are_torchs(dtype, device):
    x = torch.arange(-70_000, 70_000, 7, dtype=torch.int32, device=device)
    y = launch(cast, x, torch.empty(x.shape, dtype=dtype, device=device))
    assert same(y, x.to(dtype))
    back = launch(cast, y, torch.empty_like(x))
    assert torch.equal(back, y.to(torch.int32))


TWO_NUMBERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "subtract": torch.sub,
    "multiply": torch.mul,
    "negate": lambda a, b: 0 - a,
    "abs": lambda a, b: a.abs(),
    "where": lambda a, b: torch.where(a < b, a, b),
    "scalar": lambda a, b: a * 1.5,
    "divide": torch.div,
    "maximum": lambda a, b: numbers_first(torch.maximum, a, b),
    "minimum": lambda a, b: numbers_first(torch.minimum, a, b),
    "maximum, NaN stays": torch.maximum,
    "clamp, NaN stays": lambda a, b: a.clamp(-448.0, 448.0),
    "fma": lambda a, b: exact_fma(a, b),
}


# which of 0 and -0 is larger is nobody's promise; a fraction has no -0
SIGN_OF_ZERO_LOST = {"maximum", "minimum", "maximum, NaN stays", "fma"}


def numbers_first(extreme: Callable, a: Tensor, b: Tensor) -> Tensor:
    """Do as max.f32 and min.f32: of a number and NaN, the number. (fmax keeps a signalling NaN.)"""
    return torch.where(a.isnan(), b, torch.where(b.isnan(), a, extreme(a, b)))


def exact_fma(a: Tensor, b: Tensor) -> Tensor:
    """Return a b + a, rounded once, by Python's fractions."""

    def one(x: float, y: float) -> float:
        if not (math.isfinite(x) and math.isfinite(y)):
            return x * y + x
        return nearest(Fraction(x) * Fraction(y) + Fraction(x), a.dtype)

    numbers = zip(a.double().tolist(), b.double().tolist(), strict=True)
    return torch.tensor([one(x, y) for x, y in numbers], dtype=torch.float64).to(a.dtype)


def nearest(exact: Fraction, dtype: torch.dtype) -> float:
    """Round a fraction to a dtype's digits: to nearest, ties to even."""
    digits, least = {torch.float32: (24, -149), torch.bfloat16: (8, -133)}[dtype]
    power = exact.numerator.bit_length() - exact.denominator.bit_length()
    power += abs(exact) >= Fraction(2) ** power  # now it lies below 2^power, not below half of it
    unit = max(power - digits, least)
    return math.ldexp(round(exact / Fraction(2) ** unit), unit)


def pairs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return every number of a dtype beside another one of it, one in five beside itself."""
    x = every(dtype, "cpu")
    y = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))]
    y[::5] = x[::5]
    return x, y


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("how", TWO_NUMBERS)
def test_arithmetic_is_torchs(how, dtype, device):
    a, b = pairs(dtype)
    if how == "fma":
        a, b = a[::16], b[::16]  # fractions take their time
    y = launch(combine, a.to(device), b.to(device), torch.empty_like(a, device=device), HOW=how)
    expected = TWO_NUMBERS[how](a, b)
    if how in SIGN_OF_ZERO_LOST:
        y, expected = y + 0, expected + 0  # -0 + 0 is 0
    assert same(y, expected)


COMPARISONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "<": torch.lt, "<=": torch.le, ">": torch.gt, ">=": torch.ge, "==": torch.eq, "!=": torch.ne,
}  # fmt: skip


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("how", COMPARISONS)
def test_comparisons_of_bf16_are_torchs(how, device):
    a, b = pairs(torch.bfloat16)
    y = torch.empty(a.shape, dtype=torch.int8, device=device)
    launch(compare, a.to(device), b.to(device), y, HOW=how)
    assert torch.equal(y.cpu().bool(), COMPARISONS[how](a, b))


def rows_with_nan(dtype: torch.dtype) -> Tensor:
    """Return 16 x 64 numbers: a row of NaN alone, rows with some, rows with none."""
    x = torch.randn(16, 64)
    x[0] = math.nan
    x[1, 3] = x[2, 0] = x[3, 63] = math.nan
    x[4, 5] = -math.inf
    return x.to(dtype)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("how", ["max", "min"])
def test_extremes_of_rows_leave_nan_out_as_max_f32_does(how, dtype, device):
    x = rows_with_nan(dtype)
    y = torch.empty(16, dtype=dtype, device=device)
    reduce[(1,)](x.to(device), y, HOW=how, ROWS=16, COLS=64)
    side = -math.inf if how == "max" else math.inf
    filled = x.nan_to_num(side, math.inf, -math.inf)
    expected = filled.amax(1) if how == "max" else filled.amin(1)
    expected[0] = math.nan
    assert same(y, expected)


@pytest.mark.usefixtures("interpreter")
def test_sum_of_bf16_widened_first(device):
    x = torch.randn(16, 64).bfloat16()
    y = torch.empty(16, device=device)
    reduce[(1,)](x.to(device), y, HOW="sum of FP32", ROWS=16, COLS=64)
    torch.testing.assert_close(y.cpu().double(), x.double().sum(1), rtol=0, atol=1e-5)


@only_interpreted
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_sum_of_narrow_numbers_is_refused(dtype):
    """A GPU would round after each addition, in an order of its own, or not compile it at all."""
    with pytest.raises(Exception, match="widen first"):
        reduce[(1,)](torch.ones(16, 64).to(dtype), torch.empty(16), HOW="sum", ROWS=16, COLS=64)


@only_interpreted
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("how", ["add", "where"])
def test_arithmetic_of_fp8_is_refused(how):
    x = every(torch.float8_e4m3fn, "cpu")
    with pytest.raises(Exception, match="widen first"):
        launch(combine, x, x, torch.empty_like(x), HOW=how)


# 64 products, each sum cut off at the 23rd digit of the largest as tensor cores do
PRODUCT_ERROR = 64 * 2.0**-23
# of FP8, Hopper keeps 13 digits below the largest product (DeepSeek-V3, section 3.3.2)
FP8_ERROR = 64 * 2.0**-13


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *NARROW], ids=str)
def test_dots_are_those_of_fp64(dtype, device):
    needs([dtype])
    a, b = torch.randn(64, 64).to(dtype), (torch.randn(32, 64) * 3).to(dtype)
    c = torch.empty(64, 32, device=device)
    dot[(1,)](a.to(device), b.to(device), c, M=64, N=32, K=64)
    exact, sizes = a.double() @ b.double().mT, a.double().abs() @ b.double().abs().mT
    limit = PRODUCT_ERROR * sizes
    if dtype.itemsize == 1 and not INTERPRETED:
        limit = FP8_ERROR * sizes.amax()
    assert ((c.cpu() - exact).abs() <= limit).all()


@only_interpreted
@pytest.mark.usefixtures("interpreter")
def test_cast_from_one_fp8_to_the_other_is_refused():
    x = every(torch.float8_e4m3fn, "cpu")
    with pytest.raises(Exception, match="widen first"):
        launch(cast, x, torch.empty(x.shape, dtype=torch.float8_e5m2))


@only_interpreted
@pytest.mark.usefixtures("interpreter")
def test_dot_of_fp8_sees_every_code():
    codes = every(torch.float8_e4m3fn, "cpu")
    a = torch.zeros(256, 16, dtype=torch.float8_e4m3fn)
    a[:, 0] = codes
    one = torch.zeros(16, 16, dtype=torch.float8_e4m3fn)
    one[:, 0] = torch.ones(16).to(one.dtype)
    c = torch.empty(256, 16)
    dot[(1,)](a, one, c, M=256, N=16, K=16)
    assert same(c[:, 0], codes.float() + 0)  # a sum with 0 is never -0


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float32], ids=str)
def test_descriptors_read_ragged_matrices_of(dtype, device):
    needs([dtype])
    if not INTERPRETED:
        triton.set_allocator(
            lambda size, align, stream: torch.empty(size, dtype=torch.int8, device=device)
        )
    x = poison(torch.empty(7, 112, dtype=dtype, device=device))
    x[:, :100] = torch.randn(7, 100).to(dtype)
    y = poison(torch.empty_like(x))
    copy_by_descriptor[(1,)](x, y, 7, 100, ROWS=8, COLS=64)
    assert torch.equal(bits(y), bits(x))


def casts_well(source: torch.dtype, target: torch.dtype) -> bool:
    x = torch.arange(250, dtype=source) if not source.is_floating_point else every(source, "cpu")
    return same(launch(cast, x, torch.empty(x.shape, dtype=target)), saturated(x, target))


def combines_well(how: str, dtype: torch.dtype = torch.bfloat16) -> bool:
    a, b = pairs(dtype)
    if how == "fma":
        a, b = a[::97], b[::97]
    y = launch(combine, a, b, torch.empty_like(a), HOW=how)
    return same(y + 0, TWO_NUMBERS[how](a, b) + 0)


def compares_well(how: str) -> bool:
    a, b = pairs(torch.bfloat16)
    y = launch(compare, a, b, torch.empty(a.shape, dtype=torch.int8), HOW=how)
    return torch.equal(y.bool(), COMPARISONS[how](a, b))


def clamps_well() -> bool:
    """NaN that is not to stay is undefined: it must not come out as if it stayed."""
    x = torch.tensor([math.nan, 1.0, -500.0, 500.0])
    y = launch(combine, x, x, torch.empty_like(x), HOW="clamp")
    return not y.isnan().any() and y[1:].tolist() == [1.0, -448.0, 448.0]


def reduces_well(how: str, dtype: torch.dtype) -> bool:
    y = torch.empty(16, dtype=dtype)
    reduce[(1,)](rows_with_nan(dtype), y, HOW=how, ROWS=16, COLS=64)
    return bool(y[0].isnan() and y[1:].isfinite().all())


def refuses_to_sum_bf16() -> bool:
    try:
        reduces_well("sum", torch.bfloat16)
    except InterpreterError as error:
        return "widen first" in str(error)
    return False


def multiplies_well() -> bool:
    a, b, c = torch.eye(16).bfloat16(), torch.randn(16, 16).bfloat16(), torch.empty(16, 16)
    dot[(1,)](a, b, c, M=16, N=16, K=16)
    return torch.equal(c, b.float().mT)


def loops_well() -> bool:
    x = torch.zeros(8, 64)
    copy_by_descriptor[(1,)](x, y := poison(torch.empty(8, 64)), 8, 64, ROWS=8, COLS=32)
    return torch.equal(x, y)


def overflows_quietly() -> bool:
    x = torch.full((8,), 1000.0)
    return launch(combine, x, x, torch.empty_like(x), HOW="exp").isposinf().all().item()


CANARIES: dict[str, Callable[[], bool]] = {
    "create_fp_to_fp": partial(casts_well, torch.float32, torch.float8_e4m3fn),
    "create_fp_trunc": partial(casts_well, torch.float32, torch.bfloat16),
    "create_fp_ext": partial(casts_well, torch.bfloat16, torch.float32),
    "create_si_to_fp": partial(casts_well, torch.int32, torch.bfloat16),
    "create_ui_to_fp": partial(casts_well, torch.uint8, torch.bfloat16),
    "create_fadd": partial(combines_well, "add"),
    "create_fsub": partial(combines_well, "subtract"),
    "create_fmul": partial(combines_well, "multiply"),
    "create_fcmpOLT": partial(compares_well, "<"),
    "create_fcmpOLE": partial(compares_well, "<="),
    "create_fcmpOGT": partial(compares_well, ">"),
    "create_fcmpOGE": partial(compares_well, ">="),
    "create_fcmpOEQ": partial(compares_well, "=="),
    "create_fcmpUNE": partial(compares_well, "!="),
    "get_bf16": partial(combines_well, "scalar"),
    "create_dot": multiplies_well,
    "create_fma": partial(combines_well, "fma", torch.float32),
    "create_clampf": clamps_well,
    "create_maxnumf": partial(combines_well, "maximum"),
    "create_minnumf": partial(combines_well, "minimum"),
    "min_max": partial(reduces_well, "max", torch.float32),
    "sum": refuses_to_sum_bf16,
    "_patch_lang_tensor": loops_well,
    "__call__": overflows_quietly,
}


@only_interpreted
@pytest.mark.parametrize("name", CANARIES)
def test_shim_is_there_and_each_of_its_entries_is_needed(name):
    from triton_shim import shimmed

    with shimmed():
        assert CANARIES[name](), f"{name}: the interpreter is wrong with the shim"
    with shimmed(without=name):
        try:
            right = CANARIES[name]()
        except (InterpreterError, AttributeError, Warning):
            return
    assert not right, f"triton {triton.__version__} is right by itself: delete {name} from MENDED"


@only_interpreted
def test_every_entry_of_the_shim_has_its_canary():
    from triton_shim import MENDED

    assert [name for _, name in MENDED] == sorted(CANARIES, key=[n for _, n in MENDED].index)


def calls_in(kernel: Callable[[], bool]) -> int:
    """Count the calls of Python that a launch takes, the second time."""
    kernel()
    count = 0

    def one(frame, event, argument) -> None:
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(one)
    try:
        assert kernel()
    finally:
        sys.setprofile(before)
    return count


@only_interpreted
def test_shortcuts_of_the_shim_save_calls():
    """Without any one of them a launch that calls a function takes more: 3.6.0 needs them all."""
    from triton_shim import SHORTCUTS, shimmed

    with shimmed():
        least = calls_in(loops_well)
    for _, name in SHORTCUTS:
        with shimmed(without=name):
            assert calls_in(loops_well) > least, f"triton is as quick without {name}: delete it"


@only_interpreted
def test_shortcuts_of_the_shim_give_the_same():
    from triton.runtime import interpreter
    from triton_shim import shimmed

    kinds = [tl.int1, tl.int64, tl.bfloat16, tl.float8e4nv, tl.float32, tl.pointer_type(tl.int8)]
    kinds += [tl.block_type(kind, [8]) for kind in kinds]
    tuples = [[], [1, 64], [tl.constexpr(1), tl.constexpr(64)], [1.0, tl.float32]]

    def found() -> tuple[list, list[str]]:
        dtypes = [interpreter._get_np_dtype(kind) for kind in kinds]
        return dtypes, [str(tl.core._type_for_tuple_values(x)) for x in tuples]

    with shimmed():
        mended = found()
    for name in ("_get_np_dtype", "_type_for_tuple_values"):
        with shimmed(without=name):
            assert found() == mended, name


# Ring 2: the compiler


@triton.jit
def product(
    a, b, c, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """One tile of a b^T; FP8 or BF16, summed in one accumulator."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        left = tl.load(a + m[:, None] * K + start + k[None, :])
        right = tl.load(b + n[None, :] * K + start + k[:, None])
        total = tl.dot(left, right, total)
    tl.store(c + m[:, None] * N + n[None, :], total)


def start(what: str, **call) -> None:
    """Launch what ring 2 is tried on."""
    if what == "product":
        dtype = getattr(torch, call.pop("dtype", "float8_e4m3fn"))
        a, b = (torch.empty(4096, 4096, dtype=dtype, device="meta") for _ in "ab")
        c = torch.empty(4096, 4096, device="meta")
        cards.card("product", a, b, c)
        tile = call.pop("tile")
        product[(32, 32)](a, b, c, 4096, 4096, 4096, *tile, **call)
    elif what == "narrow":
        x = torch.empty(8193, device="meta")
        launch(cast, x[1:], x[1:])  # not aligned to 16 bytes
    elif what.startswith("divide"):
        x = torch.empty(1024, device="meta")
        combine[(1,)](x, x, x, 1024, HOW=what, BLOCK=1024)


CALLS = {
    "wgmma of FP8": {"what": "product", "tile": [64, 64, 128]},
    "wgmma of BF16": {"what": "product", "tile": [64, 64, 64], "dtype": "bfloat16"},
    "too few rows for wgmma": {"what": "product", "tile": [16, 64, 128]},
    "too many registers": {"what": "product", "tile": [128, 256, 32]},  # all 255 for the sum
    "divide": {"what": "divide"},
    "divide about": {"what": "divide about"},
    "narrow": {"what": "narrow"},
}


@pytest.fixture(scope="module")
def compiled() -> dict[str, Compiled]:
    launches = compile_calls("test_kernel_harness", "start", list(CALLS.values()))
    return {name: one for name, (one,) in zip(CALLS, launches, strict=True)}


def cores(one: Compiled) -> set[str]:
    return {name for name in one.instructions if "MMA" in name}


def test_compiler_says_which_tensor_cores_a_tile_reaches(compiled):
    found = {name: cores(one) for name, one in compiled.items()}
    assert found["wgmma of FP8"] == {"QGMMA"}
    assert found["wgmma of BF16"] == {"HGMMA"}
    assert found["too few rows for wgmma"] == {"HMMA"}  # FP8 becomes FP16: half the speed


def test_compiler_says_how_wide_loads_and_stores_are(compiled):
    assert compiled["divide"].instructions == {"LDG.128": 4, "STG.128": 2}
    narrow = compiled["narrow"].instructions
    assert set(narrow) == {"LDG", "STG"}


def test_compiler_sees_spills(compiled):
    assert compiled["wgmma of FP8"].spilled_bytes == 0
    spilling = compiled["too many registers"]
    assert spilling.spilled_bytes > 500
    assert spilling.registers == 255
    assert {"STL", "LDL"} <= set(spilling.instructions)


def test_division_is_exact_only_where_it_says_so(compiled):
    assert compiled["divide"].inexact == {}
    assert set(compiled["divide about"].inexact) == {"div.full.f32"}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [card for card in CARDS if card != HOPPER], ids=str)
def test_every_card_can_be_compiled_for(capability):
    ((one,),) = compile_calls("test_kernel_harness", "start", [CALLS["wgmma of BF16"]], capability)
    assert cores(one) == {{(10, 0): "UTCHMMA"}.get(capability, "HMMA")}
    assert (one.kernel, one.warps, one.capability) == ("product", 4, capability)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            {"what": "product", "tile": [256, 128, 128], "num_warps": 8, "num_stages": 6},
            r"product wants \d+ bytes of shared memory, NVIDIA H100 has 232448",
        ),
        ({"what": "nothing"}, "no kernel was launched"),
    ],
)
def test_compiler_refuses(call, words):
    with pytest.raises(AssertionError, match=words) as error:
        compile_calls("test_kernel_harness", "start", [call])
    assert f"start(**{call}) for NVIDIA H100" in str(error.value)


@pytest.mark.parametrize(
    ("capability", "warps", "registers", "shared_bytes", "programs"),
    [
        (HOPPER, 4, 255, 0, 2),  # 8,192 registers a warp: two a quarter
        (HOPPER, 4, 168, 0, 3),  # 5,376: three
        (HOPPER, 4, 170, 0, 2),  # 5,440, for which it gets 5,632: two
        (HOPPER, 8, 168, 0, 1),  # twelve warps are one program and a half
        (HOPPER, 4, 32, 0, 16),  # 64 warps
        ((8, 9), 4, 32, 0, 12),  # 48 warps
        (HOPPER, 4, 32, 113 * 1024, 2),  # each with a KiB of the system's: 2 x 114 = 228
        (HOPPER, 4, 32, 113 * 1024 + 1, 1),
        (HOPPER, 4, 32, 227 * 1024, 1),
        ((12, 0), 4, 32, 99 * 1024, 1),
    ],
)
def test_programs_on_an_sm(capability, warps, registers, shared_bytes, programs):
    one = Compiled("k", warps, registers, 0, shared_bytes, {}, {}, capability)
    assert one.programs_on_an_sm == programs


# Inputs and checks


@pytest.mark.parametrize("shape", [(1, 1), (7, 100), (2, 3, 5), (0, 4)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_layouts_hold_the_same_numbers_amid_poison(layout, shape, dtype):
    x = torch.randn(shape).to(dtype)
    y = laid_out(x, layout)
    assert torch.equal(bits(x), bits(y))
    storage = y.as_strided((y.untyped_storage().nbytes() // y.itemsize,), (1,), 0)
    assert int((bits(storage) != POISON[dtype][1]).sum()) == x.numel()


def test_layouts_are_as_odd_as_they_say():
    x = torch.randn(3, 8)
    oddities = {name: laid_out(x, name) for name in LAYOUTS}
    strides = {name: y.stride() for name, y in oddities.items()}
    assert strides == {
        "contiguous": (8, 1), "transposed": (1, 3), "rows 3 apart": (11, 1),
        "not aligned": (8, 1), "every second column": (16, 2),
    }  # fmt: skip
    aligned = {name for name, y in oddities.items() if y.data_ptr() % 16 == 0}
    assert aligned == set(LAYOUTS) - {"not aligned"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SPECIAL)
def test_special_numbers_are_what_they_are_called(name, dtype):
    x = special(name, 7, 300, dtype, "cpu")
    size = x.float().abs()
    least = torch.finfo(dtype).smallest_normal
    holds = {
        "zeros": bool((size == 0).all() and x.signbit().any() and not x.signbit().all()),
        "subnormals": bool(((size > 0) & (size < least)).any()) or dtype == torch.float16,
        "least scale": bool((size <= 2.0**-117).all()),
        "largest": bool((size > 3e38).any()),
        "edge of E4M3": {448.0, 464.0, 480.0} <= set(size.flatten().tolist()),
        "ties": {448.0, 432.0, 2.0**-10} <= set(size.flatten().tolist()),
        "infinities": holds_some(x.isinf()) and not x.isnan().any(),
        "NaN": holds_some(x.isnan()) and not x.isinf().any(),
        "any bits": len(set(size.frexp()[1].flatten().tolist())) > (30 if least < 1e-6 else 5),
    }
    assert holds[name]


def holds_some(special: Tensor) -> bool:
    """Say whether some groups of 128 hold special numbers and some do not."""
    groups = special.flatten()[:2048].unflatten(0, (16, 128)).any(1)
    return bool(groups.any() and not groups.all())


@given(lengths(300), shapes(5, 5))
def test_lengths_stay_in_bounds(length, shape):
    assert 1 <= length <= 300
    assert all(1 <= size <= 5 for size in shape)


@triton.jit
def fill(y, rows, cols, stride, TOO_FEW: tl.constexpr, TOO_MANY: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    col = tl.arange(0, BLOCK)
    value = col.to(tl.float32).to(y.dtype.element_ty)
    tl.store(y + row * stride + col, value, col < cols - TOO_FEW + TOO_MANY)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_poison_shows_what_was_not_written_and_what_was_outside(dtype, device):
    needs([dtype])
    strides = (16, 1)

    def run(**wrong) -> None:
        target = poisoned((3, 10), dtype, device, strides)
        fill[(3,)](target.x, 3, 10, 16, **({"TOO_FEW": 0, "TOO_MANY": 0} | wrong), BLOCK=16)
        target.check()

    run()
    with pytest.raises(AssertionError, match=r"3 elements were not written, the first at \[0, 9\]"):
        run(TOO_FEW=1)
    with pytest.raises(AssertionError, match=r"3 elements outside were written, at \[10, 26, 42"):
        run(TOO_MANY=1)


@pytest.mark.usefixtures("interpreter")
def test_poisoned_memory_is_what_wrappers_get(device):
    def wrapper(cols: int, **wrong) -> Tensor:
        y = torch.empty(3, cols, device=device)
        fill[(3,)](y, 3, cols, cols, **({"TOO_FEW": 0, "TOO_MANY": 0} | wrong), BLOCK=16)
        return y

    with poisoned_memory() as given_out:
        assert is_written(wrapper(10))
        assert not is_written(wrapper(10, TOO_FEW=1))
        empties = [torch.empty_like(torch.zeros(2)), torch.zeros(2).new_empty(3)]
        empties.append(torch.empty_strided((2, 3), (1, 2), dtype=torch.bfloat16))
        assert all(bool((bits(x) == POISON[x.dtype][1]).all()) for x in empties)
        assert empties[-1].stride() == (1, 2)
        assert torch.zeros(3).tolist() == [0, 0, 0]
    assert len(given_out) >= 5

    def spill() -> None:
        with poisoned_memory():
            wrapper(10, TOO_MANY=1)

    with pytest.raises(AssertionError, match=r"1 elements outside were written, at \[30"):
        spill()


def test_written_nan_is_not_taken_for_poison():
    target = poisoned((4,), torch.float32, "cpu")
    target.x.fill_(math.nan)
    target.check()
    assert is_written(torch.tensor([math.nan, -math.nan, 0.0 / 1]))


def test_bitwise_equal_returns_the_first_and_sees_a_bit():
    x = torch.tensor([1.0, math.nan])
    assert bitwise_equal(lambda: (x, [x])) == (x, [x])
    runs = iter([torch.tensor([0.0]), torch.tensor([-0.0])])
    with pytest.raises(AssertionError, match="run 2 differs from the first in 1"):
        bitwise_equal(lambda: next(runs))
    assert len(tensors_of((x, [x, (x,)]))) == 3


def test_gradients_are_those_of_a_random_sum():
    a, b = torch.randn(2, 3), torch.randn(3, 4)
    found = gradients(lambda a, b: (a @ b, a.sin()), a, b)
    exact = gradients(lambda a, b: (a @ b, a.sin()), a.double(), b.double())
    assert [x.dtype for x in found + exact] == 2 * [torch.float32] + 2 * [torch.float64]
    for mine, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)
    wrong = gradients(lambda a, b: (a @ b.detach() + b.sum(), a.sin()), a, b)
    assert not torch.allclose(wrong[1], found[1])


KERNEL_FILE = """
import triton
import triton.language as tl


@triton.jit
def double(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, 2 * tl.load(x + i, i < n), i < n)
"""


@pytest.mark.usefixtures("interpreter")
def test_planted_bugs_are_caught(tmp_path, device):
    (tmp_path / "kernel_file.py").write_text(KERNEL_FILE)
    kernel_file = ModuleType("kernel_file")
    kernel_file.__file__ = str(tmp_path / "kernel_file.py")
    with mutated(kernel_file, "2 * ", "2 * ") as module:  # the same, imported

        def check(module: ModuleType) -> None:
            x = torch.arange(5.0, device=device)
            target = poisoned((5,), torch.float32, device)
            module.double[(1,)](x, target.x, 5, BLOCK=8)
            target.check()
            assert torch.equal(target.x, 2 * x)

        assert_caught(module, check, "2 * ", "3 * ")
        assert_caught(module, check, ", i < n)\n", ")\n")
        with pytest.raises(
            pytest.fail.Exception, match="nobody noticed '1 \\* 2 \\* ' in place of '2"
        ):
            assert_caught(module, check, "2 * ", "1 * 2 * ")
        with pytest.raises(AssertionError, match=r"2 times 'i < n', not once"):
            assert_caught(module, check, "i < n", "i <= n")
        with pytest.raises(AssertionError, match=r"0 times '4 \* ', not once"):
            assert_caught(module, check, "4 * ", "5 * ")


# What a card can do


@pytest.fixture
def as_compiled(monkeypatch):
    """Let wrappers see what they see without the interpreter."""
    monkeypatch.setattr(cards, "interpreted", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


class OnCard(NamedTuple):
    """As much of a tensor as `cards.card` looks at."""

    device: torch.device


def test_a_card_is_asked_for_what_it_can_do(as_compiled, monkeypatch):
    found = cards.Card("NVIDIA H100", (9, 0), 132, 232448)
    monkeypatch.setattr(cards, "_properties", lambda device: found)
    assert cards.card("quantise", OnCard(torch.device("cuda", 0))) is found
    assert found.fp8
    assert [found._replace(capability=c).fp8 for c in ((8, 0), (8, 6), (8, 9), (12, 0))] == [
        False, False, True, True,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("devices", "capability", "words"),
    [
        (["cpu"], (9, 0), "quantise runs on an NVIDIA GPU, got a tensor on cpu: .* impl='torch'"),
        (["cuda:0", "cpu"], (9, 0), "quantise: all tensors must be on one GPU, got cpu and cuda:0"),
        (["cuda:0", "cuda:1"], (9, 0), "quantise: all tensors must be on one GPU"),
        (["cuda:0"], (7, 5), r"quantise needs .* 8.0 \(Ampere\) or newer, got Old card with 7.5: "),
    ],
)
def test_what_a_card_cannot_do_is_said(devices, capability, words, as_compiled, monkeypatch):
    monkeypatch.setattr(
        cards, "_properties", lambda device: cards.Card("Old card", capability, 1, 1)
    )
    with pytest.raises(RuntimeError, match=words):
        cards.card("quantise", *(OnCard(torch.device(device)) for device in devices))


def test_cards_of_amd_are_refused(as_compiled, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(RuntimeError, match="NVIDIA"):
        cards.card("quantise", OnCard(torch.device("cuda", 0)))


@only_interpreted
def test_the_interpreter_is_a_card_of_few_multiprocessors():
    assert cards.card("quantise", torch.empty(1)) is cards.INTERPRETER
    assert cards.INTERPRETER.n_sm == 3
    assert cards.INTERPRETER.fp8
    with pytest.raises(RuntimeError, match="got a tensor on meta"):
        cards.card("quantise", torch.empty(1, device="meta"))


@pytest.mark.gpu
def test_this_card_is_described_as_torch_sees_it():
    found = cards.card("quantise", torch.empty(1, device="cuda"))
    assert found.capability == torch.cuda.get_device_capability()
    assert found.name == torch.cuda.get_device_name()
    model = CARDS.get(found.capability)
    if model is not None:  # what ring 2 compiles for
        assert found.shared_bytes == model.shared_bytes


# The three machines that tests run on


def run_tests(before: str, *options: str) -> str:
    """Run pytest on this file in another process, after some Python; return what it printed."""
    program = f"import sys, pytest\n{before}\nsys.exit(pytest.main(sys.argv[1:]))"
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, sys.path))
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # those of notebooks take seconds to load
    command = [sys.executable, "-c", program, "-o", "addopts=-ra", "-p", "no:cacheprovider", "-q"]
    done = subprocess.run(
        [*command, *options, __file__], env=environment, capture_output=True, text=True
    )
    return done.stdout


def test_kernels_are_interpreted_where_there_is_no_gpu():
    assert INTERPRETED or torch.cuda.is_available()


@pytest.mark.slow
def test_without_triton_a_skip_says_so():
    printed = run_tests("sys.modules['triton'] = None")
    assert "NOT RUN: Triton is not installed here" in printed
    assert printed.rstrip().splitlines()[-1].startswith("1 skipped")


@pytest.mark.slow
def test_on_a_gpu_tests_of_the_device_are_chosen_by_its_mark():
    gpu = "import os, torch\ntorch.cuda.is_available = lambda: True"
    chosen = run_tests(gpu, "-m", "gpu", "--collect-only")
    assert "::test_casts_are_torchs[" in chosen
    assert "::test_this_card_is_described" in chosen
    assert "::test_programs_on_an_sm[" not in chosen
