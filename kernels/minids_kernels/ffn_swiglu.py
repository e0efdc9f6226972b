"""SwiGLU's product: gate and up are read once, and written as the next product needs it.

    hidden = silu(gate) * up,    silu(x) = x s,    s = 1 / (1 + e^-x)
    d_gate = d_hidden * up * s * (1 + gate (1 - s)),    d_up = d_hidden * silu(gate)

Letters  M rows (tokens) and K columns (the hidden width) of gate and up, J groups along a row.
Grid     one program a tile of several rows and columns; `gated_backward`: 128 rows of BLOCK_K
         columns, the groups of the weight gradient's sum over tokens.
Memory   gate and up in any strides, so both may be halves of one tensor; all else is row-major.
         Quantised tensors lie as fp8_quantise.py leaves them: rows start every 16 bytes, scales of
         tiles as [J, M]; hidden by columns is the transposed matrix, four codes written at a time.
Numbers  computed in FP32, rounded once to the dtype asked for. Hidden is quantised as it is, not
         rounded to 16 bits before: codes and scales are, bit by bit, those of quantise(swiglu(gate,
         up)) with gate and up in FP32; gate's and up's are those of quantise(gate), quantise(up).
Paper    SwiGLU, arXiv:2002.05202; DeepSeek-V3 (arXiv:2412.19437), Eq. 12 and section 3.3.3.
Book     book/11_fp8.ipynb
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from minids_kernels import cards, configs
from minids_kernels.cards import Card
from minids_kernels.e4m3 import divide, magnitude, scale_of, stored, to_e4m3
from minids_kernels.fp8_quantise import (
    SMALLEST,
    TILE,
    allocated,
    put_tiles,
    put_words,
    quarter,
    steps_of,
)
from minids_kernels.scaled import Scaled
from minids_kernels.tiles import ceil_div

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FORMATS = (None, "ue8m0")


class Tiles(NamedTuple):
    """How much of gate and up one program reads."""

    BLOCK_M: int
    BLOCK_K: int  # a multiple of 128
    warps: int


class Columns(NamedTuple):
    """How much of 128 rows one program of `gated_backward` reads."""

    BLOCK_K: int  # divides 128
    warps: int


CANDIDATES = (
    Tiles(8, 512, 8), Tiles(8, 512, 4), Tiles(4, 512, 4), Tiles(2, 1024, 4), Tiles(1, 512, 2),
    Columns(64, 4), Columns(64, 8), Columns(128, 8), Columns(128, 16),
)  # fmt: skip


def rule_of_thumb(M: int, K: int, card: Card) -> Tiles:
    """Return tiles of 16 numbers a thread; smaller ones where these would leave the card idle."""
    large = Tiles(4, 512, 4)
    programs = ceil_div(M, large.BLOCK_M) * ceil_div(K, large.BLOCK_K)
    return large if programs >= 4 * card.n_sm else Tiles(1, 512, 2)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, differentiable; computed in FP32 and rounded once.

    What minids.fused.swiglu.swiglu does; ValueError for what the kernel cannot take.
    """
    _check("swiglu", gate, up, least_axes=1)
    return _Swiglu.apply(gate, up)


def swiglu_quantise(
    gate: Tensor, up: Tensor, scale_fmt: str | None = None, floor: float = 0.0
) -> Scaled:
    """Return silu(gate) * up in FP8 by tiles; forward only. `floor` is a tile's least max-abs."""
    _check("swiglu_quantise", gate, up)
    _check_format("swiglu_quantise", "scale_fmt", scale_fmt)
    return _quantised("swiglu_quantise", gate, up, scale_fmt, floor)[0]


def gated_quantise(
    gate: Tensor,
    up: Tensor,
    hidden_scale: str | None = None,
    halves_scale: str | None = None,
    floor: float = 0.0,
) -> tuple[Scaled, Scaled, Scaled]:
    """Return silu(gate) * up, gate and up in FP8 by tiles: what a product takes, and what waits.

    All three from one read; `floor` is the product's alone: the least max-abs of a tile.
    """
    name = "gated_quantise"
    _check(name, gate, up)
    _check_format(name, "hidden_scale", hidden_scale)
    _check_format(name, "halves_scale", halves_scale)
    hidden, *halves = _quantised(name, gate, up, hidden_scale, floor, True, halves_scale)
    return hidden, halves[0], halves[1]


