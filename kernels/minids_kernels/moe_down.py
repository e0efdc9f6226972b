"""A product of many: each expert's slots times its own matrix, by tiles that know their expert.

    out[p] = w[e] a[p],   e the expert that owns slot p;   with `out` given: out[p] += w[e] a[p]

Serves experts' second layer and both gradients of inputs. Where a is FP8, each 128 products are
scaled by both operands' scales and added in FP32 (tiles.py). Tiles of 16 slots change sides with
the weight, as in moe_up.py; no slot's sum knows of others, so in tiles of one size its bits are
the same beside any.

Letters  P slots (slots.py), N rows of an expert's matrix, K the summed axis.
Memory   a [P, K] and w [E, N, K] by descriptors, whose offsets have 64 bits; w runs along K or, a
         transposed view, along N. out [P, N]. Rows of empty slots are whatever a's rows give, so
         zeros from zeros; nothing is written behind the last expert's.
Grid     P / BLOCK_M x N tiles, down GROUP_M tiles of slots, then to the right: an expert's tiles
         are neighbours and share its weights in the L2 cache. Tiles behind the end stop at once.
Paper    DeepSeek-V3 (arXiv:2412.19437), Eq. 12, section 3.3.2, Figures 6 and 7b.
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
from minids_kernels.fp8_matmul import put
from minids_kernels.moe_up import KINDS, as_read, check_operands, values_and_scale
from minids_kernels.scaled import Scaled
from minids_kernels.slots import Slots
from minids_kernels.softmax import describable
from minids_kernels.tiles import DEPTH, by_four_warps, ceil_div, place, scale_of_tile

_NAME = "rows_by_expert"
_SWAPPED = 16  # slots of a tile that changes sides with the weight


class Down(NamedTuple):
    """How the output is cut: tiles of BLOCK_M slots x BLOCK_N, BLOCK_K products at a time."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int  # 128 for FP8
    GROUP_M: int
    warps: int
    stages: int


CANDIDATES = (
    Down(128, 128, 128, 8, warps=8, stages=4),
    Down(64, 128, 128, 16, warps=4, stages=3),
    Down(64, 64, 128, 16, warps=4, stages=4),
    Down(16, 64, 128, 8, warps=4, stages=6),
    Down(16, 128, 128, 8, warps=4, stages=4),
    Down(16, 32, 128, 8, warps=4, stages=3),
    Down(64, 32, 128, 16, warps=4, stages=2),
    Down(128, 128, 64, 8, warps=8, stages=4),
    Down(64, 128, 64, 16, warps=4, stages=3),
    Down(16, 64, 64, 8, warps=4, stages=6),
    Down(64, 64, 32, 16, warps=4, stages=2),
    Down(32, 32, 32, 16, warps=4, stages=2),
    Down(16, 32, 32, 8, warps=4, stages=2),
)


def rule_of_thumb(size: int, itemsize: int, card: Card) -> Down:
    """Return tiles that spill nothing; small ones where each warp multiplies out of registers."""
    few = size == _SWAPPED
    if itemsize == 1:
        if not by_four_warps(card):
            return CANDIDATES[5 if few else 6]
        return CANDIDATES[3 if few else 0 if size == 128 else 1]
    if itemsize == 4:
        return CANDIDATES[12 if few else 11]
    if not by_four_warps(card):
        return CANDIDATES[12 if few else 10]
    return CANDIDATES[9 if few else 7 if size == 128 else 8]


def fits(config: Down, size: int, itemsize: int) -> bool:
    """Say whether tiles of slots hold whole tiles of this config, and its depth is the dtype's."""
    sides = (config.BLOCK_M == _SWAPPED) == (size == _SWAPPED) and config.BLOCK_M <= size
    deep = (config.BLOCK_K == DEPTH) == (itemsize == 1)
    return sides and deep and (itemsize < 4 or max(config[:3]) == 32)


