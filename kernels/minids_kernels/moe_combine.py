"""Results of experts go back to their tokens; in backward, tokens' gradients go out to the slots.

    combine   out[t] = sum over k of gate[t, k] y[place[t, k]], the first k first
    spread    d_y[place[t, k]] = gate[t, k] dy[t],    d_gate[t, k] = <dy[t], y[place[t, k]]>

One program gathers what a token is owed, so nothing is added by atomics and every run gives the
same bits. In `spread` a token's program reads its row once and writes it K times; a second kernel
writes zeros to the empty slots of tiles that an expert owns: products along the slots read them.

Letters  D columns; V visits, tokens x K; P slots (slots.py).
Memory   y, dy, gate: any strides; out, d_y, d_gate: row-major. Sums in FP32.
Grid     combine: (tokens, stretches of D); spread: tokens, then runs of 16 slots.
Paper    DeepSeek-V3 (arXiv:2412.19437), Eq. 12.               Book  book/07_moe.ipynb
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from minids_kernels import cards, configs
from minids_kernels.cards import Card
from minids_kernels.slots import Slots
from minids_kernels.tiles import ceil_div

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_AT_ONCE = 8  # rows of one token whose loads are under way together
_RUN = 16  # slots that one program fills with zeros; divides the size of every tile


class Gather(NamedTuple):
    """How much of a token's row one program adds up."""

    BLOCK_D: int
    warps: int


class Spread(NamedTuple):
    """How much of a token's row one program takes at a time."""

    BLOCK_D: int
    warps: int


CANDIDATES = (
    Gather(1024, 4), Gather(512, 2), Gather(2048, 8), Gather(2048, 4), Gather(512, 4),
    Spread(512, 4), Spread(1024, 8), Spread(512, 8), Spread(256, 4),
)  # fmt: skip


def rule_of_thumb(kind: type, D: int, itemsize: int, card: Card) -> Gather | Spread:
    """Return loads of 16 bytes a thread and row; the card's size does not matter, rows are many."""
    if kind is Gather:
        return Gather(512, 4) if itemsize == 4 else Gather(1024, 4)
    return Spread(256, 4) if itemsize == 4 else Spread(512, 4)


