"""Operands and checks that the tests of all scaled products share."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from kernel_inputs import poison, poisoned_memory
from minids_kernels import cards, configs, fp8_matmul
from torch import Tensor

from minids.formats.groups import Scaled, quantise

# the widths of V3's products, N x K: of the forward pass, and of weight gradients (K: tokens)
WEIGHTS = [(2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (36864, 7168), (7168, 18432),
           (4096, 7168), (7168, 2048)]  # fmt: skip
GRADIENTS = [(18432, 7168), (7168, 16384)]
GROUPS = [(1, 128), (128, 128), (1, 1), (128, 1)]  # rows a scale of a, and of b

# The reference adds the same partial sums in the same order, in FP32; only fma rounds less often.
SAME_ORDER = 1e-6
# A tensor core adds 128 products of FP8 with about 14 bits (guaranteed by nobody, hence the room);
# what BF16 rounds away stays below it in norm.
ON_A_CARD = 1e-3
COSINE = 1e-5  # of 1 - 2<x, y> / (|x|^2 + |y|^2), the same inputs
QUANTISED = 1e-3  # of the same against the product of the numbers before they were quantised
ROUNDED = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


class Wanted(NamedTuple):
    """A config that every launch of a kernel is to use."""

    kernel: str
    config: dict


def draw(rows: int, k: int, group: int, device: str = "cpu", seed: int = 0) -> Scaled:
    """Return a random matrix, its largest numbers a thousand times its smallest, in E4M3.

    Its rows lie 16 bytes aligned between NaN codes, the scales of tiles column by column: as the
    quantising kernel leaves them.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=generator)
    sizes = 10.0 ** (3 * torch.rand(-(-rows // 8), -(-k // 128), generator=generator) - 2)
    x *= sizes.repeat_interleave(8, 0)[:rows].repeat_interleave(128, 1)[:, :k]
    return among_nan(quantise(x.to(device), (group, 128)))


def among_nan(x: Scaled) -> Scaled:
    """Return the same matrix with NaN codes behind its rows, NaN around its scales."""
    rows, cols = x.values.shape
    size, device = (rows + 8, cols + -cols % 16 + 16), x.values.device
    values = poison(torch.empty(size, dtype=x.values.dtype, device=device))[4 : rows + 4, :cols]
    values.view(torch.uint8).copy_(x.values.view(torch.uint8))
    groups, along = x.scale.shape
    scale = torch.full((along + 2, groups + 4), torch.nan, device=x.scale.device)
    scale = scale[1 : along + 1, :groups].mT
    return Scaled(values, scale.copy_(x.scale), x.group)


def exact(a: Scaled, b: Scaled) -> Tensor:
    """Return the product of the same quantised numbers in FP64."""
    wide = (x.values.double() * spread(x) for x in (a, b))
    return next(wide) @ next(wide).mT


def spread(x: Scaled) -> Tensor:
    """Return every value's scale, in FP64."""
    rows, cols = x.values.shape
    scale = x.scale.double().repeat_interleave(x.group[0], 0)[:rows]
    return scale.repeat_interleave(x.group[1], 1)[:, :cols]


def error(x: Tensor, y: Tensor) -> float:
    """Return how far x is from y, relative to the norm of y."""
    return float((x.double() - y.double()).norm() / y.double().norm())


def unlike(x: Tensor, y: Tensor) -> float:
    """Return DeepGEMM's measure: 0 for equal matrices, 1 for matrices that have nothing alike."""
    x, y = x.double(), y.double()
    return float(1 - 2 * (x * y).sum() / (x.square().sum() + y.square().sum()))


def tolerance(dtype: torch.dtype = torch.float32) -> float:
    """Return the relative error that is allowed: FP32 sums, then one rounding to `dtype`."""
    return (SAME_ORDER if cards.interpreted() else ON_A_CARD) + ROUNDED[dtype]


@contextmanager
def using(wanted: Wanted | None) -> Iterator[None]:
    """Let launches use one config; None: what the kernel chooses."""
    if wanted is None:
        yield
        return
    with configs.trying(wanted.kernel, wanted.config) as trial:
        yield
    launched = {kernel for kernel, _ in trial.asked}
    assert wanted.kernel in launched, f"{wanted.kernel} was not launched, only {launched}"


def every(kernel: str) -> list[Wanted]:
    return [Wanted(kernel, config._asdict()) for config in configs.candidates(kernel)]


def product(module=fp8_matmul):
    """Return a module's product in memory that was full of NaN; all of it must be written."""

    def scaled_matmul(a: Scaled, b: Scaled, *rest, **named) -> Tensor:
        with poisoned_memory():
            y = module.scaled_matmul(a, b, *rest, **named)
        assert y.isfinite().all(), "a number that was not written, or padding, came through"
        return y

    return scaled_matmul


def on_meta(m: int, n: int, k: int, a_group: int, b_group: int, dtype: str, add: bool) -> None:
    """Launch a product of tensors without memory, for the compiler."""
    along = -(-k // 128)

    def operand(rows: int, group: int) -> Scaled:
        values = torch.empty(rows, k, dtype=torch.float8_e4m3fn, device="meta")
        if group == 1:
            return Scaled(values, torch.empty(along, rows, device="meta").mT, (1, 128))
        return Scaled(values, torch.empty(-(-rows // 128), along, device="meta"), (128, 128))

    out = torch.empty(m, n, device="meta") if add else None
    a, b = operand(m, a_group), operand(n, b_group)
    fp8_matmul.scaled_matmul(a, b, getattr(torch, dtype), out)
