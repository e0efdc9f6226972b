"""Are a layer's gradients right: matrices, and some experts, on the inputs and gradients they had.

Backward of the whole layer by torch would need all of its memory twice. So inputs, and gradients
behind, of its parts are kept while the layer runs by kernels; each part's own gradients are then
computed again by torch: of a matrix at once, of routed experts one at a time, on the rows of the
tokens that chose it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minids import fp8
from minids.linear import Linear
from minids.moe import Experts
from minids_kernels.bench.attention import Gap, ends
from minids_kernels.bench.case import Verdict

# relative norm: FP8 operands are the same codes but where a sum moved by an ulp; rounded to BF16
LIMIT = 1e-2
_EXPERTS = 2  # compared: the first and the last ones that have tokens


class Seen(NamedTuple):
    """What went through one part."""

    name: str
    module: nn.Module
    inputs: tuple
    gradient: Tensor  # of its output


def are_right(prepare: Callable[..., Any], result: tuple, x: Tensor, dy: Tensor) -> Verdict:
    """Run once more, watched; the results must be the timed ones, bit by bit."""
    run = prepare(x, dy)
    seen: list[Seen] = []
    hooks = [
        module.register_forward_hook(partial(_noted, seen, name))
        for name, module in run.stack.blocks.named_modules()
        if isinstance(module, Experts) or (isinstance(module, Linear) and module.recipe)
    ]
    try:
        again = run()
    finally:
        for hook in hooks:
            hook.remove()
    if not all(map(torch.equal, again, result)):
        return Verdict("two runs on the same input differ", False)
    gap = Gap()
    for part in seen:
        compare = _experts if isinstance(part.module, Experts) else _matrix
        compare(gap, part)
    return gap.judge(LIMIT)


def _noted(seen: list[Seen], name: str, module: nn.Module, given: tuple, y: Tensor) -> None:
    inputs = tuple(part.detach() for part in given)
    y.register_hook(lambda gradient: seen.append(Seen(name, module, inputs, gradient)))


def _matrix(gap: Gap, part: Seen) -> None:
    linear = part.module
    assert isinstance(linear, Linear), "watched as one"
    assert linear.recipe is not None, "it trains in FP8"
    w = linear.weight.detach().requires_grad_()
    y = fp8.linear(part.inputs[0], w, linear.recipe._replace(impl="torch"))
    _add(gap, part.name, linear.weight, torch.autograd.grad(y, w, part.gradient)[0])


def _experts(gap: Gap, part: Seen) -> None:
    (x, gate, ids), experts = part.inputs, part.module
    assert isinstance(experts, Experts), "watched as one"
    into, out = experts.recipes
    assert into is not None, "they train in FP8"
    assert out is not None, "they train in FP8"
    busy = ids.unique().tolist()
    for e in (busy[n] for n in ends(len(busy), _EXPERTS // 2)):
        tokens, k = (ids == e).nonzero(as_tuple=True)
        dy = (gate[tokens, k, None] * part.gradient[tokens].float()).to(part.gradient.dtype)
        parts = [w[e : e + 1].detach().requires_grad_() for w in experts.parameters()]
        load = torch.tensor([len(tokens)], device=ids.device)
        y = fp8.gated_experts(parts[0], parts[1], into, out, x[tokens], load)
        for (name, w), dw in zip(
            experts.named_parameters(), torch.autograd.grad(y, parts, dy), strict=True
        ):
            _add(gap, f"{part.name}.{name}[{e}]", w, dw[0], e)


def _add(gap: Gap, name: str, weight: Tensor, exact: Tensor, at: int | None = None) -> None:
    assert weight.grad is not None, f"{name} got no gradient"
    gap.add(name, weight.grad if at is None else weight.grad[at], exact.double())
