"""Kernels in a notebook: Triton's interpreter in place of a GPU, and what each program touches.

`begin` lets kernels run on the CPU, one program after another. `record` watches them: every load
and store of every program, refused where it leaves its array.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch

from minids.learn.check import Text

_SWITCH = "TRITON_INTERPRET"
_NO_TRITON = (
    "Triton is not installed, and it exists for Linux alone: the code cells of this chapter stop "
    "here. Its text, its figures and all that they printed stay readable. To run it, follow 'Open "
    "in Colab' at the top; on Linux, pip install triton and restart the notebook."
)
_TOO_LATE = (
    "Triton was loaded before this cell, for a GPU: restart the notebook's kernel and run the "
    "chapter from the top."
)


class NotHereError(Exception):
    """Kernels cannot be interpreted here; a notebook shows the sentence and no traceback."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


class OutOfBoundsError(IndexError):
    """A program touched what lies outside of its array."""


class Access(NamedTuple):
    """What one program loads or stores at once; what a mask leaves out is not in it."""

    program: tuple[int, int, int]
    kind: str  # "load" or "store"
    name: str  # the kernel's parameter
    offsets: np.ndarray  # int64, in elements from the array's first one


class _Array(NamedTuple):
    name: str
    start: int  # address of the first element
    stop: int  # address behind the last one
    itemsize: int


def begin() -> Text:
    """Let all kernels from here on run in Triton's interpreter; NotHereError where none can."""
    if find_spec("triton") is None:
        raise NotHereError(_NO_TRITON)
    os.environ[_SWITCH] = "1"  # read where a kernel is defined, Triton's own ones too
    import triton.language as tl
    from triton.runtime import interpreter

    if not isinstance(tl.cdiv, interpreter.InterpretedFunction):
        raise NotHereError(_TOO_LATE)
    if interpreter._patch_lang_tensor.__module__ != __name__:
        interpreter._patch_lang_tensor = _mended(interpreter._patch_lang_tensor)
    return Text("Kernels run in Triton's interpreter: on the CPU, one program after another.")


def is_interpreted() -> bool:
    """Say whether kernels of this process run in the interpreter."""
    return find_spec("triton") is not None and os.environ.get(_SWITCH) == "1"


def _mended(patch: Callable[[type, Any], None]) -> Callable[[type, Any], None]:
    """Let `range` take a kernel's number, which Triton 3.6 forbids from NumPy 2.4 on."""

    def mended(tensor: type, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return mended


def record(run: Callable[[], Any]) -> list[Access]:
    """Call `run` and return every load and store of the kernels that it launches, in order.

    A load or store outside of its array is an OutOfBoundsError, before it happens; what a mask
    leaves out of a load without `other` is NaN, as it may be on a GPU.
    """
    from triton.runtime.errors import InterpreterError

    with _watched() as found:
        try:
            run()
        except InterpreterError as error:  # tell what went wrong inside, not where it was caught
            inner: BaseException = error
            while isinstance(inner, InterpreterError) and inner.__cause__ is not None:
                inner = inner.__cause__
            raise inner from None
    return found


@contextmanager
def _watched() -> Iterator[list[Access]]:
    from triton.runtime import interpreter
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    if not is_interpreted():
        raise NotHereError("only the interpreter can be watched: call begin() before the kernels")
    found: list[Access] = []
    arrays: list[_Array] = []
    bound, copy, load, store = (
        interpreter._patch_lang_tensor,
        GridExecutor._init_args_hst,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )

    def copied(self: Any, args_dev: Any, kwargs: Any) -> Any:
        hosts = copy(self, args_dev, kwargs)
        named = [*zip(self.arg_names, hosts[0], strict=False), *hosts[1].items()]
        arrays[:] = [array for name, value in named if (array := _array(name, value))]
        return hosts

    def loaded(self, ptrs: Any, mask: Any, other: Any, *rest: Any, **named: Any) -> Any:
        found.extend(_touched(arrays, "load", ptrs, mask))
        other = _undefined(ptrs) if other is None else other
        return load(self, ptrs, mask, other, *rest, **named)

    def stored(self, ptrs: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        found.extend(_touched(arrays, "store", ptrs, mask))
        return store(self, ptrs, value, mask, *rest, **named)

    try:
        interpreter._patch_lang_tensor = _mended(bound)
        GridExecutor._init_args_hst = copied
        InterpreterBuilder.create_masked_load = loaded
        InterpreterBuilder.create_masked_store = stored
        with np.errstate(all="ignore"), warnings.catch_warnings():
            # a GPU gives infinities and NaN without a word
            warnings.simplefilter("ignore", RuntimeWarning)
            yield found
    finally:
        interpreter._patch_lang_tensor = bound
        GridExecutor._init_args_hst = copy
        InterpreterBuilder.create_masked_load = load
        InterpreterBuilder.create_masked_store = store


def _array(name: str, value: Any) -> _Array | None:
    x = getattr(value, "base", value)  # a descriptor's memory
    if not isinstance(x, torch.Tensor):
        return None
    steps = zip(x.shape, x.stride(), strict=True)
    n = 0 if x.numel() == 0 else 1 + sum((size - 1) * step for size, step in steps)
    return _Array(name, x.data_ptr(), x.data_ptr() + n * x.itemsize, x.itemsize)


def _touched(arrays: list[_Array], kind: str, ptrs: Any, mask: Any) -> Iterator[Access]:
    """Yield the access if it touches anything; OutOfBoundsError if not all of it lies in one."""
    from triton.runtime.interpreter import interpreter_builder

    at = np.broadcast_to(ptrs.data, np.broadcast_shapes(ptrs.data.shape, mask.data.shape))
    at = at[np.broadcast_to(mask.data, at.shape).astype(bool)].astype(np.int64)
    if at.size == 0:
        return
    x, y, z = (int(n) for n in interpreter_builder.grid_idx)
    program = (x, y, z)
    # of arrays that share memory, or none that fits: the one whose middle is nearest
    near = min(arrays, key=lambda a: (not _holds(a, at), abs(a.start + a.stop - 2 * int(at[0]))))
    offsets = (at - near.start) // near.itemsize
    if not _holds(near, at):
        n = (near.stop - near.start) // near.itemsize
        wrong = offsets[(offsets < 0) | (offsets >= n)]
        raise OutOfBoundsError(
            f"program {program} {kind}s {near.name} at {wrong[0]:,}, and {near.name} has {n:,} "
            f"element{'s' * (n != 1)}: it needs a mask, or another offset"
        )
    yield Access(program, kind, near.name, offsets)


def _holds(array: _Array, at: np.ndarray) -> bool:
    return array.start <= int(at.min()) and int(at.max()) + array.itemsize <= array.stop


def _undefined(ptrs: Any) -> Any:
    """Return NaN, or zeros for integers, where a load has no `other`."""
    from triton.runtime.interpreter import TensorHandle, _get_np_dtype

    kind = ptrs.get_element_ty()
    codes = {"fp8e4nv": 0x7F, "fp8e5": 0x7F, "bf16": 0x7FC0}  # kept as bits in integers
    value = codes.get(str(kind), np.nan if kind.is_floating() else 0)
    return TensorHandle(np.full_like(ptrs.data, value, dtype=_get_np_dtype(kind)), kind)
