"""Job `ceilings`: what torch's own copy and plain products reach on this card, in this run."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from minids_kernels.bench.case import Call, Case, Row
from minids_kernels.bench.floors import Rates, Work

JOB = "ceilings"
COPY, BF16, TENSORWISE, ROWWISE = "copy", "BF16 product", "FP8, one scale", "FP8, a scale a row"


def cases(copied_bytes: int = 2**31, size: int = 8192) -> Iterator[Case]:
    """Yield a copy and square products of random numbers."""
    operations, values = 2 * size**3, size * size

    def numbers(device: str) -> tuple:
        return (torch.randint(256, (copied_bytes,), dtype=torch.uint8, device=device),)

    def wide(device: str) -> tuple:
        return tuple(torch.randn(size, size, device=device).bfloat16() for _ in range(2))

    def narrow(device: str) -> tuple:
        return tuple(torch.randn(size, size, device=device).to(_E4M3) for _ in range(2))

    yield Case(JOB, COPY, Work(2 * copied_bytes), numbers, {"torch": _copy})
    in_bf16 = Work(6 * values, operations, "bf16_tflops")
    yield Case(JOB, f"{BF16} {size}³", in_bf16, wide, {"torch": partial(partial, F.linear)})
    in_fp8, kinds = Work(4 * values, operations), F.ScalingType
    yield Case(JOB, f"{TENSORWISE} {size}³", in_fp8, narrow,
               {"torch": partial(_scaled, kinds.TensorWise)})  # fmt: skip
    yield Case(JOB, f"{ROWWISE} {size}³", in_fp8, narrow,
               {"torch": partial(_scaled, kinds.RowWise)})  # fmt: skip


def reached(rows: list[Row]) -> Rates:
    """Return the rates of this job's rows; None for those that failed."""
    ours = [row for row in rows if row.job == JOB]
    wide = [row.tflops for row in ours if row.name.startswith(BF16)]
    narrow = [row.tflops for row in ours if row.name.startswith("FP8")]
    copies = [row.tb_s for row in ours if row.name == COPY]
    return Rates(*(max(filter(None, found), default=None) for found in (copies, narrow, wide)))


_E4M3 = torch.float8_e4m3fn


def _copy(x: Tensor) -> Call:
    return partial(torch.empty_like(x).copy_, x)


def _scaled(kind: F.ScalingType, a: Tensor, b: Tensor) -> Call:
    """The product as cuBLAS does it fastest: sums are not promoted to FP32 on the way."""
    if kind == F.ScalingType.TensorWise:
        scales = [torch.ones((), device=a.device) for _ in range(2)]
    else:
        scales = [torch.ones(len(a), 1, device=a.device), torch.ones(1, len(b), device=a.device)]
    given = (a, b.mT, scales[0], kind, scales[1], kind)
    return partial(F.scaled_mm, *given, output_dtype=torch.bfloat16, use_fast_accum=True)
