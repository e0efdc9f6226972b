"""RMSNorm: a row stays in registers between the sum of its squares and what is made of it.

    norm = gain * x r,    r = 1 / sqrt(sum(x^2) / D + eps)
    dx = r (dn - n sum(dn n) / D),    dgain = sum over rows of dy n,    dn = dy gain,    n = x r

The residual path before it (x + y, also written) and the FP8 product behind it (codes and scales in
place of the norm) are of the same read. Backward keeps nothing but x: r is made again, its sum runs
beside the other one. A program walks over every so-manieth row with its part of dgain in registers;
the next rows come through shared memory meanwhile. A second kernel adds the parts in order: no
atomics, the same bits in every run.

Letters  n batches of M rows of D numbers, J groups of 128 along a row.
Grid     forward: one program a tile of BLOCK_M whole rows. Backward: a few programs on every
         multiprocessor, then one for each stretch of columns of their parts, [programs, D] in FP32.
Memory   x, y and gradients in any strides; results are contiguous; FP8 as in fp8_quantise.py.
Numbers  as the reference's: sums in FP32, a division and a root rounded to nearest, x r rounded to
         the dtype of x before the gain. How a row is cut depends on D and the dtype alone, so its
         bits do not change with the rows beside it. Only the order of a row's sum is not torch's,
         nor the same with and without FP8: where it comes out the same, so do all bits, and codes
         and scales are those of quantise(norm). Gradients are in FP32, rounded once.
Paper    RMSNorm, arXiv:1910.07467; DeepSeek-V3 (arXiv:2412.19437), Figure 2 and section 3.3.2.
Book     book/12_kernels.ipynb
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from minids_kernels import cards, configs
from minids_kernels.cards import Card
from minids_kernels.e4m3 import stored
from minids_kernels.fp8_quantise import SMALLEST, TILE, allocated, put_tiles, steps_of
from minids_kernels.scaled import Scaled
from minids_kernels.tiles import ceil_div

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_WIDTH = 128  # of a tile: a group of FP8
_MOST = 32768  # numbers of a row: more do not fit the registers
_SUMS_BYTES = 4096  # of shared memory, in which warps add up a row
_STRETCH, _PARTS = 64, 32  # columns, and parts at a time, that a program of `_add_parts` reads


class Rows(NamedTuple):
    """How many rows a program of the forward pass normalises."""

    BLOCK_M: int
    warps: int


class Walk(NamedTuple):
    """How many rows a program of the backward pass takes at a time, and how it is launched."""

    BLOCK_M: int
    warps: int
    stages: int  # tiles on their way or at work
    programs: int  # on each multiprocessor


CANDIDATES = (
    *(Rows(rows, warps) for rows in (1, 2, 4, 8, 16) for warps in (4, 8, 16)),
    *(Walk(rows, 16, 3, 1) for rows in (1, 2, 4, 8, 16, 32)),
    *(Walk(rows, 8, 3, 2) for rows in (1, 2, 4, 8, 16)),
)


def rule_of_thumb(kind: type[Rows] | type[Walk], D: int) -> Rows | Walk:
    """Return tiles of 16 to 64 numbers a thread, of 8 to 16 in the backward pass, if rows allow it.

    Backward holds four FP32 numbers for each of them: rows of more than 8192 spill registers there.
    """
    width = _padded(D)
    if kind is Rows:
        return Rows(max(1, 2048 // width), min(max(4, width // 2048), 16))
    return Walk(max(1, 4096 // width), 16, 3, 1)


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Return gain * x / sqrt(mean(x^2) + eps) over the last axis, differentiable in x and gain.

    What minids.norm.rms_norm does; ValueError for what the kernel cannot take.
    """
    _check("rms_norm", gain, x)
    return _Norm.apply(x, None, gain, eps)


