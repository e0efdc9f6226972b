"""What every level asks of its operands, and the memory that it writes.

Letters  M and N rows of the operands, K the summed axis.
Memory   a [M, K], b [N, K], c [M, N]: row-major, each row from a multiple of 16 bytes on, as level
         5 wants it; operands that lie otherwise are copied first. Scales: any strides.
Grid     none: this file holds no kernel.
"""

import torch
from torch import Tensor

from minids_kernels import cards, tiles
from minids_kernels.cards import Card
from minids_kernels.scaled import Scaled
from minids_kernels.tiles import DEPTH, Operand

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LINE = 128  # bytes of a row that a step of the loop takes: a line of the caches
_ALIGNED = 16  # bytes


def plain(level: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Card]:
    """Return operands as levels 1 to 6 read them, an empty result of their dtype, and the card."""
    card = cards.card(level, a, b)
    _check_shapes(level, a, b)
    if a.dtype != b.dtype or a.dtype not in DTYPES:
        raise ValueError(
            f"{level}: operands must share one of {DTYPES}, got {a.dtype} and {b.dtype}: cast them"
        )
    c = empty(len(a), len(b), a.dtype, a.device)
    return in_rows(a), in_rows(b), c, card


def scaled(
    level: str, a: Scaled, b: Scaled, dtype: torch.dtype
) -> tuple[Operand, Operand, Tensor, Card]:
    """Return operands as levels 7 and 8 read them, an empty result of `dtype`, and the card."""
    card = cards.card(level, a.values, a.scale, b.values, b.scale)
    _check_shapes(level, a.values, b.values)
    for name, x, rows in (("a", a, 1), ("b", b, DEPTH)):
        numbers, group = (x.values.dtype, x.scale.dtype), tuple(x.group)
        if numbers != (torch.float8_e4m3fn, torch.float32) or group != (rows, DEPTH):
            raise ValueError(
                f"{level}: {name} must hold float8_e4m3fn in groups of {(rows, DEPTH)} with scales "
                f"in float32, got {numbers[0]} in {group} with {numbers[1]}: quantise it so"
            )
        (m, k), got = x.values.shape, tuple(x.scale.shape)
        scales = tiles.ceil_div(m, rows), tiles.ceil_div(k, DEPTH)
        if got != scales:
            raise ValueError(f"{level}: {name} must have {scales} scales, got {got}: quantise it")
    if dtype not in DTYPES:
        raise ValueError(f"{level}: dtype must be one of {DTYPES}, got {dtype}: cast the result")
    c = empty(len(a.values), len(b.values), dtype, a.values.device)
    return tiles.operand(a, card), tiles.operand(b, card), c, card


def in_rows(x: Tensor) -> Tensor:
    """Return the same numbers in aligned rows; a copy only where they do not lie so."""
    rows, cols = x.shape
    if x.stride(1) == 1 and x.stride(0) >= cols and tiles.is_aligned(x):
        return x
    return empty(rows, cols, x.dtype, x.device).copy_(x)


def empty(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return memory for a matrix whose rows are aligned."""
    step = _ALIGNED // dtype.itemsize
    return torch.empty((rows, cols + -cols % step), dtype=dtype, device=device)[:, :cols]


def stages(card: Card, most: int, bytes_each: int, beside_bytes: int = 0) -> int:
    """Return how many steps of the loop a program's shared memory holds, `most` if it can."""
    return min(most, (card.shared_bytes - beside_bytes) // bytes_each)


def _check_shapes(level: str, a: Tensor, b: Tensor) -> None:
    got = f"{tuple(a.shape)} and {tuple(b.shape)}"
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or 0 in (*a.shape, *b.shape):
        raise ValueError(
            f"{level}: operands must be matrices [M, K] and [N, K], none of them empty, got {got}: "
            "the summed axis comes last in both"
        )
