"""Job `wgrad`: gradients of weights, sums over tokens that are added to an FP32 matrix in place."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import minids_kernels as kernels
from minids.formats import groups
from minids.formats.groups import COLUMN, Scaled
from minids_kernels.bench import checks, peers
from minids_kernels.bench.case import OURS, Case, Goal, Prepare
from minids_kernels.bench.floors import weight_gradient
from minids_kernels.bench.shapes import TOKENS, Weight

JOB = "wgrad"
GOALS = (Goal("tflops", 700), Goal("ratio", 0.75, peers.SCALED_MM))
LAYERS = (Weight("o", 7168, 16384), Weight("gate", 18432, 7168))


def cases(tokens: int = TOKENS, weights: tuple[Weight, ...] = LAYERS) -> Iterator[Case]:
    """Yield the gradients of the two largest kinds of layer."""
    for weight in weights:
        sides: dict[str, Prepare] = {
            OURS: lambda a, b, total: partial(kernels.scaled_matmul, a, b, torch.float32, total),
            peers.SCALED_MM: peers.scaled_mm_added,
            peers.CUBLAS: peers.cublas_added,
            peers.TORCHAO: peers.torchao_added,
        }
        name = f"{weight.name}, {weight.n} x {weight.k} over {tokens}"
        yield Case(JOB, name, weight_gradient(weight.n, weight.k, tokens),
                   partial(_operands, weight, tokens), sides, checks.product, GOALS)  # fmt: skip


def _operands(weight: Weight, tokens: int, device: str) -> tuple[Scaled, Scaled, Tensor]:
    """Draw both sides of a layer, in columns, and what earlier micro-batches left."""
    dy, x = (torch.randn(tokens, width, device=device) for width in (weight.n, weight.k))
    a, b = (groups.quantise(part, COLUMN).mT for part in (dy, x))
    left, right = (Scaled(part.values.contiguous(), part.scale, part.group) for part in (a, b))
    return left, right, torch.randn(weight.n, weight.k, device=device)