def add_rms_norm(x: Tensor, y: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + y, the residual path that goes on, and its norm; differentiable."""
    _check("add_rms_norm", gain, x, y)
    return _Norm.apply(x, y, gain, eps)  # pyright: ignore[reportReturnType]


def rms_norm_quantise(
    x: Tensor, gain: Tensor, eps: float, scale_fmt: str | None = None, floor: float = 0.0
) -> Scaled:
    """Return quantise(rms_norm(x, gain, eps)) by tiles, in one pass; forward only."""
    _check("rms_norm_quantise", gain, x, scale_fmt=scale_fmt)
    return _forward("rms_norm_quantise", x, None, gain, eps, (scale_fmt, floor))[1]


def add_rms_norm_quantise(
    x: Tensor,
    y: Tensor,
    gain: Tensor,
    eps: float,
    scale_fmt: str | None = None,
    floor: float = 0.0,
) -> tuple[Tensor, Scaled]:
    """Return x + y and its norm in FP8 by tiles, in one pass; forward only."""
    _check("add_rms_norm_quantise", gain, x, y, scale_fmt=scale_fmt)
    return _forward("add_rms_norm_quantise", x, y, gain, eps, (scale_fmt, floor))


class _Norm(torch.autograd.Function):
    """Keep what is normalised, and the gain."""

    @staticmethod
    def forward(ctx, x, y, gain, eps):
        total, norm = _forward("rms_norm" if y is None else "add_rms_norm", x, y, gain, eps)
        ctx.save_for_backward(total, gain)
        ctx.eps, ctx.dtypes = eps, (x.dtype, None if y is None else y.dtype)
        ctx.set_materialize_grads(False)
        return norm if y is None else (total, norm)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        d_total, d_norm = (None, *grads)[-2:]
        found, d_gain = d_total, None
        if d_norm is not None:
            x, gain = ctx.saved_tensors
            found, d_gain = gradients(d_norm, d_total, x, gain, ctx.eps, ctx.needs_input_grad[2])
        of_x, of_y = ctx.dtypes
        dx = None if found is None else found.to(of_x)
        dy = None if found is None or of_y is None else found.to(of_y)
        return dx, dy, d_gain, None


def _forward(
    kernel: str,
    x: Tensor,
    y: Tensor | None,
    gain: Tensor,
    eps: float,
    quantised: tuple[str | None, float] | None = None,
) -> tuple[Tensor, Any]:
    """Return x, or x + y, and its norm: a tensor, or FP8 with this scale_fmt and floor."""
    card = cards.card(kernel, *(t for t in (x, y, gain) if t is not None))
    D = x.shape[-1]
    total, dtype = x, torch.promote_types(x.dtype, gain.dtype)
    if y is not None:
        dtype = torch.promote_types(x.dtype, y.dtype)
        total = torch.empty(x.shape, dtype=dtype, device=x.device)
        dtype = torch.promote_types(dtype, gain.dtype)
    if quantised is None:
        norm = torch.empty(x.shape, dtype=dtype, device=x.device)
        out, scale, steps, codes_m, least = norm, None, 0, D, 0.0
    else:
        norm = allocated(x.shape, TILE, x.device)
        out, scale, steps = stored(norm.values, card.fp8), norm.scale, steps_of(dtype, quantised[0])
        codes_m, least = out.stride(-2), max(quantised[1], SMALLEST)
    if not x.numel():
        return total, norm
    flat, other = _rows(x), x if y is None else y
    n, M, _ = flat.shape
    config = _chosen(Rows, D, x.itemsize, card)
    with torch.cuda.device_of(x):  # Triton launches on the current GPU
        _normalise[(n * ceil_div(M, config.BLOCK_M),)](
            flat, None if y is None else _rows(y), gain.contiguous(), total, out, scale, M,
            *flat.stride(), *_rows(other).stride(), codes_m, eps, least, D, steps, card.fp8,
            config.BLOCK_M, _padded(D), num_warps=config.warps,
        )  # fmt: skip
    return total, norm


def gradients(
    d_norm: Tensor,
    d_total: Tensor | None,
    x: Tensor,
    gain: Tensor,
    eps: float,
    needs_gain: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of x and, if asked for, of gain; what x already has is `d_total`."""
    tensors = (d_norm, x, gain) if d_total is None else (d_norm, d_total, x, gain)
    card = cards.card("rms_norm's backward", *tensors)
    D = x.shape[-1]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return dx, torch.zeros_like(gain) if needs_gain else None
    rows = [t.reshape(-1, D) for t in (d_norm, d_norm if d_total is None else d_total, x)]
    M = len(rows[0])
    config = _chosen(Walk, D, x.itemsize, card)
    n_programs = min(ceil_div(M, config.BLOCK_M), card.n_sm * config.programs)
    parts = torch.empty(n_programs, D, device=x.device) if needs_gain else None
    with torch.cuda.device_of(x):
        _differentiate[(n_programs,)](
            rows[0], None if d_total is None else rows[1], rows[2], gain.contiguous(), dx, parts,
            M, *(step for t in rows for step in t.stride()), eps, D, config.BLOCK_M, _padded(D),
            _stages(config, tensors, card), num_warps=config.warps,
        )  # fmt: skip
        if parts is None:
            return dx, None
        d_gain = torch.empty(gain.shape, dtype=gain.dtype, device=x.device)
        _add_parts[(ceil_div(D, _STRETCH),)](
            parts, d_gain, n_programs, D, _PARTS, _STRETCH, num_warps=4
        )
    return dx, d_gain


def _rows(x: Tensor) -> Tensor:
    """Return x as batches of rows; its strides stay where it has two or three axes."""
    return x.reshape(-1, *x.shape[-2:]) if x.ndim > 1 else x[None, None]


def _padded(D: int) -> int:
    return max(_LEAST_WIDTH, triton.next_power_of_2(D))


def _chosen(kind: Any, D: int, itemsize: int, card: Card) -> Any:
    """Return how rows of D numbers are cut, whatever their number: tuned, else by the rule."""
    tuned = configs.find(f"norm_rms.{kind.__name__}", (D, itemsize), card)
    return kind(**tuned) if tuned else rule_of_thumb(kind, D)


def _stages(walk: Walk, tensors: tuple[Tensor, ...], card: Card) -> int:
    """Return how many tiles ahead the walk reads, as far as shared memory goes."""
    row_bytes = sum(t.itemsize for t in tensors[:-1]) * _padded(tensors[-1].shape[-1])
    free_bytes = card.shared_bytes // walk.programs - _SUMS_BYTES
    return max(1, min(walk.stages, 1 + free_bytes // (walk.BLOCK_M * row_bytes)))


@triton.jit
def _reciprocal_root(squares, eps, D: tl.constexpr):
    mean = tl.div_rn(squares, tl.full(squares.shape, D, tl.float32))
    return tl.div_rn(tl.full(squares.shape, 1.0, tl.float32), tl.sqrt_rn(mean + eps))


@triton.jit(do_not_specialize=["M"])
def _normalise(
    x, y, gain, total, out, scale, M, x_n, x_m, x_d, y_n, y_m, y_d, out_m, eps, least,
    D: tl.constexpr, STEPS: tl.constexpr, FP8: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Normalise whole rows; with y, add it first and store the sum; with scale, store FP8."""
    down = tl.cdiv(M, BLOCK_M)
    batch, i = (tl.program_id(0) // down).to(tl.int64), tl.program_id(0) % down
    m = (i * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    d = tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
    inside = (m < M)[:, None] & (d < D)
    rows = tl.load(x + batch * x_n + (m * x_m)[:, None] + d * x_d, mask=inside, other=0.0)
    if y is not None:
        more = tl.load(y + batch * y_n + (m * y_m)[:, None] + d * y_d, mask=inside, other=0.0)
        rows = (rows.to(tl.float32) + more.to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + ((batch * M + m) * D)[:, None] + d, rows, mask=inside)
    g = tl.load(gain + d, mask=d < D, other=0.0)
    wide = rows.to(tl.float32)
    r = _reciprocal_root(tl.sum(wide * wide, axis=1), eps, D)
    norm = (wide * r[:, None]).to(rows.dtype).to(tl.float32) * g.to(tl.float32)
    if g.dtype == rows.dtype:
        norm = norm.to(rows.dtype)
    out += batch * M * out_m
    if scale is None:
        tl.store(out + (m * out_m)[:, None] + d, norm, mask=inside)
    else:
        norm = tl.where(inside, norm, 0.0)  # behind a row it may be 0 times infinity
        scale += batch * tl.cdiv(D, 128) * M
        put_tiles(norm.to(tl.float32), out, scale, m, 0, M, D, out_m, least, STEPS, FP8)


@triton.jit(do_not_specialize=["M"])
def _differentiate(
    d_norm, d_total, x, gain, dx, parts, M, n_m, n_d, t_m, t_d, x_m, x_d, eps,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write dx of every so-manieth tile of rows, and what they give to dgain."""
    d = tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
    g = tl.load(gain + d, mask=d < D, other=0.0).to(tl.float32)
    part = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    tiles = tl.cdiv(M, BLOCK_M)
    for i in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        m = (i * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        inside = (m < M)[:, None] & (d < D)
        wide = tl.load(x + (m * x_m)[:, None] + d * x_d, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(d_norm + (m * n_m)[:, None] + d * n_d, mask=inside, other=0.0).to(tl.float32)
        dn = dy * g
        r = _reciprocal_root(tl.sum(wide * wide, axis=1), eps, D)
        r = tl.where(m < M, r, 0.0)  # where no row is, infinity if eps is 0
        along = tl.sum(wide * dn, axis=1) * (1 / D) * r
        n = wide * r[:, None]
        if parts is not None:
            part += dy * n
        found = (dn - n * along[:, None]) * r[:, None]
        if d_total is not None:
            more = tl.load(d_total + (m * t_m)[:, None] + d * t_d, mask=inside, other=0.0)
            found += more.to(tl.float32)
        tl.store(dx + (m * D)[:, None] + d, found.to(dx.dtype.element_ty), mask=inside)
    if parts is not None:
        to = parts + tl.program_id(0).to(tl.int64) * D + d
        tl.store(to, tl.sum(part, axis=0)[None, :], mask=d < D)


@triton.jit
def _add_parts(parts, out, n_parts, D, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Add the parts of a stretch of columns, PARTS at a time."""
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((PARTS, BLOCK), tl.float32)
    for first in range(0, n_parts, PARTS):
        p = (first + tl.arange(0, PARTS)).to(tl.int64)[:, None]
        total += tl.load(parts + p * D + d, mask=(p < n_parts) & (d < D), other=0.0)
    to = out + d
    tl.store(to, tl.sum(total, axis=0)[None, :].to(out.dtype.element_ty), mask=d < D)


def _check(
    kernel: str, gain: Tensor, x: Tensor, y: Tensor | None = None, scale_fmt: str | None = None
) -> None:
    for name, t in (("x", x), ("y", y), ("gain", gain)):
        if t is not None and t.dtype not in DTYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise ValueError(f"{kernel}: {name} must be one of {names}, got {t.dtype}: convert it")
    if scale_fmt not in (None, "ue8m0"):
        raise ValueError(f"{kernel}: scale_fmt must be None or 'ue8m0', got {scale_fmt!r}")
    least = 2 if kernel.endswith("quantise") else 1
    if x.ndim < least or not 1 <= x.shape[-1] <= _MOST:
        raise ValueError(
            f"{kernel}: x must have {least} axes or more, the last of 1 to {_MOST} numbers, got "
            f"{list(x.shape)}: reshape it, or choose impl='torch'"
        )
    if gain.shape != x.shape[-1:]:
        want, got = list(x.shape[-1:]), list(gain.shape)
        raise ValueError(f"{kernel}: gain must be {want}, one number a channel, got {got}")
    if y is not None and y.shape != x.shape:
        want, got = list(x.shape), list(y.shape)
        raise ValueError(f"{kernel}: y must be {want} as x is, got {got}: expand it")
