"""Routed experts for their jobs: tokens, the experts that they chose, weights; sides; checks.

Weights are drawn for each case and shared by its sides: copies of 11 or 23 GB would not fit.
"""

from collections.abc import Callable
from functools import cache, cached_property, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from minids.experts import grouped
from minids.formats.groups import ACTIVATION_FLOOR, BLOCK, TILE, Scaled, dequantise, quantise
from minids.fused.swiglu import swiglu
from minids_kernels.bench import checks
from minids_kernels.bench.attention import Gap, ends
from minids_kernels.bench.case import Call, Verdict
from minids_kernels.bench.layer_parts import drawn as drawn_blocks
from minids_kernels.bench.shapes import Experts

# relative norms. Gate, up, hidden rows, results, and gradients behind, are each rounded to BF16.
# Who rounds hidden rows to it before quantising them has a neighbour's code in 20, by 2^-4 each
BF16_ERROR, FP8_ERROR = 8e-3, 2.5e-2
_TOKENS, _EXPERTS = 8, 1  # compared at either end
_STD = 0.02  # of weights


class Routed(NamedTuple):
    """Tokens, and where they go."""

    x: Tensor  # [BT, D]
    gate: Tensor  # [BT, K]
    ids: Tensor  # [BT, K]


class Blocks:
    """Weights in FP8 blocks; in BF16 too, once someone asks."""

    def __init__(self, sizes: Experts, device: str):
        dim, hidden, n_experts, _ = sizes
        shapes = (n_experts, 2, hidden, dim), (n_experts, dim, hidden)
        self.gate_up, self.down = (
            drawn_blocks(torch.Size(shape), _STD, device, "torch") for shape in shapes
        )

    @cached_property
    def wide(self) -> "Wide":
        """The same weights in BF16, a matrix at a time."""
        return Wide(*(_widened(stack) for stack in (self.gate_up, self.down)))


class Wide:
    """Weights in BF16."""

    def __init__(self, gate_up: Tensor, down: Tensor):
        self.gate_up, self.down = gate_up, down


def _widened(stack: Scaled) -> Tensor:
    wide = torch.empty(stack.values.shape, dtype=torch.bfloat16, device=stack.values.device)
    parts = zip(stack.values.flatten(0, -3), stack.scale.flatten(0, -3), wide.flatten(0, -3),
                strict=True)  # fmt: skip
    for values, scale, out in parts:
        out.copy_(dequantise(Scaled(values, scale, stack.group), torch.bfloat16))
    return wide


@cache
def chosen(tokens: int, sizes: Experts) -> Tensor:
    """Return which experts each token chooses, evenly by chance; known before there is a GPU."""
    generator = torch.Generator().manual_seed(tokens)
    scores = torch.rand(tokens, sizes.experts, generator=generator)
    return scores.topk(sizes.k, dim=-1).indices


def active(tokens: int, sizes: Experts) -> int:
    """Return how many experts these tokens choose."""
    return len(chosen(tokens, sizes).unique())


def routed(tokens: int, sizes: Experts, device: str) -> Routed:
    """Draw tokens and their weights for the experts that they choose."""
    x = torch.randn(tokens, sizes.dim, device=device).bfloat16()
    gate = torch.rand(tokens, sizes.k, device=device)
    return Routed(x, gate / gate.sum(-1, keepdim=True), chosen(tokens, sizes).to(device))


def wide_weights(sizes: Experts, device: str) -> Wide:
    """Draw weights in BF16."""
    dim, hidden, n_experts, _ = sizes

    def one(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0.0, _STD)

    return Wide(one(n_experts, 2, hidden, dim), one(n_experts, dim, hidden))


# Sides


