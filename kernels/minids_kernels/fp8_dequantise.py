"""Dequantise: each code times the scale of its group, computed in FP32 and rounded once.

    y = value x scale

Letters  M rows and K columns, J groups along a row, G along a column, n matrices of a batch.
Grid     one program a tile of BLOCK_M x BLOCK_K, all matrices of a batch in one launch; BLOCK_M
         divides 128, so that a program meets one row of blocks.
Memory   streamed once, 16 bytes at a time where the layout allows it; values, scales and `out` may
         lie in any strides, so a transposed matrix is no other case.
Numbers  equal to the reference's, minids/formats/groups.py, bit by bit; NaN is NaN.
Paper    DeepSeek-V3 (arXiv:2412.19437), section 3.3.2.       Book  book/11_fp8.ipynb
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from minids_kernels import cards, configs
from minids_kernels.cards import Card
from minids_kernels.e4m3 import from_e4m3, stored
from minids_kernels.scaled import Scaled

_GROUPS = ((1, 128), (128, 128), (128, 1))  # rows x columns: tiles, blocks, columns
_VALUES = (torch.float8_e4m3fn, torch.bfloat16)  # E5M6 is kept in BF16
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Stream(NamedTuple):
    """How much one program dequantises."""

    BLOCK_M: int  # divides 128
    BLOCK_K: int  # a multiple of 128
    warps: int


CANDIDATES = (Stream(16, 512, 8), Stream(8, 512, 4), Stream(32, 128, 4), Stream(1, 1024, 2))


def rule_of_thumb(M: int, K: int, card: Card) -> Stream:
    """Return tiles of 32 numbers a thread, or of 16 where these would leave the card idle."""
    large = Stream(8, 512, 4)
    tiles = triton.cdiv(M, large.BLOCK_M) * triton.cdiv(K, large.BLOCK_K)
    return large if tiles >= 4 * card.n_sm else Stream(1, 1024, 2)


def dequantise(x: Scaled, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    """Return value times scale, computed in FP32 and rounded once, to `dtype`; into `out` if given.

    What minids.formats.groups.dequantise does, in memory that lies as the values do; ValueError for
    what the kernel cannot take.
    """
    card = _checked(x, dtype, out)
    if x.values.stride(-2) == 1 and x.values.stride(-1) != 1:  # along what is contiguous
        turned = Scaled(x.values, x.scale, x.group).mT
        return dequantise(turned, dtype, None if out is None else out.mT).mT
    y = torch.empty(x.values.shape, dtype=dtype, device=x.values.device) if out is None else out
    if y.ndim > 3 and not y.is_contiguous():
        return y.copy_(dequantise(x, dtype))
    if x.values.numel():
        _launch(x, y.view(-1, *y.shape[-2:]), card)
    return y


def _launch(x: Scaled, y: Tensor, card: Card) -> None:
    n, M, K = y.shape
    values, scale = x.values.reshape(n, M, K), x.scale.reshape(n, *x.scale.shape[-2:])
    if values.dtype == torch.float8_e4m3fn:
        values = stored(values, card.fp8)
    found = configs.find("fp8_dequantise.Stream", (n * M, K, values.itemsize, y.itemsize), card)
    config = Stream(**found) if found else rule_of_thumb(n * M, K, card)
    grid = (n * triton.cdiv(M, config.BLOCK_M), triton.cdiv(K, config.BLOCK_K))
    with torch.cuda.device_of(y):
        _dequantise[grid](
            values, scale, y, M, K, *values.stride(), *scale.stride(), *y.stride(), *x.group,
            config.BLOCK_M, config.BLOCK_K, num_warps=config.warps,
        )  # fmt: skip


def _checked(x: Scaled, dtype: torch.dtype, out: Tensor | None) -> Card:
    """Return the card, or say what the kernel cannot take."""
    values, shape = x.values, tuple(x.values.shape)
    if x.group not in _GROUPS:
        known = ", ".join(map(str, _GROUPS))
        raise ValueError(f"dequantise: the group of x must be one of {known}, got {x.group}")
    if values.dtype not in _VALUES:
        raise ValueError(
            f"dequantise: values must be float8_e4m3fn or bfloat16, got {values.dtype}"
        )
    if dtype not in _DTYPES:
        raise ValueError(f"dequantise: dtype must be float32, bfloat16 or float16, got {dtype}")
    if values.ndim < 2:
        raise ValueError(f"dequantise: values must have rows and columns, got shape {list(shape)}")
    want = (*shape[:-2], *(triton.cdiv(n, c) for n, c in zip(shape[-2:], x.group, strict=True)))
    if tuple(x.scale.shape) != want:
        got = list(x.scale.shape)
        raise ValueError(f"dequantise: scales of these groups must be {list(want)}, got {got}")
    if out is None:
        return cards.card("dequantise", values, x.scale)
    if tuple(out.shape) != shape or out.dtype != dtype:
        got = f"{list(out.shape)} of {out.dtype}"
        raise ValueError(f"dequantise: out must be {list(shape)} of {dtype}, got {got}")
    return cards.card("dequantise", values, x.scale, out)


@triton.jit
def _dequantise(
    values, scale, y, M, K, values_n, values_m, values_k, scale_n, scale_g, scale_j, y_n, y_m, y_k,
    GROUP_M: tl.constexpr, GROUP_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Multiply several rows of several groups by their scales."""
    down = tl.cdiv(M, BLOCK_M)
    batch, i = (tl.program_id(0) // down).to(tl.int64), tl.program_id(0) % down
    m = (i * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K).to(tl.int64)
    inside = (m < M)[:, None] & (k < K)[None, :]
    at = values + batch * values_n + (m * values_m)[:, None] + (k * values_k)[None, :]
    codes = tl.load(at, mask=inside, other=0.0)
    if codes.dtype == tl.uint8:
        wide = from_e4m3(codes, False)
    else:
        wide = codes.to(tl.float32)
    scale += batch * scale_n
    if GROUP_K == 1:
        g = (i * BLOCK_M // GROUP_M).to(tl.int64)
        wide *= tl.load(scale + g * scale_g + k * scale_j, mask=k < K)[None, :]
    else:
        j = tl.program_id(1) * (BLOCK_K // 128) + tl.arange(0, BLOCK_K // 128).to(tl.int64)
        at = scale + (m // GROUP_M * scale_g)[:, None] + (j * scale_j)[None, :]
        scales = tl.load(at, mask=(m < M)[:, None] & (j * 128 < K)[None, :])
        groups = tl.reshape(wide, (BLOCK_M, BLOCK_K // 128, 128)) * scales[:, :, None]
        wide = tl.reshape(groups, (BLOCK_M, BLOCK_K))
    at = y + batch * y_n + (m * y_m)[:, None] + (k * y_k)[None, :]
    tl.store(at, wide.to(y.dtype.element_ty), mask=inside)