def gated_backward(
    d_hidden: Tensor,
    gate: Scaled,
    up: Scaled,
    hidden_scale: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Scaled]:
    """Return the gradients of gate and up, and the hidden rows made again, by 128 tokens.

    All from one read of d_hidden and of the FP8 copies that waited, E4M3 by tiles. The third lies
    as what the weight's gradient reads, the transposed matrix; its `mT` is returned.
    """
    name = "gated_backward"
    _check_format(name, "hidden_scale", hidden_scale)
    _check_copies(name, d_hidden, gate, up, dtype)
    card = cards.card(name, d_hidden, *gate[:2], *up[:2])
    (M, K), device = d_hidden.shape, d_hidden.device
    d_gate, d_up = (torch.empty((M, K), dtype=dtype, device=device) for _ in range(2))
    turned = allocated((K, M), TILE, device)
    if d_hidden.numel():
        found = configs.find("ffn_swiglu.Columns", (M, K, d_hidden.itemsize), card)
        config = Columns(**found) if found else Columns(64, 8)
        with torch.cuda.device_of(d_hidden):  # Triton launches on the current GPU
            _from_copies[(ceil_div(M, 128), ceil_div(K, config.BLOCK_K))](
                d_hidden, stored(gate.values, card.fp8), gate.scale,
                stored(up.values, card.fp8), up.scale,
                d_gate, d_up, stored(turned.values, card.fp8), turned.scale, M, K,
                *d_hidden.stride(), *gate.values.stride(), *gate.scale.stride(),
                *up.values.stride(), *up.scale.stride(), turned.values.stride(0), SMALLEST,
                steps_of(torch.float32, hidden_scale), card.fp8,
                config.BLOCK_K, num_warps=config.warps,
            )  # fmt: skip
    return d_gate, d_up, turned.mT


