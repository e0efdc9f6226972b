"""Inputs that kernels get wrong, and checks that see it; every test of a kernel takes from here.

ROWS, WIDTHS      sizes for `pytest.mark.parametrize`: one row, ragged last tiles, no whole tile
LAYOUTS, laid_out(x, layout)
                  the same numbers in odd strides; what lies between them is NaN
SPECIAL, special(name, rows, cols, dtype, device)
                  subnormals, signed zeros, infinities, NaN, the edge at 448, ties
shapes(), lengths()
                  Hypothesis strategies, most of them close to a multiple of 128
poisoned(shape, dtype, device)
                  an `out` full of NaN with NaN around it; `.check()` when the kernel has written
poisoned_memory() while it is open, torch.empty and its kin give such memory: what wrappers allocate
is_written(x)     no element still holds the poison
bitwise_equal(fn) run twice, get the first result; AssertionError if a bit differs
gradients(fn, *inputs)
                  of a fixed random sum of fn's outputs; call the reference with `.double()` inputs
assert_caught(module, check, old, new)
                  plant a bug in a copy of a kernel's file; `check(copy)` must fail
"""

import contextlib
import functools
import importlib.util
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROWS = (1, 7, 127, 129)
WIDTHS = (1, 100, 127, 129, 576)  # 576: the key and value latents of MLA, with their rotary part

# Bits of NaN that no arithmetic gives (it gives one of the two plain NaN); E4M3 and E5M2 have no
# bits to spare: there a NaN that was written looks unwritten, so let those outputs be finite.
POISON = {
    torch.float32: (torch.int32, 0x7FC0DEAD),
    torch.bfloat16: (torch.int16, 0x7FDE),
    torch.float16: (torch.int16, 0x7EDE),
    torch.float64: (torch.int64, 0x7FF8DEADDEADDEAD),
    torch.float8_e4m3fn: (torch.uint8, 0x7F),
    torch.float8_e5m2: (torch.uint8, 0x7F),
    torch.uint8: (torch.uint8, 0x7F),
    torch.int32: (torch.int32, 0x7FC0DEAD),
    torch.int64: (torch.int64, 0x7FF8DEADDEADDEAD),
}
_GUARD = 512  # elements before and behind; a multiple of what any dtype needs to stay aligned


def bits(x: Tensor) -> Tensor:
    """Return the same memory as integers, in which a NaN equals itself."""
    return x.view(POISON[x.dtype][0])


def poison(x: Tensor) -> Tensor:
    """Fill with this dtype's poison, in place."""
    bits(x).fill_(POISON[x.dtype][1])
    return x


def is_written(x: Tensor) -> bool:
    """Say whether no element holds the poison any more."""
    return not bool((bits(x) == POISON[x.dtype][1]).any())


# Layouts


