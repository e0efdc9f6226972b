"""Triton's interpreter with the numbers of a GPU: the parts of it that are wrong, put right.

BF16 and FP8 are kept there as raw bits, and triton 3.6.0 often forgets that they are. Each entry of
MENDED puts one thing right, and test_kernel_harness.py shows it to be wrong without it: an entry
that a newer Triton no longer needs fails its test, which says so. What is right is left as it is,
but for SHORTCUTS, which give the same sooner.
What stays different from a GPU, so that only rings 2 and 3 can show it:

- a product and a sum become one `fma` there unless the launch says `enable_fp_fusion=False`
- `/`, `tl.exp2`, `tl.sqrt` and their kin are approximate there: exact are `tl.div_rn`, `tl.sqrt_rn`
- `tl.dot` of FP32 is in TF32 unless it says "ieee"; a chain of FP8 products keeps fewer bits
- programs run at the same time; nothing here sees a race, and nothing checks bounds
- the sign and the digits of a NaN, the sign of the larger of 0 and -0, are not modelled
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import (
    GridExecutor,
    InterpreterBuilder,
    ReduceOps,
    TensorHandle,
    _get_np_dtype,
    _LangPatchScope,
)

NARROW = {  # kept by the interpreter as bits in unsigned integers
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}


def widen(x: TensorHandle) -> np.ndarray:
    """Return the numbers that a handle stands for; narrow floats as FP32."""
    kind = NARROW.get(x.dtype.scalar)
    if kind is None:
        return x.data
    signed = np.array(x.data, order="C").view(f"int{x.dtype.scalar.primitive_bitwidth}")
    return torch.from_numpy(signed).view(kind).float().numpy()


def rounded(numbers: np.ndarray, dtype: tl.dtype) -> TensorHandle:
    """Round as the hardware does: to nearest, ties to even; FP8 saturates (cvt.rn.satfinite)."""
    kind = NARROW.get(dtype.scalar)
    if kind is None:
        return TensorHandle(numbers.astype(_get_np_dtype(dtype.scalar)), dtype.scalar)
    wide = torch.from_numpy(np.array(numbers, dtype=np.float32, order="C"))
    if kind != torch.bfloat16:
        most = torch.finfo(kind).max
        wide = wide.clamp(-most, most)  # NaN stays NaN
    unsigned = torch.uint16 if kind == torch.bfloat16 else torch.uint8
    return TensorHandle(wide.to(kind).view(unsigned).numpy(), dtype.scalar)


def _is_narrow(*dtypes: tl.dtype) -> bool:
    return any(dtype.scalar in NARROW for dtype in dtypes)


def _cast(name: str) -> Callable:
    original = getattr(InterpreterBuilder, name)

    def cast(self, x, dtype, *rounding):
        towards_zero = rounding and "RTZ" in str(rounding[0])
        if towards_zero or not _is_narrow(x.dtype, dtype):
            return original(self, x, dtype, *rounding)
        if x.dtype.scalar.is_fp8() and dtype.scalar.is_fp8():
            raise TypeError("a cast from one FP8 to the other does not compile: widen first")
        return rounded(widen(x), dtype)

    return cast


def _operation(name: str, round_back: bool) -> Callable:
    """Let an operation compute BF16 in FP32; of FP8, where a compiler has none, say so."""
    original = getattr(InterpreterBuilder, name)

    def operation(self, *args):
        if not _is_narrow(*(x.dtype for x in args)):
            return original(self, *args)
        if any(x.dtype.scalar.is_fp8() for x in args):
            raise TypeError(f"{name.removeprefix('create_')} of FP8 does not compile: widen first")
        y = original(self, *(TensorHandle(widen(x), tl.float32) for x in args))
        return rounded(y.data, tl.bfloat16) if round_back else y

    return operation


def _fma(self, x, y, z):
    """Round x y + z once: in FP64, rounded to odd, no later rounding can be wrong."""
    if z.dtype.scalar == tl.float64:
        return _numpys_fma(self, x, y, z)
    product = widen(x).astype(np.float64) * widen(y)
    addend = widen(z).astype(np.float64)
    total = product + addend
    back = total - product
    total = _odd(total, (product - (total - back)) + (addend - back))
    if z.dtype.scalar == tl.bfloat16:  # FP32 is on the way there
        single = total.astype(np.float32)
        total = _odd(single, total - single)
    return rounded(total, z.dtype)


_numpys_fma = InterpreterBuilder.create_fma


def _odd(near: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """Where something is missing, take the neighbour towards it whose last bit is odd."""
    even = near.view(f"int{8 * near.itemsize}") & 1 == 0
    moved = ((missing > 0) | (missing < 0)) & even
    side = np.copysign(near.dtype.type(np.inf), missing[moved])
    near[moved] = np.nextafter(near[moved], side, dtype=near.dtype)
    return near


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    if not _is_narrow(a.dtype, b.dtype):
        return _numpys_dot(self, a, b, d, input_precision, max_num_imprecise_acc)
    product = np.matmul(widen(a), widen(b), dtype=d.data.dtype)
    return TensorHandle(product + d.data, d.dtype.scalar)


_numpys_dot = InterpreterBuilder.create_dot


def _clamp(self, x, low, high, propagate_nan):
    """Let NaN stay if it is to stay; else it is undefined, here the lower bound as on Ampere."""
    y = np.clip(x.data, low.data, high.data)
    if propagate_nan != tl.PropagateNan.ALL:
        y = np.where(np.isnan(x.data), low.data, y).astype(y.dtype)
    return TensorHandle(y, x.dtype.scalar)


def _without_nan(larger: np.ufunc) -> Callable:
    """Return max.f32 or min.f32: of a number and NaN, the number."""
    return lambda self, x, y: self.binary_op(x, y, larger)


def _min_max(self, input, val_reduce_op, idx_reduce_op=None):
    """Drop NaN as nanmax does, without its warning about a row of nothing else."""
    quiet = {np.nanmax: np.fmax.reduce, np.nanmin: np.fmin.reduce}
    return _numpys_min_max(self, input, quiet.get(val_reduce_op, val_reduce_op), idx_reduce_op)


_numpys_min_max = ReduceOps.min_max


def _sum(self, x):
    if _is_narrow(x.dtype):
        raise TypeError(f"a sum of {x.dtype.scalar} rounds after every addition: widen first")
    return _numpys_sum(self, x)


_numpys_sum = ReduceOps.sum


def _bf16(self, value: float) -> TensorHandle:
    return rounded(np.array([value]), tl.bfloat16)


def _quietly(self, *args, **kwargs):
    """Run a grid without numpy's warnings: a GPU gives infinities and NaN without a word."""
    with np.errstate(all="ignore"):
        return _run_grid(self, *args, **kwargs)