class _Swiglu(torch.autograd.Function):
    """Keep gate and up as they lie."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        hidden = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        _launch(_multiply, gate, up, hidden)
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_hidden: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = ctx.saved_tensors
        found = torch.empty((2, *gate.shape), dtype=gate.dtype, device=gate.device)
        _launch(_differentiate, d_hidden, gate, up, *found)
        return found.unbind(0)


def _launch(kernel: Any, *tensors: Tensor) -> None:
    """Launch a kernel of `swiglu` on [*shape, K] tensors of one shape, of any strides."""
    card = cards.card("swiglu", *tensors)
    if not tensors[0].numel():
        return
    rows = [x.reshape(-1, x.shape[-1]) for x in tensors]
    M, K = rows[0].shape
    config = _config(M, K, rows[0].itemsize, len(rows), card)
    with torch.cuda.device_of(rows[0]):  # Triton launches on the current GPU
        kernel[(ceil_div(M, config.BLOCK_M), ceil_div(K, config.BLOCK_K))](
            *rows, M, K, *(step for x in rows for step in x.stride()),
            config.BLOCK_M, config.BLOCK_K, num_warps=config.warps,
        )  # fmt: skip


def _quantised(
    name: str,
    gate: Tensor,
    up: Tensor,
    hidden_scale: str | None,
    floor: float,
    halves: bool = False,
    halves_scale: str | None = None,
) -> tuple[Scaled, ...]:
    """Return silu(gate) * up by tiles and, with `halves`, gate and up so too."""
    card, shape = cards.card(name, gate, up), gate.shape
    M, K = math.prod(shape[:-1]), shape[-1]
    found = [allocated((M, K), TILE, gate.device) for _ in range(3 if halves else 1)]
    if gate.numel():
        out = [part for y in found for part in (stored(y.values, card.fp8), y.scale)]
        rows = [x.reshape(M, K) for x in (gate, up)]
        config = _config(M, K, gate.itemsize, len(found), card)
        with torch.cuda.device_of(gate):  # Triton launches on the current GPU
            _multiply_quantise[(ceil_div(M, config.BLOCK_M), ceil_div(K, config.BLOCK_K))](
                *rows, *out, *([] if halves else [None] * 4), M, K,
                *rows[0].stride(), *rows[1].stride(), found[0].values.stride(0),
                max(floor, SMALLEST), SMALLEST, steps_of(torch.float32, hidden_scale),
                steps_of(gate.dtype, halves_scale), card.fp8,
                config.BLOCK_M, config.BLOCK_K, num_warps=config.warps,
            )  # fmt: skip
    return tuple(
        Scaled(y.values.unflatten(0, shape[:-1]), y.scale.unflatten(0, shape[:-1]), TILE)
        for y in found
    )


def _config(M: int, K: int, itemsize: int, outputs: int, card: Card) -> Tiles:
    tuned = configs.find("ffn_swiglu.Tiles", (M, K, itemsize, outputs), card)
    return Tiles(**tuned) if tuned else rule_of_thumb(M, K, card)


def _check(name: str, gate: Tensor, up: Tensor, least_axes: int = 2) -> None:
    if gate.shape != up.shape or gate.dtype != up.dtype:
        got = f"{list(gate.shape)} of {gate.dtype} and {list(up.shape)} of {up.dtype}"
        raise ValueError(f"{name}: gate and up must have one shape and one dtype, got {got}")
    if gate.dtype not in DTYPES:
        raise ValueError(f"{name}: gate must be one of {DTYPES}, got {gate.dtype}: cast it")
    if gate.ndim < least_axes:
        got = f"got {gate.ndim} axes: reshape it"
        raise ValueError(f"{name}: gate must have at least {least_axes} axes, {got}")


def _check_format(name: str, argument: str, scale_fmt: str | None) -> None:
    if scale_fmt not in _FORMATS:
        raise ValueError(f"{name}: {argument} must be None or 'ue8m0', got {scale_fmt!r}")


def _check_copies(name: str, d_hidden: Tensor, gate: Scaled, up: Scaled, dtype) -> None:
    for what, kind in (("d_hidden", d_hidden.dtype), ("dtype", dtype)):
        if kind not in DTYPES:
            raise ValueError(f"{name}: {what} must be one of {DTYPES}, got {kind}: cast it")
    if d_hidden.ndim != 2:
        got = list(d_hidden.shape)
        raise ValueError(f"{name}: d_hidden must be a matrix, got shape {got}: reshape it")
    M, K = d_hidden.shape
    for what, half in (("gate", gate), ("up", up)):
        got = [tuple(half.values.shape), tuple(half.scale.shape), tuple(half.group)]
        if got != [(M, K), (M, ceil_div(K, 128)), TILE]:
            values, scales, group = got
            raise ValueError(
                f"{name}: {what} must be [{M}, {K}] as d_hidden, by tiles of {TILE}, got "
                f"{list(values)} with scales {list(scales)} by {group}: quantise it so"
            )
        if half.values.dtype != torch.float8_e4m3fn or half.scale.dtype != torch.float32:
            got = f"{half.values.dtype} and {half.scale.dtype}"
            raise ValueError(
                f"{name}: {what} must hold float8_e4m3fn and scales in float32, got {got}"
            )


@triton.jit
def _load(x, m, k, M, K, x_m, x_k):
    """Return rows m of columns k in FP32; 0 beyond the edges."""
    inside = (m < M)[:, None] & (k < K)[None, :]
    return tl.load(x + (m * x_m)[:, None] + (k * x_k)[None, :], mask=inside, other=0.0).to(
        tl.float32
    )


@triton.jit
def _store(y, numbers, m, k, M, K, y_m, y_k):
    inside = (m < M)[:, None] & (k < K)[None, :]
    to = y + (m * y_m)[:, None] + (k * y_k)[None, :]
    tl.store(to, numbers.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _tile(BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return this program's rows and columns, in 64 bits: so are offsets then."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    return m, k


@triton.jit
def _multiply(
    gate, up, hidden, M, K, gate_m, gate_k, up_m, up_k, hidden_m, hidden_k,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m, k = _tile(BLOCK_M, BLOCK_K)
    g = _load(gate, m, k, M, K, gate_m, gate_k)
    u = _load(up, m, k, M, K, up_m, up_k)
    _store(hidden, g * tl.sigmoid(g) * u, m, k, M, K, hidden_m, hidden_k)


@triton.jit
def _multiply_quantise(
    gate, up, hidden, hidden_scale, gate_codes, gate_scale, up_codes, up_scale, M, K,
    gate_m, gate_k, up_m, up_k, codes_m, least, halves_least,
    STEPS: tl.constexpr, HALVES_STEPS: tl.constexpr, FP8: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write the product in groups of 1 x 128 and, where there is room for them, its factors."""
    m, k = _tile(BLOCK_M, BLOCK_K)
    first = tl.program_id(1) * BLOCK_K
    g = _load(gate, m, k, M, K, gate_m, gate_k)
    u = _load(up, m, k, M, K, up_m, up_k)
    product = g * tl.sigmoid(g) * u
    put_tiles(product, hidden, hidden_scale, m, first, M, K, codes_m, least, STEPS, FP8)
    if gate_codes is not None:
        put_tiles(
            g, gate_codes, gate_scale, m, first, M, K, codes_m, halves_least, HALVES_STEPS, FP8
        )
        put_tiles(u, up_codes, up_scale, m, first, M, K, codes_m, halves_least, HALVES_STEPS, FP8)


