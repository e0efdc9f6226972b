"""Backward through the experts' hidden layer in one product: gradients of gate and up, and weights.

    u[p] = dy[token of p] W_down[e],    d_gate[p] = <u[p], hidden[p]>,    d_hidden[p] = gate[p] u[p]
    hidden = silu(g) up,    d_g and d_up from d_hidden by the derivative,    gated = gate hidden

W_down is as it was for the forward product, [D, F]: on Hopper the tensor cores take BF16 along
either axis. Rows of dy are gathered as they are read, no sorted copy of them is made; and the
gradient of a visit's weight needs no experts' outputs, so none wait for backward: u hidden = dy y.
A tile adds its part of that over its columns; a second kernel adds the parts in order.

Letters  M slots, N the hidden width F, K the model's width D, which is summed.
Memory   dy [tokens, K], w_down [E, K, N] and halves [M, 2, N] row-major, copied where they are not;
         parts FP32 [tiles of N, M].
Grid     tiles of slots x tiles of N, in stripes of GROUP_M as in tiles.place: an expert's tiles are
         neighbours and share its weights in the L2 cache. Tiles of no expert end at once.
Paper    SwiGLU, arXiv:2002.05202; DeepSeek-V3 (arXiv:2412.19437), Eq. 12.
Book     book/07_moe.ipynb
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from minids_kernels import cards, configs
from minids_kernels.cards import Card
from minids_kernels.slots import Slots
from minids_kernels.softmax import described, empty
from minids_kernels.tiles import by_four_warps, ceil_div, place

_NAME = "hidden_gradients"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_VISITS = 256  # whose parts one program adds up


class Hidden(NamedTuple):
    """How the product is cut; tiles of BLOCK_M slots, at most as many as an expert's tile has."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    COLUMNS: int  # of the tile that are differentiated at a time
    GROUP_M: int
    warps: int
    stages: int


CANDIDATES = (
    Hidden(128, 128, 64, 64, 8, warps=8, stages=4),
    Hidden(64, 128, 64, 64, 16, warps=4, stages=4),
    Hidden(16, 128, 64, 128, 16, warps=4, stages=4),
    Hidden(128, 256, 64, 32, 8, warps=8, stages=3),
    Hidden(64, 64, 16, 32, 16, warps=8, stages=3),
    Hidden(16, 64, 16, 64, 16, warps=4, stages=3),
)
_OF_REGISTERS = CANDIDATES[-2:]  # FP32, or where each warp multiplies out of registers


def rule_of_thumb(size: int, itemsize: int, card: Card) -> Hidden:
    """Return the largest tile that an expert's tile of slots holds whole times."""
    large = by_four_warps(card) and itemsize < 4
    possible = CANDIDATES[:-2] if large else _OF_REGISTERS
    return next(config for config in possible if size % config.BLOCK_M == 0)


@triton.jit
def halved(x):
    """Return the left and the right half of a tile; no number changes its thread."""
    pair = tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2))
    return tl.split(tl.permute(pair, (0, 2, 1)))


@triton.jit
def differentiate(sums, weight, filled, halves, d_halves, gated, m, n):
    """Write the gradients and gated rows of some columns; return <sums, hidden> by row."""
    shape: tl.constexpr = sums.shape
    g = halves.load([m, 0, n]).reshape(shape).to(tl.float32)
    up = halves.load([m, 1, n]).reshape(shape).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    silu = g * sigmoid
    hidden = (silu * up).to(gated.dtype).to(tl.float32)  # as forward rounded it
    hidden = tl.where(filled, hidden, 0.0)
    of_row = tl.sum(sums * hidden, 1)
    gated.store([m, n], (hidden * weight).to(gated.dtype))
    sums *= weight
    of_up = tl.where(filled, sums * silu, 0.0)
    d_halves.store([m, 1, n], of_up.to(gated.dtype).reshape(shape[0], 1, shape[1]))
    of_gate = tl.where(filled, sums * up * sigmoid * (1 + g * (1 - sigmoid)), 0.0)
    d_halves.store([m, 0, n], of_gate.to(gated.dtype).reshape(shape[0], 1, shape[1]))
    return of_row


