"""Job `levels`: one product by each level of minids_kernels.levels, for chapter 12."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import minids_kernels as kernels
from minids.formats import groups
from minids.formats.groups import BLOCK, TILE, Scaled
from minids_kernels.bench import checks, peers
from minids_kernels.bench.case import OURS, Case, Prepare
from minids_kernels.bench.floors import Work, product
from minids_kernels.levels import LEVELS, Level

JOB = "levels"
MATMUL = "torch.matmul"  # cuBLAS in BF16
LIBRARY = "scaled_matmul"  # minids_kernels', of which the last two levels are a part


def cases(size: int = 8192, few: int = 16) -> Iterator[Case]:
    """Yield the levels from the last, for `few` rows, to the first, which takes longest.

    Matrices are those of job `ceilings`: too large for the L2 cache, so that level 3 matters.
    """
    *plain, scaled, swapped = LEVELS
    yield _scaled(swapped, few, size, {f"level {scaled.number}": scaled})
    yield _scaled(scaled, size, size, {})
    for level in reversed(plain):
        yield _plain(level, size)


def _plain(level: Level, size: int) -> Case:
    """Return a square product in BF16."""
    sides: dict[str, Prepare] = {
        OURS: lambda a, b: partial(level.multiply, a, b),
        MATMUL: lambda a, b: partial(torch.matmul, a, b.mT),
    }
    work = Work(2 * 3 * size**2, 2 * size**3, "bf16_tflops")
    return Case(JOB, _name(level, size, size), work, partial(_numbers, size), sides, checks.product)


def _scaled(level: Level, m: int, size: int, beside: dict[str, Level]) -> Case:
    """Return a product of m rows and a square matrix, quantised; other levels stand beside it."""
    sides = {name: _rounded(other) for name, other in {OURS: level, **beside}.items()}
    sides[LIBRARY] = lambda a, b: partial(kernels.scaled_matmul, a, b, torch.bfloat16)
    sides |= {peers.SCALED_MM: peers.scaled_mm, MATMUL: peers.cublas}
    work = product(m, size, size)
    return Case(JOB, _name(level, m, size), work, partial(_codes, m, size), sides, checks.product)


def _rounded(level: Level) -> Prepare:
    return lambda a, b: partial(level.multiply, a, b, torch.bfloat16)


def _name(level: Level, m: int, size: int) -> str:
    return f"{level.number} {level.name}, {m} x {size} x {size}"


def _numbers(size: int, device: str) -> tuple[Tensor, Tensor]:
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return a, b


def _codes(m: int, size: int, device: str) -> tuple[Scaled, Scaled]:
    a, b = (torch.randn(rows, size, device=device) for rows in (m, size))
    return groups.quantise(a, TILE), groups.quantise(b, BLOCK)
