"""Job `gemm`: products of many tokens with V3's weights, as in training and in reading a prompt."""

from collections.abc import Iterator
from functools import partial

import torch

import minids_kernels as kernels
from minids.formats import groups
from minids.formats.groups import BLOCK, TILE, Scaled
from minids_kernels.bench import checks, peers
from minids_kernels.bench.case import OURS, Case, Goal, Prepare
from minids_kernels.bench.floors import product
from minids_kernels.bench.shapes import TOKENS, WEIGHTS, Weight

JOB = "gemm"
COMPILED = "o"  # compiling takes seconds: one weight stands for all
_MANY = 1024  # tokens from which the goals hold


def cases(
    tokens: tuple[int, ...] = (128, TOKENS), weights: tuple[Weight, ...] = WEIGHTS
) -> Iterator[Case]:
    """Yield each weight with few tokens, then with many."""
    for m in tokens:
        for weight in weights:
            with_compiled = m == tokens[-1] and weight.name == COMPILED
            yield case(JOB, m, weight, goals(m, weight), with_compiled)


def goals(m: int, weight: Weight) -> tuple[Goal, ...]:
    """Return what is aimed at: a rate by how long the sums are, and not far behind cuBLAS."""
    if m < _MANY:
        return ()
    rates = {512: 600, 1536: 800}
    rate = 950 if weight.k >= 7168 else rates.get(weight.k)
    beside = Goal("ratio", 0.75, peers.SCALED_MM)
    return (Goal("tflops", rate), beside) if rate else (beside,)


def case(job: str, m: int, weight: Weight, goals: tuple[Goal, ...], compiled: bool = False) -> Case:
    """Return the product of m tokens, by tiles, and a weight, by blocks, rounded to BF16."""
    sides: dict[str, Prepare] = {
        OURS: lambda a, b: partial(kernels.scaled_matmul, a, b, torch.bfloat16),
        peers.SCALED_MM: peers.scaled_mm,
        peers.CUBLAS: peers.cublas,
        peers.TORCHAO: peers.torchao,
    }
    if compiled:
        sides[peers.COMPILED] = peers.compiled_product
    n, k = weight.n, weight.k
    name = f"{weight.name}, {m} x {n} x {k}"
    return Case(job, name, product(m, n, k), partial(_operands, m, weight), sides,
                checks.product, goals)  # fmt: skip


def _operands(m: int, weight: Weight, device: str) -> tuple[Scaled, Scaled]:
    drawn = (torch.randn(rows, weight.k, device=device) for rows in (m, weight.n))
    return groups.quantise(next(drawn), TILE), groups.quantise(next(drawn), BLOCK)
