"""Quantise to E4M3 with one scale a group of 128 numbers: each number is read once.

    scale = max(max |x|, floor) / 448 over the group,   codes = E4M3(x / scale)

Letters  M rows and K columns of x, J groups along a row, G along a column, n matrices of a batch.
Grid     one program a tile of x: several rows of several groups, or, where groups go down the
         columns, a square of 128 rows. All matrices of a batch in one launch.
Memory   codes [M, K] row-major; of columns, and of all that is `turned`, the transposed matrix
         [K, M] lies so: what a product reads runs along its sum. Rows start every 16 bytes.
         Scales of tiles lie as [J, M], of columns as [G, K]: neighbours are read together, by our
         product, by Hopper's bulk loads and by cuBLAS. Those of blocks are row-major.
Numbers  codes and scales equal the reference's, minids/formats/groups.py, bit by bit; NaN is NaN.
Paper    DeepSeek-V3 (arXiv:2412.19437), section 3.3.2.       Book  book/11_fp8.ipynb
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from minids_kernels import cards, configs
from minids_kernels.cards import Card
from minids_kernels.e4m3 import divide, from_e4m3, magnitude, scale_of, stored, to_e4m3
from minids_kernels.scaled import Scaled

TILE, BLOCK, COLUMN = (1, 128), (128, 128), (128, 1)  # rows x columns of a group
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CODES = (torch.float8_e4m3fn, torch.bfloat16)  # E5M6 is kept in BF16
SMALLEST = 448 * torch.finfo(torch.float32).tiny  # below it a scale would not be normal
# what the square kernel writes, straight and turned
_NOTHING, _LINES, _BLOCK = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_WRITES = {None: 0, TILE: 1, COLUMN: 1, BLOCK: 2}


class Tiles(NamedTuple):
    """How much of x one program quantises in groups of 1 x 128."""

    BLOCK_M: int
    BLOCK_K: int  # a multiple of 128
    warps: int


class Square(NamedTuple):
    """How many warps quantise a square of 128 x 128."""

    warps: int


class Columns(NamedTuple):
    """How much of 128 rows one program quantises, where all groups go down the columns."""

    BLOCK_K: int
    warps: int


CANDIDATES = (
    Tiles(16, 512, 8), Tiles(8, 1024, 8), Tiles(8, 512, 4), Tiles(4, 512, 4), Tiles(1, 512, 2),
    Square(8), Square(16),
    Columns(64, 4), Columns(64, 8), Columns(128, 8), Columns(128, 16),
)  # fmt: skip


def rule_of_thumb(M: int, K: int, card: Card) -> Tiles:
    """Return tiles of 32 numbers a thread; smaller ones where these would leave the card idle."""
    for tiles in (Tiles(8, 512, 4), Tiles(4, 512, 4)):
        if triton.cdiv(M, tiles.BLOCK_M) * triton.cdiv(K, tiles.BLOCK_K) >= 4 * card.n_sm:
            return tiles
    return Tiles(1, 512, 2)


def quantise(
    x: Tensor, group: tuple[int, int] = TILE, scale_fmt: str | None = None, floor: float = 0.0
) -> Scaled:
    """Round to E4M3, each group's largest number to 448; "ue8m0" scales are powers of two.

    What minids.formats.groups.quantise does; ValueError for what the kernels cannot take.
    """
    _one_of("quantise", "group", group, (TILE, BLOCK, COLUMN))
    if group == COLUMN:
        return _squares("quantise", x, None, None, COLUMN, scale_fmt, floor)[1].mT
    if group == BLOCK:
        return _squares("quantise", x, None, BLOCK, None, scale_fmt, floor)[0]
    least, card = _checked("quantise", x, _DTYPES, scale_fmt, floor)
    y = allocated(x.shape, TILE, x.device)
    if x.numel():
        flat = x.reshape(-1, *x.shape[-2:])
        n, M, K = flat.shape
        found = configs.find("fp8_quantise.Tiles", (n * M, K, x.itemsize), card)
        config = Tiles(**found) if found else rule_of_thumb(n * M, K, card)
        grid = (n * triton.cdiv(M, config.BLOCK_M), triton.cdiv(K, config.BLOCK_K))
        with torch.cuda.device_of(x):
            _tiles[grid](
                flat, stored(y.values, card.fp8), y.scale, M, K, *flat.stride(),
                y.values.stride(-2), least, steps_of(x.dtype, scale_fmt), card.fp8,
                config.BLOCK_M, config.BLOCK_K, num_warps=config.warps,
            )  # fmt: skip
    return y


def quantise_twice(
    x: Tensor,
    group: tuple[int, int],
    turned: tuple[int, int],
    scale_fmt: str | None = None,
    floor: float = 0.0,
) -> tuple[Scaled, Scaled]:
    """Return quantise(x, group) and quantise(x, turned).mT from one read of x.

    The second lies as what it is, the transposed matrix with rows of its own: what backward takes,
    of gradients by tiles and by columns, of weights by blocks both times. `group` is TILE or BLOCK,
    `turned` COLUMN or BLOCK.
    """
    _one_of("quantise_twice", "group", group, (TILE, BLOCK))
    _one_of("quantise_twice", "turned", turned, (COLUMN, BLOCK))
    return _squares("quantise_twice", x, None, group, turned, scale_fmt, floor)


def requantise(
    x: Scaled, group: tuple[int, int], scale_fmt: str | None = None, floor: float = 0.0
) -> Scaled:
    """Return quantise(dequantise(x), group) in one pass; x is E4M3 or BF16 in tiles.

    What was cached by rows for backward is grouped along the tokens that its product sums.
    """
    _one_of("requantise", "group of x", x.group, (TILE,))
    _one_of("requantise", "group", group, (TILE, BLOCK, COLUMN))
    straight, turned = (None, COLUMN) if group == COLUMN else (group, None)
    first, second = _squares("requantise", x.values, x.scale, straight, turned, scale_fmt, floor)
    return second.mT if group == COLUMN else first


def _squares(
    kernel: str,
    x: Tensor,
    x_scale: Tensor | None,
    straight: tuple[int, int] | None,
    turned: tuple[int, int] | None,
    scale_fmt: str | None,
    floor: float,
) -> tuple[Any, Any]:
    """Return x quantised by `straight`, and its transposed matrix quantised as `turned` says."""
    dtypes = _DTYPES if x_scale is None else _CODES
    least, card = _checked(kernel, x, dtypes, scale_fmt, floor)
    J = triton.cdiv(x.shape[-1], 128)
    if x_scale is not None and x_scale.shape != (*x.shape[:-1], J):
        want, got = [*x.shape[:-1], J], list(x_scale.shape)
        raise ValueError(f"{kernel}: the scales of these tiles must be {want}, got {got}")
    first = allocated(x.shape, straight, x.device) if straight else None
    over = (turned[1], turned[0]) if turned else None  # the same group, of the transposed matrix
    second = allocated(x.mT.shape, over, x.device) if over else None
    if not x.numel():
        return first, second
    flat = x.reshape(-1, *x.shape[-2:])
    n, M, K = flat.shape
    flat_scale = None if x_scale is None else x_scale.reshape(n, M, J)
    BLOCK_K, warps = _square_config(n * M, K, x.itemsize, straight, turned, card)
    grid = (n * triton.cdiv(M, 128), triton.cdiv(K, BLOCK_K))
    with torch.cuda.device_of(x):
        _square[grid](
            stored(flat, card.fp8) if flat.dtype == torch.float8_e4m3fn else flat, flat_scale,
            stored(first.values, card.fp8) if first else None, first.scale if first else None,
            stored(second.values, card.fp8) if second else None, second.scale if second else None,
            M, K, *flat.stride(), *((0, 0, 0) if flat_scale is None else flat_scale.stride()),
            first.values.stride(-2) if first else 0, second.values.stride(-2) if second else 0,
            least, _WRITES[straight], _WRITES[turned],
            steps_of(torch.float32 if x_scale is not None else x.dtype, scale_fmt), card.fp8,
            BLOCK_K, num_warps=warps,
        )  # fmt: skip
    return first, second


def _square_config(M, K, itemsize, straight, turned, card: Card) -> tuple[int, int]:
    """Return BLOCK_K and warps: two kinds of groups take more registers, on more threads then."""
    if straight is None and turned == COLUMN:
        found = configs.find("fp8_quantise.Columns", (M, K, itemsize), card)
        return Columns(**found) if found else Columns(64, 4)
    shape = (M, K, itemsize, _WRITES[straight], _WRITES[turned])
    found = configs.find("fp8_quantise.Square", shape, card)
    two_kinds = None not in (straight, turned) and straight != turned
    config = Square(**found) if found else Square(16 if two_kinds else 8)
    return 128, config.warps


def _checked(kernel, x: Tensor, dtypes, scale_fmt: str | None, floor: float) -> tuple[float, Card]:
    """Return the least max-abs of a group and the card, or say what `kernel` cannot take."""
    if scale_fmt not in (None, "ue8m0"):
        raise ValueError(f"{kernel}: scale_fmt must be None or 'ue8m0', got {scale_fmt!r}")
    if x.ndim < 2:
        raise ValueError(f"{kernel}: x must have rows and columns, got {x.ndim} axes: reshape it")
    if x.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{kernel}: x must be one of {names}, got {x.dtype}: convert it")
    return max(floor, SMALLEST), cards.card(kernel, x)


def _one_of(kernel: str, name: str, group: tuple[int, int], groups) -> None:
    if group not in groups:
        known = ", ".join(map(str, groups))
        raise ValueError(f"{kernel}: {name} must be one of {known}, got {group}")


def allocated(shape: Sequence[int], group: tuple[int, int], device: torch.device) -> Scaled:
    """Return memory for a quantised matrix: rows every 16 bytes, scales of tiles by columns."""
    *batch, rows, cols = shape
    wide = torch.empty(*batch, rows, -(-cols // 16) * 16, dtype=_CODES[0], device=device)
    G, J = triton.cdiv(rows, group[0]), triton.cdiv(cols, group[1])
    if group == TILE:
        scale = torch.empty(*batch, J, G, device=device, dtype=torch.float32).mT
    else:
        scale = torch.empty(*batch, G, J, device=device, dtype=torch.float32)
    return Scaled(wide[..., :cols], scale, group)


def steps_of(dtype: torch.dtype, scale_fmt: str | None) -> int:
    """Return the STEPS of `divide`."""
    if scale_fmt:
        return 0
    return 2 if dtype == torch.float32 else 1


@triton.jit
def _tiles(
    x, codes, scale, M, K, x_n, x_m, x_k, codes_m, least,
    STEPS: tl.constexpr, FP8: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Quantise several rows of several groups of 1 x 128."""
    down = tl.cdiv(M, BLOCK_M)
    batch, i = (tl.program_id(0) // down).to(tl.int64), tl.program_id(0) % down
    m = (i * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K).to(tl.int64)
    inside = (m < M)[:, None] & (k < K)[None, :]
    at = x + batch * x_n + (m * x_m)[:, None] + (k * x_k)[None, :]
    wide = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    codes += batch * M * codes_m
    scale += batch * tl.cdiv(K, 128) * M
    put_tiles(wide, codes, scale, m, tl.program_id(1) * BLOCK_K, M, K, codes_m, least, STEPS, FP8)


@triton.jit
def put_tiles(
    wide, codes, scale, m, first, M, K, codes_m, least, STEPS: tl.constexpr, FP8: tl.constexpr
):
    """Quantise FP32 in groups of 1 x 128 and store it: rows m (int64), columns from `first` on.

    Codes [M, K] have rows codes_m apart, scales lie as [J, M]; what is beyond the edges is 0.
    """
    BLOCK_M: tl.constexpr = wide.shape[0]
    BLOCK_J: tl.constexpr = wide.shape[1] // 128
    groups = tl.reshape(wide, (BLOCK_M, BLOCK_J, 128))
    scales = scale_of(tl.max(magnitude(groups), axis=2), least, STEPS == 0)
    values = divide(groups, scales[:, :, None], STEPS)
    k = first + tl.arange(0, BLOCK_J * 128).to(tl.int64)
    to = codes + (m * codes_m)[:, None] + k[None, :]
    rounded = to_e4m3(tl.reshape(values, (BLOCK_M, BLOCK_J * 128)), FP8)
    tl.store(to, rounded, mask=(m < M)[:, None] & (k < K)[None, :])
    j = first // 128 + tl.arange(0, BLOCK_J).to(tl.int64)
    to = scale + (j * M)[None, :] + m[:, None]
    tl.store(to, scales, mask=(m < M)[:, None] & (j * 128 < K)[None, :])


@triton.jit
def _square(
    x, x_scale, codes, scale, turned, turned_scale, M, K,
    x_n, x_m, x_k, x_scale_n, x_scale_m, x_scale_j, codes_m, turned_k, least,
    STRAIGHT: tl.constexpr, TURNED: tl.constexpr,
    STEPS: tl.constexpr, FP8: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Quantise 128 rows from one read: by tiles or a block, and turned by columns or a block.

    Row 4 r + q is row r of quarter q: a thread holds four neighbours of a column and writes what
    is turned in words of four codes. One quarter is rounded after the other: registers suffice.
    """
    G, J = tl.cdiv(M, 128), tl.cdiv(K, 128)
    batch, g = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G
    j = tl.program_id(1) * BLOCK_K // 128
    m = (g * 128 + 4 * tl.arange(0, 32)).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K).to(tl.int64)
    x += batch * x_n + (k * x_k)[None, :]
    if x_scale is not None:
        x_scale += batch * x_scale_n + j * x_scale_j
    q0 = quarter(x, x_scale, m, k, M, K, x_m, x_scale_m)
    q1 = quarter(x, x_scale, m + 1, k, M, K, x_m, x_scale_m)
    q2 = quarter(x, x_scale, m + 2, k, M, K, x_m, x_scale_m)
    q3 = quarter(x, x_scale, m + 3, k, M, K, x_m, x_scale_m)
    quarters = (q0, q1, q2, q3)

    largest = magnitude(q0)
    for q in tl.static_range(1, 4):
        largest = tl.maximum(largest, magnitude(quarters[q]))
    columns = tl.max(largest, axis=0)
    block = scale_of(tl.max(columns, axis=0), least, STEPS == 0)
    if STRAIGHT == _BLOCK:
        tl.store(scale + (batch * G + g) * J + j, block)
    if TURNED == _BLOCK:
        turned_by = block
        tl.store(turned_scale + (batch * J + j) * G + g, block)
    else:
        turned_by = scale_of(columns, least, STEPS == 0)[None, :]
    if TURNED == _LINES:
        to = turned_scale + (batch * G + g) * K + k
        tl.store(to[None, :], turned_by, mask=(k < K)[None, :])

    words = tl.zeros((32, BLOCK_K), tl.int32)
    for q in tl.static_range(4):
        if TURNED != _NOTHING:
            rounded = to_e4m3(divide(quarters[q], turned_by, STEPS), FP8)
            words |= rounded.to(tl.uint8, bitcast=True).to(tl.int32) << (8 * q)
        if STRAIGHT != _NOTHING:
            by = block
            if STRAIGHT == _LINES:
                scales = scale_of(tl.max(magnitude(quarters[q]), axis=1), least, STEPS == 0)
                tl.store(scale + (batch * J + j) * M + m + q, scales, mask=m + q < M)
                by = scales[:, None]
            rounded = to_e4m3(divide(quarters[q], by, STEPS), FP8)
            to = codes + ((batch * M + m + q) * codes_m)[:, None] + k[None, :]
            tl.store(to, rounded, mask=(m + q < M)[:, None] & (k < K)[None, :])
    if TURNED != _NOTHING:
        put_words(words, turned, g, batch * K, k, K, turned_k)


@triton.jit
def put_words(words, turned, g, first, k, K, turned_k):
    """Store four codes a word [32, columns k] from 128 g on: rows `first` + k of `turned`."""
    w = g * 32 + tl.arange(0, 32)
    to = turned.to(tl.pointer_type(tl.int32), bitcast=True)
    to += ((first + k) * (turned_k // 4))[:, None] + w[None, :]
    tl.store(to, tl.trans(words), mask=(k < K)[:, None] & (w < turned_k // 4)[None, :])


@triton.jit
def quarter(x, x_scale, m, k, M, K, x_m, x_scale_m):
    """Return rows m as FP32, times their scales if there are any; 0 beyond the edges."""
    inside = (m < M)[:, None] & (k < K)[None, :]
    rows = tl.load(x + (m * x_m)[:, None], mask=inside, other=0.0)
    if rows.dtype == tl.uint8:
        wide = from_e4m3(rows, False)
    else:
        wide = rows.to(tl.float32)
    if x_scale is not None:
        wide *= tl.load(x_scale + m * x_scale_m, mask=m < M)[:, None]
        wide = tl.where(inside, wide, 0.0)  # it may be 0 times infinity there
    return wide
