"""RoPE: neighbouring channels turn as one complex number, wherever they lie, in place if asked.

    y[2k] = x[2k] cos - x[2k + 1] sin,    y[2k + 1] = x[2k] sin + x[2k + 1] cos

Backward turns the other way, by the conjugate; nothing but the phases is kept. A thread holds whole
pairs, so the interleaved channels never cross threads; the phases of a token are the same for all
of its heads, and come from the cache after the first one.

Letters  B batch, T positions, H heads, R rotated channels. A row is one head of one token.
Grid     one program a tile of BLOCK_M rows of one batch; behind them those of a second tensor.
Memory   x [B, T, H, R] and [B, T, R] in any strides, as a part of a wider tensor; phases [B, T,
         R / 2] as pairs of FP32. What is not written in place is contiguous.
Numbers  products and their sum are rounded one by one in FP32, no fma, as torch's vectors do on a
         CPU: the same bits wherever torch uses them (its last few pairs, and a GPU, may fuse).
Paper    RoPE, arXiv:2104.09864; DeepSeek-V3 (arXiv:2412.19437), Eqs. 3 and 8.
Book     book/06_rope.ipynb
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from minids_kernels import cards, configs
from minids_kernels.tiles import ceil_div

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_WIDTH = 16  # of a tile: 16 bytes of any dtype
_MOST = 4096  # channels of a row
_MOST_ROWS = 2**30  # of a batch: they are numbered in 32 bits, which are divided quickly


class Rows(NamedTuple):
    """How many numbers a program turns."""

    NUMBERS: int
    warps: int


CANDIDATES = (Rows(2048, 4), Rows(4096, 4), Rows(4096, 8), Rows(8192, 8), Rows(1024, 2))


def rotate(x: Tensor, phase: Tensor, in_place: bool = False) -> Tensor:
    """Turn each pair of neighbouring channels by its position's angle; differentiable in x.

    What minids.rope.rotate does; with `in_place` x itself is turned and returned. ValueError for
    what the kernel cannot take.
    """
    _check("rotate", x, phase, in_place)
    return _Rotate.apply(x, phase, in_place)


def rotate_both(q_rope: Tensor, k_rope: Tensor, phase: Tensor) -> None:
    """Turn all heads' queries [B, T, H, R] and their one key [B, T, R] in place, in one launch.

    For generation: forward only. Both have one dtype.
    """
    for x in (q_rope, k_rope):
        _check("rotate_both", x, phase, True)
    if q_rope.dtype != k_rope.dtype:
        got = f"{q_rope.dtype} and {k_rope.dtype}"
        raise ValueError(f"rotate_both: both must have one dtype, got {got}: call rotate twice")
    if torch.is_grad_enabled() and (q_rope.requires_grad or k_rope.requires_grad):
        raise ValueError("rotate_both: it has no gradients: call rotate(x, phase, in_place=True)")
    _turn("rotate_both", (q_rope, q_rope), phase, False, (k_rope, k_rope))


class _Rotate(torch.autograd.Function):
    """Keep the phases alone."""

    @staticmethod
    def forward(ctx, x, phase, in_place):
        ctx.save_for_backward(phase)
        if in_place:
            ctx.mark_dirty(x)
        y = x if in_place else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _turn("rotate", (x, y), phase, False)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (phase,) = ctx.saved_tensors
        dx = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
        _turn("rotate's backward", (dy, dx), phase, True)
        return dx, None, None


def _turn(
    kernel: str,
    first: tuple[Tensor, Tensor],
    phase: Tensor,
    back: bool,
    second: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Write to each pair's second tensor what is made of the first, in one launch."""
    card = cards.card(kernel, phase, *first, *(second or ()))
    R = first[0].shape[-1]
    if not first[0].numel():
        return
    x, y = map(_by_head, first)
    B, T, H, _ = x.shape
    width = max(_LEAST_WIDTH, triton.next_power_of_2(R))
    found = configs.find("rope_rotate.Rows", (B * T * H, R, x.itemsize), card)
    config = Rows(**found) if found else CANDIDATES[0]
    rows = max(1, config.NUMBERS // width)
    if phase.stride(-1) != 1:
        phase = phase.contiguous()
    angles = torch.view_as_real(phase.resolve_conj()).expand(B, T, R // 2, 2)
    others = tuple(map(_by_head, second)) if second else ()
    strides = [step for t in (x, y, *(others or (x, y))) for step in t.stride()]
    programs = B * (ceil_div(T * H, rows) + (ceil_div(T, rows) if second else 0))
    with torch.cuda.device_of(x):  # Triton launches on the current GPU
        _rotate[(programs,)](
            x, y, *(others or (None, None)), angles, T, H, *strides, *angles.stride()[:2],
            R, width, rows, back, num_warps=config.warps, enable_fp_fusion=False,
        )  # fmt: skip


def _by_head(x: Tensor) -> Tensor:
    return x if x.ndim == 4 else x[:, :, None]


@triton.jit(do_not_specialize=["T"])
def _rotate(
    x, y, x2, y2, phase, T, H, x_b, x_t, x_h, x_r, y_b, y_t, y_h, y_r,
    x2_b, x2_t, x2_h, x2_r, y2_b, y2_t, y2_h, y2_r, p_b, p_t,
    R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Turn rows of x, or those of x2, which has one head."""
    tiles = tl.cdiv(T * H, BLOCK_M)
    per_batch = tiles
    if x2 is not None:
        per_batch += tl.cdiv(T, BLOCK_M)
    b, i = (tl.program_id(0) // per_batch).to(tl.int64), tl.program_id(0) % per_batch
    if x2 is None or i < tiles:
        row = i * BLOCK_M + tl.arange(0, BLOCK_M)
        t, h = row // H, row % H
        at_x = x + b * x_b + (t.to(tl.int64) * x_t + h.to(tl.int64) * x_h)[:, None]
        at_y = y + b * y_b + (t.to(tl.int64) * y_t + h.to(tl.int64) * y_h)[:, None]
        _rows(at_x, at_y, phase + b * p_b, t, T, x_r, y_r, p_t, R, BLOCK_R, BACK)
    else:
        t = (i - tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        at_x = x2 + b * x2_b + (t.to(tl.int64) * x2_t)[:, None]
        at_y = y2 + b * y2_b + (t.to(tl.int64) * y2_t)[:, None]
        _rows(at_x, at_y, phase + b * p_b, t, T, x2_r, y2_r, p_t, R, BLOCK_R, BACK)


@triton.jit
def _rows(
    x, y, phase, t, T, x_r, y_r, p_t,
    R: tl.constexpr, BLOCK_R: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Turn the rows at x, each by the phases of its position t."""
    r = tl.arange(0, BLOCK_R).to(tl.int64)[None, :]
    inside = (t < T)[:, None] & (r < R)
    of_token = phase + (t.to(tl.int64) * p_t)[:, None]
    c, s = _pairs(tl.load(of_token + r, mask=inside, other=0.0))
    a, b = _pairs(tl.load(x + r * x_r, mask=inside, other=0.0).to(tl.float32))
    if BACK:
        s = -s
    turned = tl.join(a * c - b * s, a * s + b * c)
    turned = tl.reshape(turned, (turned.shape[0], BLOCK_R)).to(y.dtype.element_ty)
    tl.store(y + r * y_r, turned, mask=inside)


@triton.jit
def _pairs(x):
    """Return the even and the odd columns."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


def _check(kernel: str, x: Tensor, phase: Tensor, in_place: bool) -> None:
    if x.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"{kernel}: x must be one of {names}, got {x.dtype}: convert it")
    if x.ndim not in (3, 4) or x.shape[-1] % 2 or not 2 <= x.shape[-1] <= _MOST:
        raise ValueError(
            f"{kernel}: x must be [B, T, R] or [B, T, H, R], R even and at most {_MOST}, got "
            f"{list(x.shape)}: reshape it"
        )
    B, T, R = x.shape[0], x.shape[1], x.shape[-1]
    if x.shape[1:-1].numel() > _MOST_ROWS:
        raise ValueError(f"{kernel}: a batch has at most {_MOST_ROWS} rows, got {list(x.shape)}")
    if phase.dtype != torch.complex64:
        raise ValueError(f"{kernel}: phase must be complex64, got {phase.dtype}: convert it")
    if tuple(phase.shape) not in ((B, T, R // 2), (1, T, R // 2)):
        want, got = [B, T, R // 2], list(phase.shape)
        raise ValueError(f"{kernel}: phase must be {want}, or one for all rows, got {got}")
    if in_place and any(step == 0 and n > 1 for n, step in zip(x.shape, x.stride(), strict=True)):
        raise ValueError(f"{kernel}: x repeats numbers in memory: clone it, or let in_place=False")