@triton.jit
def add_rows(
    y, gate, place, out, D, y_row, y_col, gate_row, gate_col,
    K: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, K, AT_ONCE):
        for other in tl.static_range(AT_ONCE):
            k = first + other
            slot = tl.load(place + t * K + k, mask=k < K, other=0).to(tl.int64)
            inside = (d < D) & (k < K)
            row = tl.load(y + slot * y_row + d.to(tl.int64) * y_col, mask=inside, other=0.0)
            if gate is None:
                total += row.to(tl.float32)
            else:
                weight = tl.load(gate + t * gate_row + k * gate_col, mask=k < K, other=0.0)
                total += weight.to(tl.float32) * row.to(tl.float32)
    tl.store(out + t * D + d, total.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def give_rows(
    dy, y, gate, place, d_y, d_gate, D, dy_row, dy_col, y_row, y_col, gate_row, gate_col,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        slots = tl.load(place + t * K + k, mask=k < K, other=0).to(tl.int64)[:, None]
        weights = tl.load(gate + t * gate_row + k * gate_col, mask=k < K, other=0.0)
        products = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
        for begin in range(0, D, BLOCK_D):
            d = begin + tl.arange(0, BLOCK_D)
            inside = (k < K)[:, None] & (d < D)[None, :]
            row = tl.load(dy + t * dy_row + d.to(tl.int64) * dy_col, mask=d < D, other=0.0)
            row = row.to(tl.float32)[None, :]
            given = weights.to(tl.float32)[:, None] * row
            tl.store(d_y + slots * D + d[None, :], given.to(d_y.dtype.element_ty), mask=inside)
            if y is not None:
                at = y + slots * y_row + d.to(tl.int64)[None, :] * y_col
                products += row * tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if y is not None:
            tl.store(d_gate + t * K + k, tl.sum(products, 1), mask=k < K)


@triton.jit(do_not_specialize=["V"])
def blank_rows(
    d_y, visit, expert, V, D, SIZE: tl.constexpr, RUN: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Write zeros to empty slots; behind the last tile that is owned, nothing."""
    first = tl.program_id(0) * RUN
    if tl.load(expert + first // SIZE) >= 0:
        slots = first + tl.arange(0, RUN)
        empty = tl.load(visit + slots) >= V
        if tl.max(empty.to(tl.int32), 0) > 0:
            rows = d_y + slots.to(tl.int64)[:, None] * D
            for begin in range(0, D, BLOCK_D):
                d = begin + tl.arange(0, BLOCK_D)[None, :]
                zeros = tl.zeros((RUN, BLOCK_D), d_y.dtype.element_ty)
                tl.store(rows + d, zeros, mask=empty[:, None] & (d < D))


def combine(
    y: Tensor, gate: Tensor | None, slots: Slots, dtype: torch.dtype | None = None
) -> Tensor:
    """Return [tokens, D] in `dtype`, or y's: each token's rows of y [P, D], weighted and added.

    Added in FP32, in the order of k; without a gate every weight is 1. Slots that hold no visit may
    hold anything, NaN too. Raises ValueError for shapes that do not fit.
    """
    name, (n_tokens, K) = "combine", slots.place.shape
    card = cards.card(name, y, slots.place, *([] if gate is None else [gate]))
    dtype = y.dtype if dtype is None else dtype
    _check(name, slots, y, gate, dtype)
    D = y.shape[1]
    out = torch.empty((n_tokens, D), dtype=dtype, device=y.device)
    if 0 in (n_tokens, D):
        return out
    if K == 0:
        return out.zero_()
    config = _config(Gather, n_tokens, D, K, y.itemsize, card)
    with torch.cuda.device_of(y):  # Triton launches on the current GPU
        add_rows[(n_tokens, ceil_div(D, config.BLOCK_D))](
            y, gate, slots.place, out, D, *y.stride(), *_strides(gate),
            K, min(K, _AT_ONCE), config.BLOCK_D, num_warps=config.warps,
        )  # fmt: skip
    return out


def spread(
    dy: Tensor, y: Tensor | None, gate: Tensor, slots: Slots
) -> tuple[Tensor, Tensor | None]:
    """Return combine's gradients: d_y [P, D] in the dtype of dy, and, given y, d_gate in FP32.

    d_y is zero in empty slots of tiles that an expert owns, and not written behind them. Raises
    ValueError for shapes that do not fit.
    """
    name, (n_tokens, K) = "spread", slots.place.shape
    card = cards.card(name, dy, gate, slots.place, *([] if y is None else [y]))
    _check(name, slots, y, gate, dy.dtype)
    if dy.ndim != 2 or len(dy) != n_tokens or (y is not None and y.shape[1] != dy.shape[1]):
        want = f"[{n_tokens}, {'D' if y is None else y.shape[1]}]"
        raise ValueError(f"{name}: dy must be {want}, got {list(dy.shape)}: one row a token")
    P, D = len(slots.visit), dy.shape[1]
    d_y = torch.empty((P, D), dtype=dy.dtype, device=dy.device)
    d_gate = None
    if y is not None:
        d_gate = torch.empty((n_tokens, K), dtype=torch.float32, device=dy.device)
    if 0 in (n_tokens, K, D):
        return d_y, None if d_gate is None else d_gate.zero_()
    config = _config(Spread, n_tokens, D, K, dy.itemsize, card)
    at_once = triton.next_power_of_2(min(K, _AT_ONCE))
    with torch.cuda.device_of(dy):  # Triton launches on the current GPU
        give_rows[(n_tokens,)](
            dy, y, gate, slots.place, d_y, d_gate, D, *dy.stride(), *_strides(y), *gate.stride(),
            K, at_once, config.BLOCK_D, num_warps=config.warps,
        )  # fmt: skip
        blank_rows[(P // _RUN,)](
            d_y, slots.visit, slots.expert, n_tokens * K, D,
            slots.size, _RUN, config.BLOCK_D, num_warps=config.warps,
        )  # fmt: skip
    return d_y, d_gate


def _config(kind: type, n_tokens: int, D: int, K: int, itemsize: int, card: Card):
    found = configs.find(f"moe_combine.{kind.__name__}", (n_tokens, D, K, itemsize), card)
    return kind(**found) if found else rule_of_thumb(kind, D, itemsize, card)


def _strides(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


def _check(
    name: str, slots: Slots, y: Tensor | None, gate: Tensor | None, dtype: torch.dtype
) -> None:
    P = len(slots.visit)
    if y is not None and (y.ndim != 2 or len(y) != P):
        raise ValueError(f"{name}: y must be [{P}, D], got {list(y.shape)}: one row a slot")
    if gate is not None and gate.shape != slots.place.shape:
        want, got = list(slots.place.shape), list(gate.shape)
        raise ValueError(f"{name}: gate must be {want}, got {got}: one weight a visit")
    for what, kind in (("y", y), ("gate", gate), ("dtype", dtype)):
        kind = kind.dtype if isinstance(kind, Tensor) else kind
        if kind is not None and kind not in DTYPES:
            raise ValueError(f"{name}: {what} must be one of {DTYPES}, got {kind}: cast it")
    if slots.size % _RUN:
        raise ValueError(f"{name}: slots.size must be a multiple of {_RUN}, got {slots.size}")
