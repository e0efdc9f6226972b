"""Triton's interpreter with right numbers for BF16 and FP8: casts and arithmetic by torch's rules.

Without it (triton 3.6.0 to 3.9.0) FP32 becomes BF16 by truncation, E4M3 loses the carry of its
rounding, `tl.dot` of BF16 multiplies raw bits, and descriptors of BF16 cannot be loaded.
test_kernel_harness.py holds the canary: it fails when the shim is missing or no longer needed.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

NARROW = {  # kept by the interpreter as bits in unsigned integers
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
ARITHMETIC = ["fadd", "fsub", "fmul", "fdiv", "maximumf", "minimumf", "maxnumf", "minnumf"]
COMPARISONS = [f"fcmp{kind}" for kind in ("OLT", "OGT", "OLE", "OGE", "OEQ", "ONE")]
UNARY = ["exp", "exp2", "log", "log2", "sqrt", "rsqrt", "floor", "ceil", "sin", "cos"]


def widen(x: TensorHandle) -> np.ndarray:
    """Return the numbers that a handle stands for; narrow floats as FP32."""
    narrow = NARROW.get(x.dtype.scalar)
    if narrow is None:
        return x.data
    signed = np.ascontiguousarray(x.data).view(f"int{x.dtype.scalar.primitive_bitwidth}")
    return torch.from_numpy(signed).view(narrow).float().numpy()


def narrow(data: np.ndarray, dtype: tl.dtype) -> TensorHandle:
    """Round numbers to a Triton dtype as the hardware does: to nearest even, E4M3 saturating."""
    kind = NARROW.get(dtype.scalar)
    if kind is None:
        # what numpy does to numbers too large for FP16 is right: an infinity, with a warning
        with np.errstate(over="ignore", invalid="ignore"):
            return TensorHandle(data.astype(tl_to_numpy(dtype.scalar)), dtype.scalar)
    wide = torch.from_numpy(np.array(data, dtype=np.float32, order="C"))
    if kind != torch.bfloat16:
        most = torch.finfo(kind).max
        wide = wide.clamp(-most, most)  # cvt.rn.satfinite; NaN stays NaN
    unsigned = torch.uint16 if kind == torch.bfloat16 else torch.uint8
    return TensorHandle(wide.to(kind).view(unsigned).numpy(), dtype.scalar)


def tl_to_numpy(dtype: tl.dtype) -> np.dtype:
    return np.dtype({"fp16": "float16", "fp32": "float32", "fp64": "float64"}[dtype.name])


def _is_narrow(*handles: TensorHandle) -> bool:
    return any(x.dtype.scalar in NARROW for x in handles)


def _convert(self, x: TensorHandle, dtype: tl.dtype, rounding=None) -> TensorHandle:
    return narrow(widen(x), dtype)


def _wide_first(name: str, round_back: bool):
    """Let an operation of the builder compute narrow floats in FP32, then round if it should."""
    original = getattr(InterpreterBuilder, name)

    def operation(self, *args):
        if not _is_narrow(*args):
            return original(self, *args)
        wide = [TensorHandle(widen(x), tl.float32) for x in args]
        y = original(self, *wide)
        return narrow(y.data, args[0].dtype) if round_back else y

    return operation


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc) -> TensorHandle:
    product = np.matmul(widen(a), widen(b), dtype=d.data.dtype)
    return TensorHandle(product + d.data, d.dtype.scalar)


def _bf16(self, value: float) -> TensorHandle:
    return narrow(np.array([value], dtype=np.float32), tl.bfloat16)


@contextmanager
def shimmed() -> Iterator[None]:
    """Put right numbers into the interpreter, for as long as the context is open."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("create_fp_to_fp", "create_fp_trunc", "create_fp_ext"):
            patch.setattr(InterpreterBuilder, name, _convert)
        for names, round_back in ((ARITHMETIC + UNARY, True), (COMPARISONS, False)):
            for name in names:
                operation = _wide_first(f"create_{name}", round_back)
                patch.setattr(InterpreterBuilder, f"create_{name}", operation)
        patch.setattr(InterpreterBuilder, "create_dot", _dot)
        patch.setattr(InterpreterBuilder, "get_bf16", _bf16, raising=False)
        yield