@triton.jit
def take_apart(
    sums, weight, filled, halves, d_halves, gated, m, n,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Differentiate a tile, COLUMNS at a time: registers do not hold the factors of all of it."""
    if sums.shape[1] == COLUMNS:
        of_row = differentiate(sums, weight, filled, halves, d_halves, gated, m, n)
    else:
        left, right = halved(sums)
        of_row = take_apart(left, weight, filled, halves, d_halves, gated, m, n, COLUMNS)
        n += sums.shape[1] // 2
        of_row += take_apart(right, weight, filled, halves, d_halves, gated, m, n, COLUMNS)
    return of_row


@triton.jit(do_not_specialize=["V", "tiles_m"])
def hidden_backward(
    dy, w_desc, gate, halves, d_halves, gated, parts, visit, expert,
    V, tiles_m, M, N, K, dy_row, gate_row, gate_col,
    TOP: tl.constexpr, SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one tile; TOP experts were chosen by a token."""
    row, column = place(tl.program_id(0), tiles_m, tl.cdiv(N, BLOCK_N), GROUP_M)
    e = tl.load(expert + row * BLOCK_M // SIZE)
    if e >= 0:
        slots = row * BLOCK_M + tl.arange(0, BLOCK_M)
        visits = tl.load(visit + slots)
        filled = visits < V
        token = (visits // TOP).to(tl.int64)
        k = tl.arange(0, BLOCK_K)
        rows = dy + token[:, None] * dy_row + k[None, :]
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for begin in range(0, K, BLOCK_K):
            inside = filled[:, None] & (k < K - begin)[None, :]
            a = tl.load(rows, mask=inside, other=0.0)
            b = w_desc.load([e, begin, column * BLOCK_N]).reshape(BLOCK_K, BLOCK_N)
            sums = tl.dot(a, b, sums, input_precision="ieee")
            rows += BLOCK_K
        at = token * gate_row + visits % TOP * gate_col
        weight = tl.load(gate + at, mask=filled, other=0.0).to(tl.float32)
        of_row = take_apart(
            sums, weight[:, None], filled[:, None], halves, d_halves, gated,
            row * BLOCK_M, column * BLOCK_N, COLUMNS,
        )  # fmt: skip
        tl.store(parts + column.to(tl.int64) * M + slots, of_row, mask=filled)


@triton.jit(do_not_specialize=["V", "n_parts"])
def add_parts(parts, place, d_gate, V, n_parts, M, BLOCK: tl.constexpr):
    """Add the parts of each visit, the first columns first."""
    visits = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    parts += tl.load(place + visits, mask=visits < V, other=0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(n_parts):
        total += tl.load(parts, mask=visits < V, other=0.0)
        parts += M
    tl.store(d_gate + visits, total, mask=visits < V)


def hidden_gradients(
    dy: Tensor, w_down: Tensor, gate: Tensor, halves: Tensor, slots: Slots
) -> tuple[Tensor, Tensor, Tensor]:
    """Return d_halves [P, 2, F], the gated hidden rows [P, F], and d_gate [tokens, K] in FP32.

    dy [tokens, D], w_down [E, D, F] and halves [P, 2, F], gate then up, in one of DTYPES; the first
    two results are in it too, zero in empty slots of tiles that an expert owns and not written
    behind them. What w_down's gradient sums is dy times the gated rows. Raises ValueError for
    shapes that do not fit.
    """
    card = cards.card(_NAME, dy, w_down, gate, halves, slots.visit)
    _check(dy, w_down, gate, halves, slots)
    (n_tokens, top), (_, K, N), M = slots.place.shape, w_down.shape, len(slots.visit)
    d_halves, gated = empty((M, 2, N), dy), empty((M, N), dy)
    d_gate = torch.empty((n_tokens, top), dtype=torch.float32, device=dy.device)
    if 0 in (M, N, K):
        return d_halves.zero_(), gated.zero_(), d_gate.zero_()
    dy = described(dy)
    shape = (M, N, K, len(w_down), slots.size, dy.itemsize)
    tuned = configs.find("moe_hidden.Hidden", shape, card)
    config = Hidden(**tuned) if tuned else rule_of_thumb(slots.size, dy.itemsize, card)
    tiles_m, tiles_n = M // config.BLOCK_M, ceil_div(N, config.BLOCK_N)
    parts = torch.empty((tiles_n, M), dtype=torch.float32, device=dy.device)
    block, columns = [1, config.BLOCK_K, config.BLOCK_N], [config.BLOCK_M, 1, config.COLUMNS]
    with torch.cuda.device_of(dy):  # Triton launches on the current GPU
        hidden_backward[(tiles_m * tiles_n,)](
            dy, TensorDescriptor.from_tensor(described(w_down), block),
            gate, TensorDescriptor.from_tensor(described(halves), columns),
            TensorDescriptor.from_tensor(d_halves, columns),
            TensorDescriptor.from_tensor(gated, columns[::2]), parts, slots.visit, slots.expert,
            n_tokens * top, tiles_m, M, N, K, dy.stride(0), *gate.stride(), top, slots.size,
            config.BLOCK_M, config.BLOCK_N, config.BLOCK_K, config.COLUMNS, config.GROUP_M,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        add_parts[(ceil_div(n_tokens * top, _VISITS),)](
            parts, slots.place, d_gate, n_tokens * top, tiles_n, M, _VISITS, num_warps=4
        )
    return d_halves, gated, d_gate


def _check(dy: Tensor, w_down: Tensor, gate: Tensor, halves: Tensor, slots: Slots) -> None:
    if w_down.ndim != 3 or dy.ndim != 2:
        got = f"{list(dy.shape)} and {list(w_down.shape)}"
        raise ValueError(f"{_NAME}: dy must be a matrix, w_down one an expert, got {got}")
    (n_tokens, top), (_, D, F) = slots.place.shape, w_down.shape
    wanted = (
        ("dy", dy, (n_tokens, D)),
        ("gate", gate, (n_tokens, top)),
        ("halves", halves, (len(slots.visit), 2, F)),
    )
    for name, x, shape in wanted:
        if tuple(x.shape) != shape:
            got = tuple(x.shape)
            raise ValueError(f"{_NAME}: {name} must be {shape} beside w_down and slots, got {got}")
    kinds = {dy.dtype, w_down.dtype, halves.dtype}
    if len(kinds) > 1 or dy.dtype not in DTYPES:
        got = f"{dy.dtype}, {w_down.dtype} and {halves.dtype}"
        raise ValueError(
            f"{_NAME}: dy, w_down and halves must share one of {DTYPES}, got {got}: cast them"
        )
    if slots.size % 16:
        raise ValueError(f"{_NAME}: slots.size must be a multiple of 16, got {slots.size}")