@triton.jit
def _differentiate(
    d_hidden, gate, up, d_gate, d_up, M, K,
    d_m, d_k, gate_m, gate_k, up_m, up_k, d_gate_m, d_gate_k, d_up_m, d_up_k,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m, k = _tile(BLOCK_M, BLOCK_K)
    d = _load(d_hidden, m, k, M, K, d_m, d_k)
    g = _load(gate, m, k, M, K, gate_m, gate_k)
    u = _load(up, m, k, M, K, up_m, up_k)
    of_gate, of_up, _ = _gradients(d, g, u)
    _store(d_gate, of_gate, m, k, M, K, d_gate_m, d_gate_k)
    _store(d_up, of_up, m, k, M, K, d_up_m, d_up_k)


@triton.jit
def _gradients(d, gate, up):
    """Return the gradients of gate and up, and their product."""
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    return d * up * sigmoid * (1 + gate * (1 - sigmoid)), d * silu, silu * up


@triton.jit
def _from_copies(
    d_hidden, gate, gate_scale, up, up_scale, d_gate, d_up, turned, turned_scale, M, K,
    d_m, d_k, gate_m, gate_k, gate_scale_m, gate_scale_j, up_m, up_k, up_scale_m, up_scale_j,
    turned_k, least, STEPS: tl.constexpr, FP8: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write gradients row by row, and the product of 128 rows turned, as fp8_quantise._square.

    Row 4 r + q is row r of quarter q: a thread holds four neighbours of a column.
    """
    g, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_K // 128
    m = g * 128 + 4 * tl.arange(0, 32)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K).to(tl.int64)
    gate += (k * gate_k)[None, :]
    up += (k * up_k)[None, :]
    gate_scale += j.to(tl.int64) * gate_scale_j
    up_scale += j.to(tl.int64) * up_scale_j
    factors = gate, gate_scale, gate_m, gate_scale_m, up, up_scale, up_m, up_scale_m
    gradients = d_hidden, d_m, d_k, d_gate, d_up
    q0 = _quarter_from_copies(factors, gradients, m, k, M, K)
    q1 = _quarter_from_copies(factors, gradients, m + 1, k, M, K)
    q2 = _quarter_from_copies(factors, gradients, m + 2, k, M, K)
    q3 = _quarter_from_copies(factors, gradients, m + 3, k, M, K)
    quarters = (q0, q1, q2, q3)

    largest = magnitude(q0)
    for q in tl.static_range(1, 4):
        largest = tl.maximum(largest, magnitude(quarters[q]))
    scale = scale_of(tl.max(largest, axis=0), least, STEPS == 0)[None, :]
    tl.store(turned_scale + (g * K + k)[None, :], scale, mask=(k < K)[None, :])
    words = tl.zeros((32, BLOCK_K), tl.int32)
    for q in tl.static_range(4):
        rounded = to_e4m3(divide(quarters[q], scale, STEPS), FP8)
        words |= rounded.to(tl.uint8, bitcast=True).to(tl.int32) << (8 * q)
    put_words(words, turned, g, 0, k, K, turned_k)


@triton.jit
def _quarter_from_copies(factors, gradients, m, k, M, K):
    """Write the gradients of rows m, return their product."""
    gate, gate_scale, gate_m, gate_scale_m, up, up_scale, up_m, up_scale_m = factors
    d_hidden, d_m, d_k, d_gate, d_up = gradients
    g = quarter(gate, gate_scale, m, k, M, K, gate_m, gate_scale_m)
    u = quarter(up, up_scale, m, k, M, K, up_m, up_scale_m)
    d = _load(d_hidden, m, k, M, K, d_m, d_k)
    of_gate, of_up, product = _gradients(d, g, u)
    _store(d_gate, of_gate, m, k, M, K, K, 1)
    _store(d_up, of_up, m, k, M, K, K, 1)
    return product
