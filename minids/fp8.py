"""FP8 products: both operands in eight bits, scales by group, sums in FP32, forward and backward.

Paper   DeepSeek-V3 (arXiv:2412.19437), sections 3.3.1-3.3.3, Figures 6 and 7; App. B.2.
Dims    M rows (tokens), I and O widths of a weight, G and J groups, K the summed axis of a product.
Book    book/11_fp8.ipynb               Kernel  minids_kernels/fp8_matmul.py
Differs weights and gradients have no published floor of a scale: here only zeros are lifted.
        The E5M6 cache keeps the tile scales of the forward operand. Dense layers' SwiGLU is cached
        as the experts' (the report says it of MoE).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import pack, repeat, unpack
from jaxtyping import Float, Int
from torch import Tensor

from minids.config import Config
from minids.formats import cores
from minids.formats.bits import E4M3, E5M2, E5M6, Format, round_to
from minids.formats.groups import (
    ACTIVATION_FLOOR,
    BLOCK,
    COLUMN,
    TILE,
    Scaled,
    dequantise,
    quantise,
    quantise_twice,
    requantise,
    widen,
)
from minids.fused.swiglu import gated_backward, gated_quantise
from minids.impl import kernels

__all__ = [
    "AFTER_ATTENTION", "BLOCK", "COLUMN", "E4M3", "E5M2", "E5M6", "INTO_EXPERTS", "MOST",
    "OUT_OF_EXPERTS", "TILE", "Recipe", "Scaled", "dequantise",
    "gated_experts", "gated_linear", "linear", "quantise", "recipe", "scaled_matmul",
]  # fmt: skip
_DEPTH = TILE[1]  # N_C: products that are summed before their scale is applied


class Recipe(NamedTuple):
    """How one layer's three products are stored and computed; the defaults are most layers'."""

    scale_fmt: str | None = None  # of the weight's scales
    input_scale: str | None = None  # "ue8m0" behind attention and before experts (3.3.3)
    grad_scale: str | None = None  # of the output's gradient; "ue8m0" behind experts (3.3.3)
    cached: Format = E4M3  # how the input waits for backward; E5M6 behind attention (3.3.3)
    grad_group: tuple[int, int] = TILE  # of the input gradient; BLOCK diverged (App. B.2)
    impl: str = "torch"  # "triton": the same products and roundings by kernels


# the formats of section 3.3.3: powers of two where a tensor is grouped again or sent to experts
MOST = Recipe()
AFTER_ATTENTION = Recipe(input_scale="ue8m0", cached=E5M6)
INTO_EXPERTS, OUT_OF_EXPERTS = Recipe(input_scale="ue8m0"), Recipe(grad_scale="ue8m0")


def recipe(cfg: Config, special: Recipe = MOST) -> Recipe | None:
    """Return how a layer with these `special` roles is stored; None if `cfg` is not FP8.

    With `cfg.scale_fmt` "ue8m0" (V3.1) every scale is a power of two.
    """
    if cfg.precision != "fp8":
        return None
    if cfg.scale_fmt is None:
        return special
    return special._replace(scale_fmt="ue8m0", input_scale="ue8m0", grad_scale="ue8m0")


def scaled_matmul(
    a: Scaled, b: Scaled, dtype: torch.dtype = torch.float32, impl: str = "torch"
) -> Float[Tensor, "M N"]:
    """Return a b^T: each 128 products are summed, scaled, and added in FP32 (Figure 7b).

    Both operands are grouped by 128 along their last axis, ragged at its end. With "torch" on the
    tensor cores where torch offers it, else the same sum in FP32 by ordinary products.
    """
    if a.group[1] != _DEPTH or b.group[1] != _DEPTH or a.values.shape[-1] != b.values.shape[-1]:
        got = f"{list(a.values.shape)} by {a.group} and {list(b.values.shape)} by {b.group}"
        raise ValueError(f"operands must share a last axis in groups of {_DEPTH}, got {got}")
    if impl == "triton":
        return kernels().scaled_matmul(a, b, dtype)
    if cores.can_take(a, b):
        return cores.matmul(a, b, dtype)
    total = torch.zeros(len(a.values), len(b.values), device=a.values.device)
    parts = (a.values.split(_DEPTH, -1), b.values.split(_DEPTH, -1), a.scale.mT, b.scale.mT)
    for a_part, b_part, a_scale, b_scale in zip(*parts, strict=True):
        scale = _by_row(a_scale, a)[:, None] * _by_row(b_scale, b)
        total += F.linear(widen(a_part), widen(b_part)) * scale
    return total.to(dtype)


def _by_row(scale: Float[Tensor, " G"], x: Scaled) -> Float[Tensor, " rows"]:
    return repeat(scale, "g -> (g r)", r=x.group[0])[: len(x.values)]


def linear(
    x: Float[Tensor, "*shape I"], weight: Float[Tensor, "O I"], how: Recipe
) -> Float[Tensor, "*shape O"]:
    """Return W x, the product and both of its gradients in FP8 (Figure 6).

    Forward and input gradient group activations by tiles along the summed axis, weights by blocks;
    the weight gradient sums over tokens, so both of its operands are grouped again by 128 tokens.
    The output has autocast's dtype, or the input's; the weight's gradient is summed in FP32.
    """
    dtype = _output_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        return _Linear.apply(x, weight, how, dtype)  # pyright: ignore[reportReturnType]


def gated_linear(
    gate: Float[Tensor, "*shape I"],
    up: Float[Tensor, "*shape I"],
    weight: Float[Tensor, "O I"],
    how: Recipe,
) -> Float[Tensor, "*shape O"]:
    """Return W (silu(gate) * up) as `linear` does; only FP8 copies of gate and up wait (3.3.3)."""
    dtype = _output_dtype(gate)
    with torch.autocast(gate.device.type, enabled=False):
        return _GatedLinear.apply(gate, up, weight, how, dtype)  # pyright: ignore[reportReturnType]


def gated_experts(
    w_gate_up: Float[Tensor, "E 2 F D"],
    w_down: Float[Tensor, "E D F"],
    into: Recipe,
    out: Recipe,
    visits: Float[Tensor, "visits D"],
    load: Int[Tensor, " E"],
) -> Float[Tensor, "visits D"]:
    """Run each expert on its rows: groups of tokens, in its weights' gradients, end with them."""
    parts, y = (visits.split(load.tolist()), w_gate_up.unbind(0), w_down.unbind(0)), []
    for rows, halves, weight in zip(*parts, strict=True):
        if len(rows):
            gate, up = (linear(rows, half, into) for half in halves.unbind(0))
            y.append(gated_linear(gate, up, weight, out))
    return torch.cat(y)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, how, dtype):
        rows, ctx.shape = pack([x], "* i")
        tiles = quantise(rows, TILE, how.input_scale, ACTIVATION_FLOOR, how.impl)
        w, w_mT = quantise_twice(weight, BLOCK, BLOCK, how.scale_fmt, impl=how.impl)
        ctx.save_for_backward(*w_mT[:2], *_cached(rows, tiles, how)[:2])
        ctx.how, ctx.dtypes = how, (x.dtype, weight.dtype)
        return _unpack(scaled_matmul(tiles, w, dtype, how.impl), ctx.shape)

    @staticmethod
    def backward(ctx, *grads):
        how, (w_mT, cached) = ctx.how, _operands(ctx, BLOCK, TILE)
        dy, _ = pack([grads[0]], "* o")
        columns = requantise(cached, COLUMN, how.input_scale, impl=how.impl)
        dx, dw = gradients(dy, w_mT, columns, how, ctx.dtypes[0])
        return _unpack(dx, ctx.shape), dw.to(ctx.dtypes[1]), None, None


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, weight, how, dtype):
        rows, ctx.shape = pack([gate], "* i")
        formats = (how.input_scale, how.scale_fmt, ACTIVATION_FLOOR, how.impl)
        tiles, *halves = gated_quantise(rows, pack([up], "* i")[0], *formats)
        w, w_mT = quantise_twice(weight, BLOCK, BLOCK, how.scale_fmt, impl=how.impl)
        ctx.save_for_backward(*w_mT[:2], *(part for half in halves for part in half[:2]))
        ctx.how, ctx.dtypes = how, (gate.dtype, weight.dtype)
        return _unpack(scaled_matmul(tiles, w, dtype, how.impl), ctx.shape)

    @staticmethod
    def backward(ctx, *grads):
        how, (w_mT, *halves) = ctx.how, _operands(ctx, BLOCK, TILE, TILE)
        dy, _ = pack([grads[0]], "* o")
        rows, columns = quantise_twice(dy, how.grad_group, COLUMN, how.grad_scale, impl=how.impl)
        d_hidden = scaled_matmul(rows, w_mT, torch.float32, how.impl)
        gate, up = halves
        kinds = (how.input_scale, ctx.dtypes[0], how.impl)
        *halves, hidden = gated_backward(d_hidden, gate, up, *kinds)  # the product is made again
        dw = scaled_matmul(columns, hidden.mT, torch.float32, how.impl)
        dx = (_unpack(half, ctx.shape) for half in halves)
        return *dx, dw.to(ctx.dtypes[1]), None, None