_run_grid = GridExecutor.__call__


def _lang_tensor(tensor: type, scope) -> None:
    """Let a tensor of one number be the bound of a loop: from numpy 2.4 on, `int` refuses it."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


_patch_lang_tensor = interpreter._patch_lang_tensor


# What follows is not wrong but slow: half of the time of a small launch


def _patch_lang(fn: Callable) -> _LangPatchScope:
    """Let the language mean numpy once a grid, not again at every call of a function in it."""
    wanted = {id(x) for x in fn.__globals__.values() if x is tl or x is tl.core}
    if wanted and wanted <= _patched:
        return _LangPatchScope()
    _patched.update(wanted)
    scope = _patch_everything(fn)
    restore = scope.restore
    scope.restore = lambda: (_patched.clear(), restore())  # at the end of the grid
    return scope


_patched: set[int] = set()  # modules of the language
_patch_everything = interpreter._patch_lang


def _no_verdict(self, lhs, rhs, binary_op) -> None:
    """Leave out the search for integer overflow: unless debugging, nobody hears its verdict."""


def _np_dtype(dtype: tl.dtype) -> np.dtype:
    """Look a scalar's dtype up in a table that is made once."""
    scalar = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
    return _POINTER if isinstance(scalar, tl.pointer_type) else _np_dtype_of(scalar)


_np_dtype_of = functools.cache(_get_np_dtype)
_POINTER = np.dtype(np.uint64)


def _type_of_tuple(values: list, fields: list | None = None) -> tl.core.tuple_type:
    """Make the type of a block's shape once for all blocks of this shape."""
    sizes = [getattr(x, "value", x) for x in values]
    if fields is None and all(type(size) is int for size in sizes):
        return _type_of_shape(*sizes)
    return _type_of_values(values, fields)


_type_of_values = tl.core._type_for_tuple_values
_type_of_shape = functools.cache(lambda *sizes: _type_of_values(sizes))


def _of_builder(names: str, make: Callable[[str], Callable]) -> dict[tuple[Any, str], Callable]:
    return {
        (InterpreterBuilder, f"create_{name}"): make(f"create_{name}") for name in names.split()
    }


# (owner, attribute) -> what takes its place; each has its canary in test_kernel_harness.py
MENDED: dict[tuple[Any, str], Callable] = {
    **_of_builder("fp_to_fp fp_trunc fp_ext si_to_fp ui_to_fp", _cast),
    **_of_builder("fadd fsub fmul", lambda name: _operation(name, round_back=True)),
    **_of_builder(
        "fcmpOLT fcmpOGT fcmpOLE fcmpOGE fcmpOEQ fcmpUNE",
        lambda name: _operation(name, round_back=False),
    ),
    (InterpreterBuilder, "get_bf16"): _bf16,
    (InterpreterBuilder, "create_dot"): _dot,
    (InterpreterBuilder, "create_fma"): _fma,
    (InterpreterBuilder, "create_clampf"): _clamp,
    (InterpreterBuilder, "create_maxnumf"): _without_nan(np.fmax),
    (InterpreterBuilder, "create_minnumf"): _without_nan(np.fmin),
    (ReduceOps, "min_max"): _min_max,
    (ReduceOps, "sum"): _sum,
    (interpreter, "_patch_lang_tensor"): _lang_tensor,
    (GridExecutor, "__call__"): _quietly,
}

# the same results with fewer calls
SHORTCUTS: dict[tuple[Any, str], Callable] = {
    (interpreter, "_patch_lang"): _patch_lang,
    (interpreter, "_get_np_dtype"): _np_dtype,
    (tl.core, "_type_for_tuple_values"): _type_of_tuple,
    (TritonSemantic, "binary_op_sanitize_overflow_impl"): _no_verdict,
}


_BEFORE = {(owner, name): getattr(owner, name, None) for owner, name in MENDED | SHORTCUTS}


@contextmanager
def shimmed(without: str | None = None) -> Iterator[None]:
    """Mend the interpreter while the context is open; `without` one attribute, for its canary."""
    with pytest.MonkeyPatch.context() as patch:
        for (owner, name), replacement in (MENDED | SHORTCUTS).items():
            value = _BEFORE[owner, name] if name == without else replacement
            # 3.6.0 lacks get_bf16; all else must be there to be mended
            patch.setattr(owner, name, value, raising=name != "get_bf16")
        yield