@triton.jit(do_not_specialize=["tiles_m", "P"])
def by_expert(
    a_desc, a_scale, w_desc, w_scale, out, expert,
    tiles_m, P, N, K, a_row, a_k, w_e, w_row, w_k, out_row, out_col,
    SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, TURNED: tl.constexpr, ADD: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    SWAP: tl.constexpr = BLOCK_M == 16
    row, column = place(tl.program_id(0), tiles_m, tl.cdiv(N, BLOCK_N), GROUP_M)
    e = tl.load(expert + row * BLOCK_M // SIZE)
    if e < 0:
        return
    m, n = row * BLOCK_M, column * BLOCK_N
    if w_scale is not None:
        w_scale += e.to(tl.int64) * w_e
    if SWAP:
        sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(tl.cdiv(K, BLOCK_K)):
        a = a_desc.load([m, k * BLOCK_K])
        if TURNED:
            w = w_desc.load([e, k * BLOCK_K, n]).reshape(BLOCK_K, BLOCK_N).T
        else:
            w = w_desc.load([e, n, k * BLOCK_K]).reshape(BLOCK_N, BLOCK_K)
        if a_scale is None:
            if SWAP:
                sums = tl.dot(w, a.T, sums, input_precision="ieee")
            else:
                sums = tl.dot(a, w.T, sums, input_precision="ieee")
        else:
            a, w = in_dot(a, FP8), in_dot(w, FP8)
            if SWAP:
                scale = scale_of_tile(
                    w_scale, a_scale, n, m, N, P, w_row, a_row, BLOCK_N, BLOCK_M, 128, 1
                )
                sums += tl.dot(w, a.T) * scale
            else:
                scale = scale_of_tile(
                    a_scale, w_scale, m, n, P, N, a_row, w_row, BLOCK_M, BLOCK_N, 1, 128
                )
                sums += tl.dot(a, w.T) * scale
            a_scale += a_k
            w_scale += w_k
    if SWAP:
        put(out, sums.T, m, n, P, N, out_row, out_col, ADD)
    else:
        put(out, sums, m, n, P, N, out_row, out_col, ADD)


def rows_by_expert(
    a: Tensor | Scaled,
    w: Tensor | Scaled,
    slots: Slots,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Return each slot's row times its expert's matrix [P, N] in `dtype`.

    a [P, K] and w [E, N, K] are tensors of one dtype, or a is FP8 by tiles and w by blocks. `out`,
    where given, is added to in place, in FP32, and rounded to its dtype again. What a descriptor
    cannot describe is copied first. ValueError for anything else.
    """
    (rows, a_scale), (weights, w_scale) = values_and_scale(a), values_and_scale(w)
    given = (rows, a_scale, weights, w_scale, slots.expert, out)
    card = cards.card(_NAME, *(part for part in given if part is not None))
    _check(a, w, slots, dtype, out)
    (P, K), N = rows.shape, weights.shape[1]
    add = out is not None
    if out is None:
        out = torch.empty((P, N), dtype=dtype, device=rows.device)
    if 0 in (P, N, K):
        return out if add else out.zero_()
    config = _config(slots, N, K, len(weights), weights.itemsize, card)
    turned = w_scale is None and not describable(weights) and describable(weights.mT)
    weights = weights.mT if turned else weights
    sides = [config.BLOCK_K, config.BLOCK_N] if turned else [config.BLOCK_N, config.BLOCK_K]
    tiles_m, tiles_n = P // config.BLOCK_M, ceil_div(N, config.BLOCK_N)
    with torch.cuda.device_of(out):  # Triton launches on the current GPU
        by_expert[(tiles_m * tiles_n,)](
            TensorDescriptor.from_tensor(as_read(rows, card), [config.BLOCK_M, config.BLOCK_K]),
            a_scale, TensorDescriptor.from_tensor(as_read(weights, card), [1, *sides]), w_scale,
            out, slots.expert, tiles_m, P, N, K,
            *((0, 0) if a_scale is None else a_scale.stride()),
            *((0, 0, 0) if w_scale is None else w_scale.stride()), *out.stride(), slots.size,
            config.BLOCK_M, config.BLOCK_N, config.BLOCK_K, config.GROUP_M, turned, add, card.fp8,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return out


def _config(slots: Slots, N: int, K: int, E: int, itemsize: int, card: Card) -> Down:
    shape = (slots.place.numel(), slots.size, E, N, K, itemsize)
    tuned = configs.find("moe_down.Down", shape, card)
    config = Down(**tuned) if tuned else rule_of_thumb(slots.size, itemsize, card)
    if not fits(config, slots.size, itemsize):
        raise ValueError(
            f"{_NAME}: tiles of {slots.size} slots of {itemsize} bytes cannot take {config}"
        )
    return config


def _check(
    a: Tensor | Scaled, w: Tensor | Scaled, slots: Slots, dtype: torch.dtype, out: Tensor | None
) -> None:
    (rows, a_scale), (weights, w_scale) = values_and_scale(a), values_and_scale(w)
    if (a_scale is None) != (w_scale is None):
        raise ValueError(f"{_NAME}: a and w must both be FP8, or neither: quantise one")
    if rows.ndim != 2 or weights.ndim != 3 or rows.shape[1] != weights.shape[2]:
        got = f"{list(rows.shape)} and {list(weights.shape)}"
        raise ValueError(f"{_NAME}: a must be [P, K] and w [E, N, K], got {got}")
    if len(rows) != len(slots.visit):
        got = f"{len(rows)} and {len(slots.visit)}"
        raise ValueError(f"{_NAME}: a must have a row a slot, got {got}")
    for name, kind in (("dtype", dtype), ("a", rows.dtype if a_scale is None else dtype)):
        if kind not in KINDS:
            raise ValueError(f"{_NAME}: {name} must be one of {tuple(KINDS)}, got {kind}: cast it")
    check_operands(_NAME, a, w, slots, rows.dtype)
    shape = (len(rows), weights.shape[1])
    if out is not None and (tuple(out.shape) != shape or out.dtype != dtype):
        got = f"{tuple(out.shape)} in {out.dtype}"
        raise ValueError(f"{_NAME}: out must be {shape} in {dtype}, as dtype, got {got}")
