"""Job `quantise`: rounding to E4M3 and back, which moves bytes and little else."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import minids_kernels as kernels
from minids.formats import groups
from minids.formats.groups import BLOCK, COLUMN, TILE, Scaled
from minids_kernels.bench import checks, peers
from minids_kernels.bench.case import OURS, Case, Goal, Prepare
from minids_kernels.bench.floors import Work, quantisation
from minids_kernels.bench.shapes import TOKENS

JOB = "quantise"
GOALS = (Goal("percent_of_copy", 90),)
COMPILED = ((TILE,), (BLOCK,))  # compiling takes seconds: not for the others

Size = tuple[int, int]


def cases(
    activation: Size = (TOKENS, 7168), hidden: Size = (TOKENS, 18432), weight: Size = (18432, 7168)
) -> Iterator[Case]:
    """Yield what a step of training does to activations, gradients and weights."""
    yield _requantised("1x128 to 128x1", activation)
    yield _quantised("1x128", activation, (TILE,))
    yield _quantised("1x128 and 128x1", activation, (TILE, COLUMN))
    yield _quantised("1x128", hidden, (TILE,))
    yield _quantised("128x128", weight, (BLOCK,))
    yield _dequantised("128x128 to BF16", weight)
    yield _quantised("128x128, turned too", weight, (BLOCK, BLOCK))


def _quantised(name: str, size: Size, by: tuple[Size, ...]) -> Case:
    """Round random BF16 in one grouping, or in two from one read."""
    call = "quantise" if len(by) == 1 else "quantise_twice"
    reference = getattr(groups, call)
    sides: dict[str, Prepare] = {OURS: lambda x: partial(getattr(kernels, call), x, *by)}
    if len(by) == 1:
        sides[peers.TORCHAO] = partial(peers.torchao_quantise, by[0])
    if by in COMPILED:
        sides[peers.COMPILED] = partial(peers.compiled, reference, by)
    work = quantisation(*size, *by)
    return _case(name, size, work, partial(_numbers, size), sides, lambda x: reference(x, *by))


def _requantised(name: str, size: Size) -> Case:
    """Group what forward stored by tiles again by columns, for the weight's gradient."""
    work = quantisation(*size, COLUMN, read_bytes=1)
    scales = quantisation(*size, TILE, read_bytes=0, write_bytes=0)  # read too
    sides: dict[str, Prepare] = {OURS: lambda x: partial(kernels.requantise, x, COLUMN)}
    work = Work(work.moved_bytes + scales.moved_bytes)
    return _case(name, size, work, partial(_codes, size, TILE), sides,
                 lambda x: groups.requantise(x, COLUMN))  # fmt: skip


def _dequantised(name: str, size: Size) -> Case:
    """Write a weight in blocks as BF16."""
    sides: dict[str, Prepare] = {
        OURS: lambda x: partial(kernels.dequantise, x, torch.bfloat16),
        peers.COMPILED: partial(peers.compiled, groups.dequantise, (torch.bfloat16,)),
    }
    return _case(name, size, quantisation(*size, BLOCK), partial(_codes, size, BLOCK), sides,
                 lambda x: groups.dequantise(x, torch.bfloat16))  # fmt: skip


def _case(name: str, size: Size, work: Work, inputs: Any, sides: Any, reference: Any) -> Case:
    check = partial(checks.bits, reference)
    return Case(JOB, f"{name}, {size[0]} x {size[1]}", work, inputs, sides, check, GOALS)


def _numbers(size: Size, device: str) -> tuple[Tensor]:
    return (torch.randn(size, device=device).bfloat16(),)


def _codes(size: Size, group: Size, device: str) -> tuple[Scaled]:
    return (groups.quantise(*_numbers(size, device), group),)
