"""Gradients of the experts' weights: each sums over the slots that its expert owns, and no others.

    out[e, n, k] = sum over slots p of e   dy[p, n] x[p, k]

In BF16 both operands lie as they were made, a row a slot: Hopper's tensor cores take them along
either axis. One of them may instead be gathered by rows, as tokens lie: no sorted copy is made. In
FP8 operands run along the slots, in groups of 128 that end with each expert; a group is one
`tl.dot` that starts from zero, times both vectors of scales (tiles.py). `columns` makes such an
operand of what waited by tokens. An expert that nobody visits gets zeros.

Letters  N and K columns of dy and x: rows and columns of a weight; P slots, which are summed.
Memory   BF16: dy [P, N], x [P, K], or [tokens, ..] with rows; FP8: dy [N, P], x [K, P], row-major.
         out [E, N, K] in any strides.
Grid     tiles of N x K, those of an expert one behind the other: its slots stay in the L2 cache.
Paper    DeepSeek-V3 (arXiv:2412.19437), sections 3.3.1-3.3.2, Figure 6.
Book     book/11_fp8.ipynb
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from minids_kernels import cards, configs
from minids_kernels.cards import Card
from minids_kernels.e4m3 import divide, magnitude, scale_of, stored, to_e4m3
from minids_kernels.e4m3 import operand as in_dot
from minids_kernels.fp8_matmul import put
from minids_kernels.fp8_quantise import SMALLEST, TILE, allocated, put_words, quarter, steps_of
from minids_kernels.scaled import Scaled
from minids_kernels.slots import Slots
from minids_kernels.softmax import describable, described
from minids_kernels.tiles import DEPTH, by_four_warps, ceil_div, operand, place, scale_of_tile

_NAME = "grad_by_expert"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_COLUMNS, _WARPS = 64, 4  # of 128 slots that one program of `columns` groups again


class Rows(NamedTuple):
    """How a weight is cut where operands are no FP8; BLOCK_P slots are multiplied at a time."""

    BLOCK_N: int
    BLOCK_K: int
    BLOCK_P: int
    GROUP_N: int
    warps: int
    stages: int


class Groups(NamedTuple):
    """How a weight is cut where operands are FP8."""

    BLOCK_N: int
    BLOCK_K: int
    GROUP_N: int
    warps: int
    stages: int


CANDIDATES = (
    Rows(128, 128, 64, 8, warps=8, stages=3),
    Rows(128, 256, 64, 8, warps=8, stages=3),
    Rows(64, 128, 64, 8, warps=4, stages=3),
    Rows(128, 128, 16, 8, warps=8, stages=4),
    Rows(64, 64, 16, 8, warps=8, stages=3),
    Groups(128, 128, 8, warps=8, stages=3),
    Groups(64, 128, 8, warps=4, stages=3),
    Groups(64, 64, 8, warps=4, stages=3),
    Groups(64, 32, 8, warps=4, stages=2),
)  # fmt: skip
_FEW_SLOTS, _OF_REGISTERS = CANDIDATES[3], CANDIDATES[4]  # the latter for FP32 too
_TWO_AT_ONCE, _GROUPS_OF_REGISTERS = CANDIDATES[6], CANDIDATES[8]


def rule_of_thumb(size: int, itemsize: int, card: Card) -> Rows | Groups:
    """Return tiles of which two programs run on a multiprocessor: one stores, one multiplies.

    An expert of V3 has few slots and a large weight. Small tiles where each warp multiplies out of
    its registers.
    """
    if itemsize == 1:
        return _TWO_AT_ONCE if by_four_warps(card) else _GROUPS_OF_REGISTERS
    if itemsize == 4 or not by_four_warps(card):
        return _OF_REGISTERS
    return CANDIDATES[0] if size % CANDIDATES[0].BLOCK_P == 0 else _FEW_SLOTS


@triton.jit
def slots_of(
    x, desc, rows, p, first, n_rows, width, x_row, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr
):
    """Return BLOCK_P slots' columns from `first` on; with `rows`, gathered, zeros where empty."""
    if rows is None:
        block = desc.load([p, first])
    else:
        at = tl.load(rows + p + tl.arange(0, BLOCK_P))
        cols = first + tl.arange(0, BLOCK)
        inside = (at < n_rows)[:, None] & (cols < width)[None, :]
        block = tl.load(
            x + at.to(tl.int64)[:, None] * x_row + cols[None, :], mask=inside, other=0.0
        )
    return block


@triton.jit
def keep(out, out_desc, sums, e, n, k, N, K, out_e, out_n, out_k, ADD: tl.constexpr):
    """Store a tile of an expert's gradient, or add it to what is there."""
    if out_desc is None:
        put(out + e.to(tl.int64) * out_e, sums, n, k, N, K, out_n, out_k, ADD)
    else:
        kind = out_desc.dtype
        out_desc.store([e, n, k], sums.to(kind).reshape(1, sums.shape[0], sums.shape[1]))


