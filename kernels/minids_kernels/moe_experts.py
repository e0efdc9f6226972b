"""Routed experts from end to end: slots, two grouped products, results gathered; all gradients.

    y[t] = sum over k of gate[t, k] W_down[e] (silu(g) up),    g, up = W_gate_up[e] x[t]

with e = ids[t, k]; align -> up -> rows_by_expert -> combine, each in its file moe_*.py.

`run_experts` in BF16, FP16 or FP32 keeps x, the weights and gate and up for backward, which needs
no experts' outputs: hidden_gradients -> rows_by_expert -> combine, and grad_by_expert twice.

`train_experts` computes all products in FP8 as Figure 6 has it. The weights' turned copies wait in
FP8, and x by tokens, gate and up by slots; and y [P, D] in the dtype of the result: a visit's
weight has the gradient <dy, y>, and FP8 copies would not give the same y again. In BF16 at V3's
widths y is three quarters of what waits a slot.

Nothing waits for the GPU: grids are upper bounds, tiles that no expert owns end at once.

Letters  as in minids: BT tokens, D width, E experts, K experts a token, F expert width; P slots.
Grid     none: this file holds no kernel.
Paper    DeepSeek-V3 (arXiv:2412.19437), Eqs. 12-14, sections 3.3.1-3.3.3.
Book     book/07_moe.ipynb, book/11_fp8.ipynb
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minids_kernels import cards
from minids_kernels.ffn_swiglu import gated_backward
from minids_kernels.fp8_quantise import BLOCK, COLUMN, TILE, quantise, quantise_twice
from minids_kernels.moe_align import align, size_for
from minids_kernels.moe_combine import combine, spread
from minids_kernels.moe_down import rows_by_expert
from minids_kernels.moe_hidden import hidden_gradients
from minids_kernels.moe_up import up
from minids_kernels.moe_wgrad import columns, grad_by_expert, write_gradient
from minids_kernels.scaled import Scaled
from minids_kernels.slots import Slots
from minids_kernels.tiles import DEPTH

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ACTIVATION_FLOOR = 1e-4  # least max-abs of an activation's tile, as in minids.formats.groups


def run_experts(x: Tensor, gate: Tensor, ids: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """Return what each token's experts make of it, weighted and added [BT, D]; differentiable.

    All is computed in one of DTYPES: autocast's, else the one that x and weights have in common;
    sums, also of backward, in FP32. The weights of visits are not rounded to it. Raises ValueError
    for shapes that do not fit.
    """
    name = "run_experts"
    card = cards.card(name, x, gate, ids, w_gate_up, w_down)
    _check(name, x, gate, ids, w_gate_up, w_down)
    dtype = _common((x, w_gate_up, w_down))
    if not ids.numel():
        return x.to(dtype)
    weights = w_gate_up.to(dtype), w_down.to(dtype)
    differentiable = torch.is_grad_enabled() and any(
        part.requires_grad for part in (x, gate, *weights)
    )
    (n_tokens, k), E = ids.shape, len(w_down)
    size = size_for(n_tokens, k, E, differentiable, card)
    return _Experts.apply(x.to(dtype), gate, ids, *weights, size, differentiable)


def run_scaled_experts(
    x: Tensor,
    gate: Tensor,
    ids: Tensor,
    w_gate_up: Scaled,
    w_down: Scaled,
    input_scale: str | None = None,
    hidden_scale: str | None = None,
) -> Tensor:
    """Run experts whose weights [E 2 F D] and [E D F] are FP8 blocks; forward only.

    Inputs and hidden rows are quantised by tiles, `input_scale` and `hidden_scale` "ue8m0" by
    powers of two; gate, up and results have the input's dtype. Hidden rows are quantised as they
    are in FP32. Raises ValueError for shapes that do not fit.
    """
    name = "run_scaled_experts"
    card = cards.card(name, x, gate, ids, *w_gate_up[:2], *w_down[:2])
    _check(name, x, gate, ids, w_gate_up.values, w_down.values)
    if not ids.numel():
        return torch.empty_like(x)
    (n_tokens, k), E = ids.shape, len(w_down.values)
    slots = align(ids, E, size_for(n_tokens, k, E, False, card))
    tiles = quantise(x, TILE, input_scale, ACTIVATION_FLOOR)
    hidden, _ = up(tiles, slots, w_gate_up, x.dtype, hidden_scale, ACTIVATION_FLOOR)
    return combine(rows_by_expert(hidden, w_down, slots, x.dtype), gate, slots)


def train_experts(
    x: Tensor, gate: Tensor, ids: Tensor, w_gate_up: Tensor, w_down: Tensor, into: Any, out: Any
) -> Tensor:
    """Run experts, all products of them and of their gradients in FP8 (Figure 6).

    `into` and `out` are minids.fp8.Recipe, of the products into and out of the hidden layer. The
    result has autocast's dtype, or x's; gradients have their tensors'. Raises ValueError for shapes
    that do not fit, and for inputs that are to wait in more digits than E4M3 has.
    """
    name = "train_experts"
    cards.card(name, x, gate, ids, w_gate_up, w_down)
    _check(name, x, gate, ids, w_gate_up, w_down)
    if into.cached.name != "E4M3":
        got = f"{into.cached.name}: choose impl='torch'"
        raise ValueError(f"{name}: the input of experts must wait in E4M3, got into.cached {got}")
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    if not ids.numel():
        return x.to(dtype)
    return _ScaledExperts.apply(x, gate, ids, w_gate_up, w_down, into, out, dtype)


class _Experts(torch.autograd.Function):
    """Keep the inputs, and gate and up of every slot."""

    @staticmethod
    def forward(ctx, x, gate, ids, w_gate_up, w_down, size, keep):
        slots = align(ids, len(w_down), size)
        hidden, halves = up(x, slots, w_gate_up, x.dtype, keep=keep)
        if keep:
            ctx.save_for_backward(x, gate, w_gate_up, w_down, halves, *slots[:4])
            ctx.size = size
        return combine(rows_by_expert(hidden, w_down, slots, x.dtype), gate, slots)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, gate, w_gate_up, w_down, halves, *parts = ctx.saved_tensors
        slots = Slots._make((*parts, ctx.size))
        of_x, of_gate, _, of_into, of_out, *_ = ctx.needs_input_grad
        dy = dy.contiguous()  # that of a sum is one number for all
        d_halves, gated, d_gate = hidden_gradients(dy, w_down, gate, halves, slots)
        d_halves, tokens = d_halves.flatten(1), _tokens(slots)
        dx = d_into = d_out = None
        if of_x:
            w = w_gate_up.flatten(1, 2).mT
            dx = combine(rows_by_expert(d_halves, w, slots, x.dtype), None, slots)
        if of_into:
            d_into = grad_by_expert(d_halves, x, slots, x.dtype, x_rows=tokens)
            d_into = d_into.view(w_gate_up.shape)
        if of_out:
            d_out = grad_by_expert(dy, gated, slots, x.dtype, dy_rows=tokens)
        return dx, d_gate.to(gate.dtype) if of_gate else None, None, d_into, d_out, None, None


class _ScaledExperts(torch.autograd.Function):
    """Keep x, gate, up and the turned weights in FP8, and what experts gave."""

    @staticmethod
    def forward(ctx, x, gate, ids, w_gate_up, w_down, into, out, dtype):
        slots = align(ids, len(w_down), DEPTH)
        tiles = quantise(x, TILE, into.input_scale, ACTIVATION_FLOOR)
        w_into, w_into_mT = quantise_twice(w_gate_up, BLOCK, BLOCK, into.scale_fmt)
        hidden, halves = up(tiles, slots, w_into, dtype, out.input_scale, ACTIVATION_FLOOR, True)
        del w_into  # before the other weights take their memory
        w_out, w_out_mT = quantise_twice(w_down, BLOCK, BLOCK, out.scale_fmt)
        y = rows_by_expert(hidden, w_out, slots, dtype)
        assert halves is not None, "they were to be kept"
        kept = quantise(halves.flatten(0, 1), TILE, out.scale_fmt)  # gate and up take turns
        pairs = (part for q in (tiles, kept, w_into_mT, w_out_mT) for part in q[:2])
        ctx.save_for_backward(gate, y, *slots[:4], *pairs)
        ctx.recipes, ctx.dtypes = (into, out), (x.dtype, w_gate_up.dtype, w_down.dtype)
        return combine(y, gate, slots)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, y, *rest = ctx.saved_tensors
        slots, (into, out), dtypes = Slots._make((*rest[:4], DEPTH)), ctx.recipes, ctx.dtypes
        pairs = zip(rest[4::2], rest[5::2], (TILE, TILE, BLOCK, BLOCK), strict=True)
        tiles, halves, w_into_mT, w_out_mT = map(Scaled._make, pairs)
        d_y, d_gate = spread(dy, y, gate, slots)
        assert d_gate is not None, "y was given"
        rows, d_columns = quantise_twice(d_y, out.grad_group, COLUMN, out.grad_scale)
        d_hidden = rows_by_expert(_by_tiles(rows), w_out_mT, slots, torch.float32)
        of_gate, of_up = (_every_second(halves, n) for n in (0, 1))
        *d_halves, hidden = gated_backward(d_hidden, of_gate, of_up, out.input_scale, dy.dtype)
        d_out = grad_by_expert(d_columns, hidden.mT, slots, dtypes[2])
        x_columns = columns(tiles, _tokens(slots), slots, into.input_scale)
        E, _, D, F = w_into_mT.values.shape
        d_into = torch.empty((E, 2, F, D), dtype=dtypes[1], device=dy.device)
        d_rows = None
        for n, d_half in enumerate(d_halves):
            rows, d_columns = quantise_twice(d_half, into.grad_group, COLUMN, into.grad_scale)
            w = Scaled(w_into_mT.values[:, n], w_into_mT.scale[:, n], BLOCK)
            d_rows = rows_by_expert(_by_tiles(rows), w, slots, dtypes[0], d_rows)
            write_gradient(d_columns, x_columns, slots, d_into[:, n])
        assert d_rows is not None, "there are two halves"
        dx = combine(d_rows, None, slots)
        return dx, d_gate.to(gate.dtype), None, d_into, d_out, None, None, None


def _tokens(slots: Slots) -> Tensor:
    """Return whose row stands in each slot; the number of tokens where it is empty."""
    return slots.visit // slots.place.shape[1]


def _every_second(x: Scaled, first: int) -> Scaled:
    return Scaled(x.values[first::2], x.scale[first::2], x.group)


def _by_tiles(x: Scaled) -> Scaled:
    """Return a matrix by tiles that is by tiles or by blocks: each row of a block has its scale."""
    if x.group == TILE:
        return x
    return Scaled(x.values, x.scale.mT.repeat_interleave(DEPTH, 1).mT, TILE)


def _common(parts: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype to compute in: autocast's where it is on, as for a product in torch."""
    if torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return reduce(torch.promote_types, (part.dtype for part in parts))


def _check(
    name: str, x: Tensor, gate: Tensor, ids: Tensor, w_gate_up: Tensor, w_down: Tensor
) -> None:
    if w_down.ndim != 3 or x.ndim != 2 or ids.ndim != 2:
        got = f"{list(x.shape)}, {list(ids.shape)} and {list(w_down.shape)}"
        raise ValueError(f"{name}: x, ids and w_down must be [BT D], [BT K] and [E D F], got {got}")
    (E, D, F), (BT, K) = w_down.shape, ids.shape
    wanted = (("x", x, (BT, D)), ("gate", gate, (BT, K)), ("w_gate_up", w_gate_up, (E, 2, F, D)))
    for what, part, shape in wanted:
        if tuple(part.shape) != shape:
            got = tuple(part.shape)
            raise ValueError(f"{name}: {what} must be {shape} beside ids and w_down, got {got}")
    for what, part in (("x", x), ("gate", gate)):
        if part.dtype not in DTYPES:
            raise ValueError(f"{name}: {what} must be one of {DTYPES}, got {part.dtype}: cast it")