def _contiguous(shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    return _strides(shape), 0


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    reverse = itertools.accumulate((1, *reversed(shape[1:])), lambda a, b: a * b)
    return tuple(reversed(list(reverse)))


def _transposed(shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    *batch, rows, cols = _strides((*shape[:-2], shape[-1], shape[-2]))
    return (*batch, cols, rows), 0


def _wide_rows(shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    return _strides((*shape[:-1], shape[-1] + 3)), 0


def _offset(shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    return _strides(shape), 1


def _every_second_column(shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    return tuple(2 * stride for stride in _strides(shape)), 0


# name -> strides and storage offset for a shape, in elements
LAYOUTS: dict[str, Callable[[tuple[int, ...]], tuple[tuple[int, ...], int]]] = {
    "contiguous": _contiguous,
    "transposed": _transposed,
    "rows 3 apart": _wide_rows,
    "not aligned": _offset,
    "every second column": _every_second_column,
}


def laid_out(x: Tensor, layout: str) -> Tensor:
    """Return the same numbers in a layout of LAYOUTS; the memory between and around is poison."""
    strides, start = LAYOUTS[layout](tuple(x.shape))
    y = _guarded(tuple(x.shape), strides, x.dtype, x.device, start)
    bits(y).copy_(bits(x))
    return y


def _guarded(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device, start: int = 0
) -> Tensor:
    """Return poisoned memory with poison around it."""
    reach = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1
    size = 2 * _GUARD + start + (reach if 0 not in shape else 0)
    storage = poison(torch.empty(size, dtype=dtype, device=device))
    return storage.as_strided(shape, strides, _GUARD + start)


# Outputs


class Poisoned:
    """Memory that a kernel is to fill: `x` is handed to it, `check` sees what it did."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device, strides=None):
        self.x = _guarded(shape, strides or _strides(shape), dtype, device)

    def check(self) -> None:
        """Fail if an element of `x` was not written, or anything outside of `x` was."""
        self.check_outside()
        missing = (bits(self.x) == POISON[self.x.dtype][1]).nonzero().tolist()
        assert not missing, f"{len(missing)} elements were not written, the first at {missing[0]}"

    def check_outside(self) -> None:
        """Fail if anything outside of `x` was written."""
        storage = self.x.as_strided(
            (self.x.untyped_storage().nbytes() // self.x.itemsize,), (1,), 0
        )
        around = bits(storage).clone()
        value = POISON[self.x.dtype][1]
        around.as_strided(self.x.shape, self.x.stride(), self.x.storage_offset()).fill_(value)
        stray = (around != value).nonzero().flatten().tolist()
        where = [n - self.x.storage_offset() for n in stray[:8]]
        assert not stray, f"{len(stray)} elements outside were written, at {where} from its start"


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device, strides=None) -> Poisoned:
    """Return memory full of NaN, with NaN around and between: see `Poisoned`."""
    return Poisoned(shape, dtype, device, strides)


class _PoisonedMemory(TorchDispatchMode):
    """Give every allocation without a value poison, inside and around."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # or torch imports its compiler, to leave this one out
        return False

    def __init__(self):
        super().__init__()
        self.given: list[Poisoned] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"}:
            if y.numel() and y.dtype in POISON and y.device.type != "meta":
                memory = Poisoned(tuple(y.shape), y.dtype, y.device, y.stride())
                self.given.append(memory)
                return memory.x
        return y


@contextlib.contextmanager
def poisoned_memory() -> Iterator[list[Poisoned]]:
    """Let torch.empty and its kin return poison; fail at the end if a kernel wrote outside of it.

    Yields what was allocated. The results themselves are for `is_written`: padding may stay.
    """
    with _PoisonedMemory() as mode:
        yield mode.given
    for memory in mode.given:
        memory.check_outside()


# Special values


def _random(n: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(0))


def _cycled(*values: float) -> Callable[[int], Tensor]:
    def numbers(n: int) -> Tensor:
        pool = torch.tensor([sign * value for value in values for sign in (1, -1)])
        return pool.repeat(n // len(pool) + 1)[:n]

    return numbers


def _sprinkled(*values: float) -> Callable[[int], Tensor]:
    """Return ordinary numbers, and one of `values` in each 331: most groups of 128 hold none."""

    def numbers(n: int) -> Tensor:
        x = _random(n)
        places = torch.arange(n // 2 % 331, n, 331)
        x[places] = torch.tensor(values).repeat(len(places))[: len(places)]
        return x

    return numbers


def _ties(n: int) -> Tensor:
    """Return every number halfway between two E4M3 neighbours; one in eight is 448: scale 1."""
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halfway = (codes[1:] + codes[:-1]) / 2
    x = _cycled(*halfway.tolist())(n)
    x[::8] = 448.0
    return x


def _any_bits(n: int) -> Tensor:
    """Return random bit patterns of FP32: every exponent, infinities and NaN now and then."""
    pattern = torch.randint(-(2**31), 2**31, (n,), generator=torch.Generator().manual_seed(0))
    return pattern.to(torch.int32).view(torch.float32)


_INF, _NAN = float("inf"), float("nan")
SPECIAL: dict[str, Callable[[int], Tensor]] = {
    "zeros": _cycled(0.0),  # and -0
    "subnormals": _cycled(2.0**-149, 3e-45, 1e-41, 1.1e-38, 2.0**-126, 2.0**-133, 2.0**-134),
    "least scale": _cycled(447 * 2.0**-126, 448 * 2.0**-126, 449 * 2.0**-126, 2.0**-120),
    "largest": _cycled(3.38e38, 3.3e38, 3.28e38, 1.0),
    "edge of E4M3": _cycled(447.99997, 448.0, 448.00003, 463.99997, 464.0, 464.00003, 480.0, 1e5),
    "ties": _ties,
    "infinities": _sprinkled(_INF, -_INF),
    "NaN": _sprinkled(_NAN, -_NAN),
    "any bits": _any_bits,
}


def special(name: str, rows: int, cols: int, dtype: torch.dtype, device) -> Tensor:
    """Return a matrix of SPECIAL's numbers, rounded to `dtype`."""
    return SPECIAL[name](rows * cols).unflatten(0, (rows, cols)).to(dtype).to(device)


def lengths(most: int) -> st.SearchStrategy[int]:
    """Return sizes from 1 to `most`, as often as not next to a multiple of 128."""
    edges = [128 * n + d for n in range(most // 128 + 2) for d in (-1, 0, 1)]
    return st.sampled_from([n for n in edges if 1 <= n <= most]) | st.integers(1, most)


def shapes(most_rows: int, most_cols: int) -> st.SearchStrategy[tuple[int, int]]:
    """Return shapes of matrices, both sizes from `lengths`."""
    return st.tuples(lengths(most_rows), lengths(most_cols))


# Checks


def tensors_of(result: Any) -> list[Tensor]:
    """Return the tensors in what a kernel returns: one, a tuple (Scaled too), or nested ones."""
    if isinstance(result, Tensor):
        return [result]
    parts = result if isinstance(result, tuple | list) else ()
    return [x for part in parts for x in tensors_of(part)]


def bitwise_equal(fn: Callable[[], Any], times: int = 2) -> Any:
    """Run `fn` some times; fail if a bit of its results differs from the first, and return that."""
    first = fn()
    for n in range(1, times):
        for a, b in zip(tensors_of(first), tensors_of(fn()), strict=True):
            same = bool((bits(a) == bits(b)).all())
            assert same, f"run {n + 1} differs from the first in {int((bits(a) != bits(b)).sum())}"
    return first


def gradients(fn: Callable[..., Any], *inputs: Tensor) -> list[Tensor]:
    """Return the gradients of a random sum of fn's outputs with respect to its floating inputs.

    The weights of the sum are the same in every dtype, so `gradients(reference, *doubles)` is what
    `gradients(kernel, *inputs)` should be.
    """
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = tensors_of(fn(*leaves))
    weights = []
    for n, y in enumerate(outputs):
        chance = torch.randn(y.shape, generator=torch.Generator().manual_seed(n))
        weights.append(chance.bfloat16().to(y))  # exact in FP16 up to its smallest numbers
    return list(torch.autograd.grad(outputs, [x for x in leaves if x.requires_grad], weights))


_copies = itertools.count()


@contextlib.contextmanager
def mutated(module: ModuleType, old: str, new: str) -> Iterator[ModuleType]:
    """Import a copy of a kernel's file in which `old`, which occurs once, reads `new`."""
    text = Path(str(module.__file__)).read_text(encoding="utf-8")
    assert text.count(old) == 1, (
        f"{module.__name__} holds {text.count(old)} times {old!r}, not once"
    )
    name = f"{module.__name__.split('.')[-1]}_copy_{next(_copies)}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.py"  # Triton reads a kernel's source from its file
        path.write_text(text.replace(old, new), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        copy = importlib.util.module_from_spec(spec)
        sys.modules[name] = copy
        try:
            spec.loader.exec_module(copy)
            yield copy
        finally:
            del sys.modules[name]


@functools.cache
def _held(module: ModuleType, check: Callable[[ModuleType], None]) -> None:
    check(module)


def assert_caught(
    module: ModuleType, check: Callable[[ModuleType], None], old: str, new: str
) -> None:
    """Fail unless `check` holds for a kernel's file and fails once `old` in it reads `new`.

    That it holds is tried once for all bugs: a check of one file gives the same each time.
    """
    _held(module, check)
    with mutated(module, old, new) as copy:
        try:
            check(copy)
        except AssertionError:
            return
    pytest.fail(f"nobody noticed {new!r} in place of {old!r}")
