"""Experts' first layer: tiles gather their tokens' rows, meet gate and up together, gate them.

    hidden[p] = silu(W_gate x[t]) * (W_up x[t]),   t = visit[p] // K the token of slot p

No sorted copy of x is made. Both products share the gathered tile; where x is FP8, each 128 of
their sums are scaled and added in FP32 (tiles.py), and hidden is quantised before it is written.

Tiles of 16 slots change sides with the weight, whose rows take the side of the tensor core's tile
that is never below 64: few tokens are then a stream of weights. No token's sum knows of others:
in tiles of one size its bits are the same beside any.

Letters  P slots (slots.py), D width, F hidden width, E experts, TOP experts a token.
Memory   x [BT, D] in rows; w [E, 2, F, D] by descriptors, whose offsets have 64 bits; hidden
         [P, F], FP8 as fp8_quantise.py leaves tiles; halves [P, 2, F]. Empty slots of an expert's
         tiles are computed from zeros; nothing is written behind the last expert's.
Grid     P / BLOCK_M x F tiles, down GROUP_M tiles of slots, then to the right: an expert's tiles
         are neighbours and share its weights in the L2 cache. Tiles behind the end stop at once.
Paper    DeepSeek-V3 (arXiv:2412.19437), Eq. 12, sections 3.3.2-3.3.3; SwiGLU, arXiv:2002.05202.
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
from minids_kernels.e4m3 import operand as in_dot
from minids_kernels.e4m3 import stored
from minids_kernels.fp8_quantise import SMALLEST, TILE, allocated, put_tiles, steps_of
from minids_kernels.scaled import Scaled
from minids_kernels.slots import Slots
from minids_kernels.softmax import described, empty
from minids_kernels.tiles import DEPTH, by_four_warps, ceil_div, place

_NAME = "up"
KINDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_SWAPPED = 16  # slots of a tile that changes sides with the weight


class Up(NamedTuple):
    """How hidden is cut: BLOCK_M slots x (PARTS BLOCK_N), one part after the other."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int  # 128 for FP8
    PARTS: int
    GROUP_M: int
    warps: int
    stages: int


CANDIDATES = (
    Up(128, 64, 128, 2, 8, warps=8, stages=4),
    Up(64, 128, 128, 1, 16, warps=8, stages=4),
    Up(64, 64, 128, 2, 16, warps=4, stages=4),
    Up(16, 128, 128, 1, 8, warps=4, stages=3),
    Up(16, 128, 128, 1, 8, warps=4, stages=6),
    Up(16, 64, 128, 2, 8, warps=4, stages=5),
    Up(32, 32, 128, 4, 16, warps=8, stages=2),
    Up(16, 32, 128, 4, 8, warps=8, stages=2),
    Up(128, 128, 64, 1, 8, warps=8, stages=4),
    Up(128, 64, 64, 1, 8, warps=8, stages=4),
    Up(64, 64, 64, 1, 16, warps=4, stages=4),
    Up(16, 64, 64, 1, 8, warps=4, stages=6),
    Up(32, 32, 32, 1, 16, warps=4, stages=2),
    Up(16, 32, 32, 1, 8, warps=4, stages=2),
)


def rule_of_thumb(size: int, itemsize: int, card: Card) -> Up:
    """Return tiles that spill nothing; small ones where each warp multiplies out of registers."""
    few = size == _SWAPPED
    if itemsize == 1:
        if not by_four_warps(card):
            return CANDIDATES[7 if few else 6]
        return CANDIDATES[3 if few else 0 if size == 128 else 1]
    if itemsize == 4 or not by_four_warps(card):
        return CANDIDATES[13 if few else 12]
    return CANDIDATES[11 if few else 8 if size == 128 else 10]


