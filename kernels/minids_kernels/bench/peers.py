"""Who else computes the same, as sides of a case: what is laid out once is not timed.

A side that is not installed raises ImportError; it becomes a line of the report, as every error
does.
"""

import importlib
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minids import fp8
from minids.formats import cores, groups
from minids.formats.groups import BLOCK, TILE, Scaled
from minids_kernels.bench.case import Call

SCALED_MM, CUBLAS, TORCHAO = "torch scaled_mm", "cuBLAS BF16", "torchao Triton"
COMPILED = "torch.compile"
_TORCHAO = "torchao.prototype.blockwise_fp8_training.kernels"


def scaled_mm(a: Scaled, b: Scaled) -> Call:
    """cuBLAS's product by groups, to BF16; the weight's rows are filled up to whole blocks."""
    return partial(F.scaled_mm, *cores.arguments(a, _whole(b)), output_dtype=torch.bfloat16)


def scaled_mm_added(a: Scaled, b: Scaled, total: Tensor) -> Call:
    """The same to FP32, then added to `total`: torch's product cannot do both at once."""
    multiply = partial(F.scaled_mm, *cores.arguments(a, b), output_dtype=torch.float32)
    return lambda: total.add_(multiply())


def cublas(a: Scaled, b: Scaled) -> Call:
    """The product of both in BF16: twice the bytes, half the rate."""
    return partial(F.linear, *(groups.dequantise(x, torch.bfloat16) for x in (a, b)))


def cublas_added(a: Scaled, b: Scaled, total: Tensor) -> Call:
    """The product in BF16 with FP32 sums, added to `total`."""
    left, right = (groups.dequantise(x, torch.bfloat16) for x in (a, b))
    return lambda: total.add_(torch.mm(left, right.mT, out_dtype=torch.float32))


def torchao(a: Scaled, b: Scaled) -> Call:
    """torchao's Triton product of tiles by blocks, which wants scales in columns."""
    rows = F.pad(a.scale, (0, 0, 0, -len(a.scale) % 4)).mT.contiguous().mT[: len(a.scale)]
    multiply = importlib.import_module(_TORCHAO).triton_fp8_gemm_1x128_128x128
    given = a.values.contiguous(), b.values.contiguous().mT, rows, b.scale.contiguous().mT
    return partial(multiply, *given, 128, torch.bfloat16)


def torchao_added(a: Scaled, b: Scaled, total: Tensor) -> Call:
    """torchao's Triton product of tiles by tiles, then added to `total`."""
    columns = a.scale.mT.contiguous().mT
    multiply = importlib.import_module(_TORCHAO).triton_fp8_gemm_1x128_128x1
    given = a.values.contiguous(), b.values.contiguous().mT, columns, b.scale.mT.contiguous()
    return lambda: total.add_(multiply(*given, 128, torch.float32))


def torchao_quantise(group: tuple[int, int], x: Tensor) -> Call:
    """torchao's Triton quantisation by tiles, or by blocks of a weight."""
    kernels = importlib.import_module(_TORCHAO)
    tiles = group == TILE
    # a weight is a right operand: values and scales come back as those of the transposed matrix
    call = (
        kernels.triton_fp8_blockwise_act_quant_lhs
        if tiles
        else kernels.triton_fp8_blockwise_weight_quant_transposed_rhs
    )

    def run() -> Scaled:
        values, scale = call(x)
        return Scaled(values, scale, TILE) if tiles else Scaled(values, scale, BLOCK).mT

    return run


def compiled_product(a: Scaled, b: Scaled) -> Call:
    """The reference, compiled: on Hopper what surrounds cuBLAS's product by groups is fused."""
    return _compiled(fp8.scaled_matmul, a, b, torch.bfloat16)


def compiled(function: Any, settings: tuple, *inputs: Any) -> Call:
    """The reference `function` of these inputs, compiled."""
    return _compiled(function, *inputs, *settings)


def _compiled(function: Any, *given: Any) -> Call:
    """Return a call of the compiled function; torch compiles once for all inputs of a shape."""
    run = torch.compile(function, dynamic=False)
    return lambda: run(*given)


def _whole(b: Scaled) -> Scaled:
    """Fill a matrix in blocks up with rows of zeros: torch takes whole blocks alone."""
    missing = -len(b.values) % b.group[0]
    values = F.pad(b.values.view(torch.uint8), (0, 0, 0, missing)).view(b.values.dtype)
    return Scaled(values, b.scale, b.group)