@triton.jit(do_not_specialize=["dy_rows_n", "x_rows_n"])
def by_rows(
    dy, dy_desc, dy_rows, x, x_desc, x_rows, out, out_desc, start,
    dy_rows_n, x_rows_n, N, K, dy_row, x_row, out_e, out_n, out_k,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, GROUP_N: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    tiles_n, tiles_k = tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    e = tl.program_id(0) // (tiles_n * tiles_k)
    row, column = place(tl.program_id(0) % (tiles_n * tiles_k), tiles_n, tiles_k, GROUP_N)
    n, k = row * BLOCK_N, column * BLOCK_K
    sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for p in range(tl.load(start + e), tl.load(start + e + 1), BLOCK_P):
        a = slots_of(dy, dy_desc, dy_rows, p, n, dy_rows_n, N, dy_row, BLOCK_P, BLOCK_N)
        b = slots_of(x, x_desc, x_rows, p, k, x_rows_n, K, x_row, BLOCK_P, BLOCK_K)
        sums = tl.dot(a.T, b, sums, input_precision="ieee")
    keep(out, out_desc, sums, e, n, k, N, K, out_e, out_n, out_k, ADD)


@triton.jit
def by_groups(
    dy_desc, x_desc, out, out_desc, dy_scale, x_scale, start,
    N, K, dy_n, dy_g, x_k, x_g, out_e, out_n, out_k,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_N: tl.constexpr,
    ADD: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    tiles_n, tiles_k = tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    e = tl.program_id(0) // (tiles_n * tiles_k)
    row, column = place(tl.program_id(0) % (tiles_n * tiles_k), tiles_n, tiles_k, GROUP_N)
    n, k = row * BLOCK_N, column * BLOCK_K
    first, end = tl.load(start + e) // 128, tl.load(start + e + 1) // 128
    dy_scale += first.to(tl.int64) * dy_g
    x_scale += first.to(tl.int64) * x_g
    sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for group in range(first, end):
        scale = scale_of_tile(dy_scale, x_scale, n, k, N, K, dy_n, x_k, BLOCK_N, BLOCK_K, 1, 1)
        a = in_dot(dy_desc.load([n, group * 128]), FP8)
        b = in_dot(x_desc.load([k, group * 128]), FP8)
        sums += tl.dot(a, b.T) * scale
        dy_scale += dy_g
        x_scale += x_g
    keep(out, out_desc, sums, e, n, k, N, K, out_e, out_n, out_k, ADD)


@triton.jit(do_not_specialize=["n_tokens"])
def group_columns(
    x, x_scale, rows, expert, codes, scale, n_tokens, K, x_t, x_k, x_scale_t, x_scale_j,
    codes_k, least, STEPS: tl.constexpr, FP8: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Group 128 slots of BLOCK_K channels and write them turned, as fp8_quantise._square does."""
    g = tl.program_id(0)
    if tl.load(expert + g) < 0:
        return
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K).to(tl.int64)
    x += (k * x_k)[None, :]
    x_scale += tl.program_id(1).to(tl.int64) * BLOCK_K // 128 * x_scale_j
    rows += g.to(tl.int64) * 128 + 4 * tl.arange(0, 32)
    q0 = quarter(x, x_scale, tl.load(rows).to(tl.int64), k, n_tokens, K, x_t, x_scale_t)
    q1 = quarter(x, x_scale, tl.load(rows + 1).to(tl.int64), k, n_tokens, K, x_t, x_scale_t)
    q2 = quarter(x, x_scale, tl.load(rows + 2).to(tl.int64), k, n_tokens, K, x_t, x_scale_t)
    q3 = quarter(x, x_scale, tl.load(rows + 3).to(tl.int64), k, n_tokens, K, x_t, x_scale_t)
    quarters = (q0, q1, q2, q3)
    largest = magnitude(q0)
    for q in tl.static_range(1, 4):
        largest = tl.maximum(largest, magnitude(quarters[q]))
    by = scale_of(tl.max(largest, axis=0), least, STEPS == 0)[None, :]
    tl.store((scale + g.to(tl.int64) * K + k)[None, :], by, mask=(k < K)[None, :])
    words = tl.zeros((32, BLOCK_K), tl.int32)
    for q in tl.static_range(4):
        rounded = to_e4m3(divide(quarters[q], by, STEPS), FP8)
        words |= rounded.to(tl.uint8, bitcast=True).to(tl.int32) << (8 * q)
    put_words(words, codes, g, 0, k, K, codes_k)


def columns(x: Scaled, rows: Tensor, slots: Slots, scale_fmt: str | None = None) -> Scaled:
    """Return tokens' tiles [tokens, K], gathered by slot and grouped by 128 slots, turned: [K, P].

    rows [P]: a slot's token; one that is not there stands for zeros. Codes and scales are those of
    requantise(COLUMN) of the sorted rows. Behind the last tile that is owned nothing is written.
    """
    name, (n_tokens, K), P = "columns", x.values.shape, len(rows)
    card = cards.card(name, *x[:2], rows)
    if x.group != TILE or slots.size != DEPTH:
        got = f"{x.group} and {slots.size}"
        raise ValueError(f"{name}: x must be in tiles of {TILE}, slots.size {DEPTH}, got {got}")
    y = allocated((K, P), TILE, x.values.device)
    if 0 in (K, P):
        return y
    with torch.cuda.device_of(rows):  # Triton launches on the current GPU
        group_columns[(P // DEPTH, ceil_div(K, _COLUMNS))](
            stored(x.values, card.fp8), x.scale, rows, slots.expert,
            stored(y.values, card.fp8), y.scale, n_tokens, K, *x.values.stride(),
            *x.scale.stride(), y.values.stride(0), SMALLEST,
            steps_of(torch.float32, scale_fmt), card.fp8, _COLUMNS, num_warps=_WARPS,
        )  # fmt: skip
    return y


def grad_by_expert(
    dy: Tensor | Scaled,
    x: Tensor | Scaled,
    slots: Slots,
    dtype: torch.dtype,
    out: Tensor | None = None,
    dy_rows: Tensor | None = None,
    x_rows: Tensor | None = None,
) -> Tensor:
    """Return [E, N, K] in `dtype`: over each expert's slots, the sum of dy[p]^T x[p].

    Tensors dy [P, N] and x [P, K] in one of DTYPES, or, by rows [P], gathered from [tokens, ..]:
    an index that is not there stands for zeros. Else both are Scaled, turned: [N, P] and [K, P] in
    groups of (1, 128). Rows of empty slots must be zero. The sum is added to `out` in place where
    it is given, in `dtype`. Raises ValueError for shapes that do not fit.
    """
    N, K = (part.shape[-1] if isinstance(part, Tensor) else len(part.values) for part in (dy, x))
    _check(dy, x, slots, dtype, out, dy_rows, x_rows)
    add, E = out is not None, len(slots.start) - 1
    if out is None:
        out = torch.empty((E, N, K), dtype=dtype, device=slots.start.device)
    write_gradient(dy, x, slots, out, add, dy_rows, x_rows)
    return out


def write_gradient(
    dy: Tensor | Scaled,
    x: Tensor | Scaled,
    slots: Slots,
    out: Tensor,
    add: bool = False,
    dy_rows: Tensor | None = None,
    x_rows: Tensor | None = None,
) -> None:
    """Write the sums of `grad_by_expert` to `out` [E, N, K], of any strides, or add them."""
    parts = [y for part in (dy, x) for y in ([part] if isinstance(part, Tensor) else part[:2])]
    card = cards.card(_NAME, *parts, out, slots.start)
    if not len(slots.visit) and not add:
        out.zero_()
    if 0 in (len(slots.visit), out.numel()):
        return
    with torch.cuda.device_of(out):  # Triton launches on the current GPU
        if isinstance(dy, Tensor) and isinstance(x, Tensor):
            _launch_rows(dy, dy_rows, x, x_rows, slots, out, add, card)
        elif not isinstance(dy, Tensor) and not isinstance(x, Tensor):
            _launch_groups(dy, x, slots, out, add, card)


def _launch_groups(dy: Scaled, x: Scaled, slots: Slots, out: Tensor, add: bool, card: Card) -> None:
    E, N, K = out.shape
    tuned = configs.find("moe_wgrad.Groups", (len(slots.visit), N, K, E), card)
    config = Groups(**tuned) if tuned else rule_of_thumb(slots.size, 1, card)
    a, b = operand(dy, card), operand(x, card)
    by_groups[(E * ceil_div(N, config.BLOCK_N) * ceil_div(K, config.BLOCK_K),)](
        a.descriptor(config.BLOCK_N), b.descriptor(config.BLOCK_K), out,
        _described_out(out, add, config), a.scale, b.scale, slots.start, N, K,
        *a.scale.stride(), *b.scale.stride(), *out.stride(),
        config.BLOCK_N, config.BLOCK_K, config.GROUP_N, add, card.fp8,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def _launch_rows(
    dy: Tensor, dy_rows: Tensor | None, x: Tensor, x_rows: Tensor | None, slots: Slots, out: Tensor,
    add: bool, card: Card,
) -> None:  # fmt: skip
    E, N, K = out.shape
    shape = (len(slots.visit), N, K, E, slots.size, dy.itemsize)
    tuned = configs.find("moe_wgrad.Rows", shape, card)
    config = Rows(**tuned) if tuned else rule_of_thumb(slots.size, dy.itemsize, card)
    assert isinstance(config, Rows), "what is no FP8 is cut as Rows"
    a, a_desc = _operand(dy, dy_rows, config.BLOCK_P, config.BLOCK_N)
    b, b_desc = _operand(x, x_rows, config.BLOCK_P, config.BLOCK_K)
    by_rows[(E * ceil_div(N, config.BLOCK_N) * ceil_div(K, config.BLOCK_K),)](
        a, a_desc, dy_rows, b, b_desc, x_rows, out, _described_out(out, add, config), slots.start,
        len(a), len(b), N, K, a.stride(0), b.stride(0), *out.stride(),
        config.BLOCK_N, config.BLOCK_K, config.BLOCK_P, config.GROUP_N, add,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def _described_out(out: Tensor, add: bool, config: Rows | Groups) -> TensorDescriptor | None:
    if add or not describable(out):
        return None
    return TensorDescriptor.from_tensor(out, [1, config.BLOCK_N, config.BLOCK_K])


def _operand(x: Tensor, rows: Tensor | None, BLOCK_P: int, BLOCK: int):
    """Return a matrix as kernels read it, and, unless it is gathered, what describes it."""
    x = described(x)
    return x, TensorDescriptor.from_tensor(x, [BLOCK_P, BLOCK]) if rows is None else None


def _check(
    dy: Tensor | Scaled,
    x: Tensor | Scaled,
    slots: Slots,
    dtype: torch.dtype,
    out: Tensor | None,
    dy_rows: Tensor | None,
    x_rows: Tensor | None,
) -> None:
    P = len(slots.visit)
    if isinstance(dy, Tensor) != isinstance(x, Tensor):
        raise ValueError(
            f"{_NAME}: dy and x must both be Scaled or both tensors: quantise the other"
        )
    for name, part, rows in (("dy", dy, dy_rows), ("x", x, x_rows)):
        if not isinstance(part, Tensor):
            _check_scaled(name, part, P, rows)
        elif part.ndim != 2 or part.dtype not in DTYPES or (rows is None and len(part) != P):
            raise ValueError(
                f"{_NAME}: {name} must be [{P}, columns], or gathered by rows, in one of {DTYPES}, "
                f"got {list(part.shape)} in {part.dtype}"
            )
        if rows is not None and (rows.shape != (P,) or rows.dtype != torch.int32):
            got = f"{list(rows.shape)} in {rows.dtype}"
            raise ValueError(f"{_NAME}: {name}_rows must be [{P}] in int32, got {got}: one a slot")
    if isinstance(dy, Tensor) and isinstance(x, Tensor) and dy.dtype != x.dtype:
        got = f"{dy.dtype} and {x.dtype}"
        raise ValueError(f"{_NAME}: dy and x must have one dtype, got {got}: cast one")
    size = 16 if isinstance(dy, Tensor) else DEPTH
    if slots.size % size:
        got = slots.size
        raise ValueError(f"{_NAME}: slots.size must be a multiple of {size}, got {got}: align so")
    if dtype not in DTYPES:
        raise ValueError(f"{_NAME}: dtype must be one of {DTYPES}, got {dtype}: cast the result")
    if out is not None:
        N, K = (y.shape[-1] if isinstance(y, Tensor) else len(y.values) for y in (dy, x))
        shape = (len(slots.start) - 1, N, K)
        if tuple(out.shape) != shape or out.dtype != dtype:
            got = f"{tuple(out.shape)} in {out.dtype}"
            raise ValueError(f"{_NAME}: out must be {shape} in {dtype}, got {got}")


def _check_scaled(name: str, x: Scaled, P: int, rows: Tensor | None) -> None:
    values, scale = tuple(x.values.shape), tuple(x.scale.shape)
    if x.group != TILE or values[1:] != (P,) or scale != (values[0], ceil_div(P, DEPTH)):
        raise ValueError(
            f"{_NAME}: {name} must be turned, [columns, {P}] with a scale a group of {TILE}, got "
            f"{values} with {scale} by {tuple(x.group)}: quantise it by COLUMN"
        )
    if x.values.dtype != torch.float8_e4m3fn or x.scale.dtype != torch.float32 or rows is not None:
        raise ValueError(
            f"{_NAME}: {name} must hold float8_e4m3fn and scales in float32, and no rows are "
            f"gathered then, got {x.values.dtype} and {x.scale.dtype}"
        )