def by_grouped_mm(x: Tensor, gate: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Rows sorted by expert, torch's grouped product twice, results added up: nothing waits."""
    run = partial(_grouped, rearrange(gate_up, "e two f d -> e d (two f)"), down.mT)
    n_experts, order = len(down), ids.flatten().argsort(stable=True)
    load = torch.zeros(n_experts, dtype=torch.int32, device=ids.device)
    load.scatter_add_(0, ids.flatten(), torch.ones_like(ids.flatten(), dtype=torch.int32))
    place = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=ids.device))
    y = run(F.embedding(order // ids.shape[-1], x), load.cumsum(0).int())
    visits = y[place].unflatten(0, ids.shape)
    return (visits.float() * gate[..., None]).sum(1).to(x.dtype)


def _grouped(into: Tensor, out: Tensor, rows: Tensor, ends_of: Tensor) -> Tensor:
    halves = F.grouped_mm(rows, into, offs=ends_of)
    gate, up = halves.chunk(2, dim=-1)
    return F.grouped_mm(swiglu(gate, up), out, offs=ends_of)


def calls(function: Callable[..., Any], of: Routed, *weights: Any) -> Call:
    """Call a function of tokens and matrices."""
    return partial(function, *of, *weights)


def calls_wide(function: Callable[..., Any], of: Routed, weights: Wide) -> Call:
    """The same, of matrices in BF16."""
    return calls(function, of, weights.gate_up, weights.down)


def trained(
    function: Callable[..., Tensor], of: Routed, weights: Wide, dy: Tensor, compiled: bool = False
) -> Call:
    """Forward, then backward to tokens, their weights, and all matrices."""
    run = torch.compile(function, dynamic=False) if compiled else function

    def both() -> tuple[Tensor, ...]:
        given = (of.x, of.gate, weights.gate_up, weights.down)
        x, gate, *matrices = (part.detach().requires_grad_() for part in given)
        y = run(x, gate, of.ids, *matrices)
        return y.detach(), *torch.autograd.grad(y, (x, gate, *matrices), dy)

    return both


# Results


def scaled_is_near(result: Tensor, of: Routed, weights: Blocks) -> Verdict:
    """Compare some tokens with experts that quantise in FP64, or with ones that do not at all.

    The error is that against the second: what FP8 costs, which products in BF16 do not pay.
    """
    gap, plain = Gap(), Gap()
    for t in ends(len(of.x), _TOKENS):
        x, gate = of.x[t][None], of.gate[t].double()
        each = [_by_blocks(x, weights, e) for e in of.ids[t].tolist()]
        quantised, exact = (gate @ torch.cat(parts) for parts in zip(*each, strict=True))
        gap.add("y", result[t], quantised)
        plain.add("y", result[t], exact)
    verdict, exact = gap.judge(FP8_ERROR), plain.judge(BF16_ERROR)
    return exact if exact.right else verdict._replace(error=exact.error)


def _by_blocks(x: Tensor, weights: Blocks, e: int) -> tuple[Tensor, Tensor]:
    """Return what an expert makes of x: inputs and hidden rows quantised by tiles, or not."""
    into, out = (
        checks.exact(Scaled(w.values[e].flatten(0, -2), w.scale[e].flatten(0, -2), BLOCK))
        for w in (weights.gate_up, weights.down)
    )
    tiles = checks.exact(quantise(x, TILE, None, ACTIVATION_FLOOR))
    gate, up = (tiles @ into.mT).to(x.dtype).float().chunk(2, dim=-1)
    hidden = checks.exact(quantise(swiglu(gate, up), TILE, None, ACTIVATION_FLOOR))
    gate, up = (x.double() @ into.mT).chunk(2, dim=-1)
    return hidden @ out.mT, swiglu(gate, up) @ out.mT


def is_near(result: Tensor, of: Routed, weights: Wide) -> Verdict:
    """Compare some tokens with FP64."""
    gap = Gap()
    _compare_tokens(gap, result, None, of, weights, None)
    return gap.judge(BF16_ERROR)


def gradients_are_near(result: tuple, of: Routed, weights: Wide, dy: Tensor) -> Verdict:
    """Compare some tokens, their gradients and those of some experts with FP64."""
    y, dx, d_gate, d_gate_up, d_down = result
    gap = Gap()
    _compare_tokens(gap, y, (dx, d_gate), of, weights, dy)
    busy = of.ids.unique().tolist()
    for e in (busy[n] for n in ends(len(busy), _EXPERTS)):
        tokens, k = (of.ids == e).nonzero(as_tuple=True)
        matrices = [w[e].double().requires_grad_() for w in (weights.gate_up, weights.down)]
        y = grouped.run_expert(of.x[tokens].double(), *matrices)
        weight = of.gate[tokens, k, None].double()
        exact = torch.autograd.grad(y, matrices, weight * dy[tokens].double())
        gap.add("gate and up", d_gate_up[e], exact[0])
        gap.add("down", d_down[e], exact[1])
    return gap.judge(BF16_ERROR)


def _compare_tokens(
    gap: Gap, y: Tensor, gradients: tuple[Tensor, Tensor] | None, of: Routed, weights: Wide,
    dy: Tensor | None,
) -> None:  # fmt: skip
    for t in ends(len(of.x), _TOKENS):
        x, gate = (part[t].double().requires_grad_() for part in (of.x, of.gate))
        each = [grouped.run_expert(x[None], weights.gate_up[e].double(), weights.down[e].double())
                for e in of.ids[t].tolist()]  # fmt: skip
        exact = gate @ torch.cat(each)
        gap.add("y", y[t], exact.detach())
        if gradients is not None and dy is not None:
            wanted = torch.autograd.grad(exact, (x, gate), dy[t].double())
            for name, found, want in zip(("x", "gate"), gradients, wanted, strict=True):
                gap.add(f"gradient of {name}", found[t], want)