def gradients(
    dy: Float[Tensor, "M O"], w_mT: Scaled, x: Scaled, how: Recipe, dtype: torch.dtype
) -> tuple[Float[Tensor, "M I"], Float[Tensor, "O I"]]:
    """Return dX = dY W and, in FP32, dW = dY^T X (Dgrad and Wgrad of Figure 6).

    Dgrad sums over outputs: tiles of dY, the blocks of the forward product turned. Wgrad sums over
    tokens: both of its operands are grouped by 128 tokens of one channel.
    """
    rows, columns = quantise_twice(dy, how.grad_group, COLUMN, how.grad_scale, impl=how.impl)
    dx = scaled_matmul(rows, w_mT, dtype, how.impl)
    return dx, scaled_matmul(columns, x.mT, torch.float32, how.impl)


def _cached(x: Float[Tensor, "M I"], tiles: Scaled, how: Recipe) -> Scaled:
    """Return what waits for backward: the operand itself, or more digits of it on its scales."""
    if how.cached == E4M3:
        return tiles
    finer = round_to(dequantise(Scaled(x, 1 / tiles.scale, TILE)), how.cached)
    return Scaled(finer.bfloat16(), tiles.scale, TILE)  # E5M6 fits into BF16


def _operands(ctx, *groups: tuple[int, int]) -> list[Scaled]:
    saved = ctx.saved_tensors
    pairs = zip(saved[::2], saved[1::2], groups, strict=True)
    return [Scaled(values, scale, group) for values, scale, group in pairs]


def _unpack(rows: Float[Tensor, "M I"], shape) -> Float[Tensor, "*shape I"]:
    return unpack(rows, shape, "* i")[0]


def _output_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