def fits(config: Up, size: int, itemsize: int) -> bool:
    """Say whether tiles of slots hold whole tiles of this config, and its depth is the dtype's."""
    fp8 = config.BLOCK_K == DEPTH and config.PARTS * config.BLOCK_N == DEPTH
    sides = (config.BLOCK_M == _SWAPPED) == (size == _SWAPPED) and config.BLOCK_M <= size
    return sides and fp8 == (itemsize == 1) and (itemsize < 4 or config.BLOCK_K == 32)


@triton.jit
def _halves(
    x, x_scale, w_desc, w_scale, rows, there, e, n, D, x_j, w_half, w_k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Return gate and up of BLOCK_M slots, BLOCK_N columns from n on."""
    if SWAP:
        gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = gate
    cols = tl.arange(0, BLOCK_K)
    for k in range(tl.cdiv(D, BLOCK_K)):
        inside = there[:, None] & (k * BLOCK_K + cols < D)[None, :]
        a = tl.load(x + rows[:, None] + (k * BLOCK_K + cols)[None, :], mask=inside, other=0.0)
        w_gate = w_desc.load([e, 0, n, k * BLOCK_K]).reshape(BLOCK_N, BLOCK_K)
        w_up = w_desc.load([e, 1, n, k * BLOCK_K]).reshape(BLOCK_N, BLOCK_K)
        if x_scale is None:
            if SWAP:
                gate = tl.dot(w_gate, a.T, gate, input_precision="ieee")
                up = tl.dot(w_up, a.T, up, input_precision="ieee")
            else:
                gate = tl.dot(a, w_gate.T, gate, input_precision="ieee")
                up = tl.dot(a, w_up.T, up, input_precision="ieee")
        else:
            by = tl.load(x_scale, mask=there, other=0.0)
            same = tl.zeros((BLOCK_M,), tl.int64)  # a vector, as in tiles.py
            by_gate = by * tl.load(w_scale + same)
            by_up = by * tl.load(w_scale + same + w_half)
            a, w_gate, w_up = in_dot(a, FP8), in_dot(w_gate, FP8), in_dot(w_up, FP8)
            if SWAP:
                gate += tl.dot(w_gate, a.T) * by_gate[None, :]
                up += tl.dot(w_up, a.T) * by_up[None, :]
            else:
                gate += tl.dot(a, w_gate.T) * by_gate[:, None]
                up += tl.dot(a, w_up.T) * by_up[:, None]
            x_scale += x_j
            w_scale += w_k
    if SWAP:
        return gate.T, up.T
    else:
        return gate, up


@triton.jit(do_not_specialize=["V", "TOP", "tiles_m", "P"])
def gated(
    x, x_scale, w_desc, w_scale, hidden, hidden_scale, halves, visit, expert,
    V, TOP, tiles_m, P, F, D, x_t, x_scale_t, x_scale_j, w_e, w_half, w_f, w_k, hidden_p, halves_p,
    least, SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr, GROUP_M: tl.constexpr, KIND: tl.constexpr, STEPS: tl.constexpr,
    FP8: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(F, PARTS * BLOCK_N)
    row, column = place(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    e = tl.load(expert + row * BLOCK_M // SIZE)
    if e < 0:
        return
    p = row * BLOCK_M + tl.arange(0, BLOCK_M)
    v = tl.load(visit + p)
    there = v < V
    token, p = (v // TOP).to(tl.int64), p.to(tl.int64)
    if x_scale is not None:
        x_scale += token * x_scale_t
        # one block of 128 x 128 a step: parts lie in the same rows of blocks
        w_scale += e.to(tl.int64) * w_e + column.to(tl.int64) * w_f
    products = ()
    for part in tl.static_range(PARTS):
        n = (column * PARTS + part) * BLOCK_N
        gate, up = _halves(
            x, x_scale, w_desc, w_scale, token * x_t, there, e, n, D, x_scale_j, w_half, w_k,
            BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_M == 16, FP8,
        )  # fmt: skip
        gate, up = gate.to(KIND), up.to(KIND)
        if halves is not None:
            f = n + tl.arange(0, BLOCK_N)
            to = halves + (p * halves_p)[:, None] + f[None, :]
            tl.store(to, gate, mask=(f < F)[None, :])
            tl.store(to + halves_p // 2, up, mask=(f < F)[None, :])
        wide = gate.to(tl.float32)
        products += (wide * tl.sigmoid(wide) * up.to(tl.float32),)
    product = _side_by_side(products, PARTS)
    first = column * PARTS * BLOCK_N
    if hidden_scale is None:
        f = first + tl.arange(0, PARTS * BLOCK_N)
        to = hidden + (p * hidden_p)[:, None] + f[None, :]
        tl.store(to, product.to(KIND), mask=(f < F)[None, :])
    else:
        put_tiles(product, hidden, hidden_scale, p, first, P, F, hidden_p, least, STEPS, FP8)


@triton.jit
def _side_by_side(parts, PARTS: tl.constexpr):
    """Return one, two or four blocks as one."""
    if PARTS == 1:
        return parts[0]
    elif PARTS == 2:
        return _beside(parts[0], parts[1])
    else:
        return _beside(_beside(parts[0], parts[1]), _beside(parts[2], parts[3]))


@triton.jit
def _beside(left, right):
    M: tl.constexpr = left.shape[0]
    N: tl.constexpr = left.shape[1]
    return tl.join(left, right).permute(0, 2, 1).reshape(M, 2 * N)


def up(
    x: Tensor | Scaled,
    slots: Slots,
    w_gate_up: Tensor | Scaled,
    dtype: torch.dtype,
    hidden_scale: str | None = None,
    floor: float = 0.0,
    keep: bool = False,
) -> tuple[Tensor | Scaled, Tensor | None]:
    """Return hidden [P, F], and with `keep` gate and up [P, 2, F] in `dtype`, else None.

    x [BT, D] and w [E, 2, F, D] are tensors of `dtype`, or x is FP8 by tiles and w by blocks; then
    hidden is FP8 by tiles, with `hidden_scale` and `floor` as in `quantise`. Weights that a
    descriptor cannot describe are copied first. ValueError for anything else.
    """
    x_values, x_scale = values_and_scale(x)
    w, w_scale = values_and_scale(w_gate_up)
    given = (x_values, x_scale, w, w_scale, slots.visit)
    card = cards.card(_NAME, *(part for part in given if part is not None))
    _check(x, w_gate_up, slots, dtype, hidden_scale)
    P, (E, _, F, D) = len(slots.visit), w.shape
    hidden = empty((P, F), w) if x_scale is None else allocated((P, F), TILE, w.device)
    halves = torch.empty((P, 2, F), dtype=dtype, device=w.device) if keep else None
    if 0 in (P, F):
        return hidden, halves
    config = _config(slots, F, D, E, w.itemsize, card)
    tiles_m, tiles_n = P // config.BLOCK_M, ceil_div(F, config.PARTS * config.BLOCK_N)
    block = [1, 1, config.BLOCK_N, config.BLOCK_K]
    rows, w = as_read(x_values, card), as_read(w, card)
    out, out_scale = values_and_scale(hidden)
    with torch.cuda.device_of(w):  # Triton launches on the current GPU
        gated[(tiles_m * tiles_n,)](
            rows, x_scale, TensorDescriptor.from_tensor(w, block), w_scale,
            out if x_scale is None else stored(out, card.fp8), out_scale, halves,
            slots.visit, slots.expert, slots.place.numel(), slots.place.shape[1],
            tiles_m, P, F, D, rows.stride(0),
            *((0, 0) if x_scale is None else x_scale.stride()),
            *((0, 0, 0, 0) if w_scale is None else w_scale.stride()),
            out.stride(0), 2 * F, max(floor, SMALLEST), slots.size,
            config.BLOCK_M, config.BLOCK_N, config.BLOCK_K, config.PARTS, config.GROUP_M,
            KINDS[dtype], steps_of(torch.float32, hidden_scale), card.fp8,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return hidden, halves


def values_and_scale(x: Tensor | Scaled) -> tuple[Tensor, Tensor | None]:
    """Return what x holds; a tensor has no scales."""
    return (x, None) if isinstance(x, Tensor) else (x.values, x.scale)


def as_read(x: Tensor, card: Card) -> Tensor:
    """Return x in rows that a descriptor can describe; E4M3 as bytes on cards without FP8."""
    if x.itemsize > 1:
        return described(x)
    return stored(described(x.view(torch.uint8)).view(x.dtype), card.fp8)


def _config(slots: Slots, F: int, D: int, E: int, itemsize: int, card: Card) -> Up:
    shape = (slots.place.numel(), slots.size, E, F, D, itemsize)
    tuned = configs.find("moe_up.Up", shape, card)
    config = Up(**tuned) if tuned else rule_of_thumb(slots.size, itemsize, card)
    if not fits(config, slots.size, itemsize):
        raise ValueError(
            f"{_NAME}: tiles of {slots.size} slots of {itemsize} bytes cannot take {config}"
        )
    return config


def _check(
    x: Tensor | Scaled, w: Tensor | Scaled, slots: Slots, dtype: torch.dtype, hidden_scale
) -> None:
    (values, x_scale), (weights, w_scale) = values_and_scale(x), values_and_scale(w)
    if (x_scale is None) != (w_scale is None):
        raise ValueError(f"{_NAME}: x and the weights must both be FP8, or neither: quantise one")
    if values.ndim != 2 or weights.ndim != 4 or weights.shape[1] != 2:
        got = f"{list(values.shape)} and {list(weights.shape)}"
        raise ValueError(f"{_NAME}: x must be [BT, D] and the weights [E, 2, F, D], got {got}")
    wanted, got = (len(slots.place), weights.shape[-1]), tuple(values.shape)
    if got != wanted:
        raise ValueError(f"{_NAME}: x must be {wanted} beside slots and weights, got {got}")
    if dtype not in KINDS:
        raise ValueError(f"{_NAME}: dtype must be one of {tuple(KINDS)}, got {dtype}")
    if hidden_scale not in (None, "ue8m0"):
        raise ValueError(f"{_NAME}: hidden_scale must be None or 'ue8m0', got {hidden_scale!r}")
    check_operands(_NAME, x, w, slots, dtype)


def check_operands(
    kernel: str, x: Tensor | Scaled, w: Tensor | Scaled, slots: Slots, dtype: torch.dtype
) -> None:
    """Raise ValueError, naming the kernel, where rows and a stack of weights do not go together."""
    (values, x_scale), (weights, _) = values_and_scale(x), values_and_scale(w)
    if len(slots.start) != len(weights) + 1:
        got = f"{len(slots.start) - 1} and {len(weights)}: align the ids again"
        raise ValueError(f"{kernel}: slots and weights must be of as many experts, got {got}")
    want = dtype if x_scale is None else torch.float8_e4m3fn
    if {values.dtype, weights.dtype} != {want}:
        got = f"{values.dtype} and {weights.dtype}: cast or quantise them"
        raise ValueError(f"{kernel}: rows and weights must be {want}, got {got}")
    for name, part, group in (("rows", x, (1, DEPTH)), ("weights", w, (DEPTH, DEPTH))):
        if isinstance(part, Tensor):
            continue
        *batch, n, k = part.values.shape
        shape = [*batch, ceil_div(n, group[0]), ceil_div(k, group[1])]
        if [tuple(part.group), list(part.scale.shape)] != [group, shape]:
            got = f"{list(part.scale.shape)} by {tuple(part.group)}: quantise them so"
            raise ValueError(f"{kernel}: {name} must have scales {shape} by {group}, got {got}")
        if part.scale.dtype != torch.float32:
            got = part.scale.dtype
            raise ValueError(f"{kernel}: {name} must have scales in float32, got {got}: widen them")
