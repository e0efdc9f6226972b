"""Is a whole layer right: every part of it, on the input that it had, against torch's reference.

A layer's own result says little: what one part rounds otherwise the next one rounds again. So the
parts are watched while the layer runs by kernels, and each is then computed once more by torch from
the same input, heads or rows at a time where all at once would not fit.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minids import ffn, mla
from minids.impl import use
from minids.linear import Linear
from minids.moe import Experts
from minids.norm import RMSNorm
from minids.router import Router
from minids.serve.pages import Pages
from minids_kernels.bench.attention import Gap
from minids_kernels.bench.case import Verdict
from minids_kernels.bench.layer_parts import Stored, StoredExperts

# relative norms. Rounding to BF16 gives 1.7e-3. Of one step both round the result, mostly alike;
# torch rounds within SwiGLU, and up to eight times within experts, where kernels do once.
# Experts on FP8 have a quantisation inside, of hidden rows that torch rounds to BF16 before and
# kernels do not: 3 % of the codes come out next to each other, 2^-3 to 2^-4 apart: 1.6e-2.
# Attention as its own job has it. A whole layer's result by torch has all of that behind it.
ROUNDED, OFTEN, REQUANTISED, ATTENDED, WHOLE = 3e-3, 6e-3, 2.5e-2, 4e-3, 5e-2
LIMITS = {StoredExperts: REQUANTISED, Experts: OFTEN}
_HEADS, _ROWS = 16, 8  # of attention's reference at a time


class Part(NamedTuple):
    """One call that a layer made: again by torch, what kernels gave, how near it must be."""

    name: str
    again: Callable[[], Any]
    result: Any
    limit: float


@contextmanager
def watched(layer: nn.Module) -> Iterator[list[Part]]:
    """Collect the parts of a layer's passes: its leaves, and the functions between them."""
    parts: list[Part] = []
    leaves = (RMSNorm, Router, Experts, StoredExperts, Stored, Linear)
    hooks = [
        module.register_forward_hook(partial(_noted, parts, name))
        for name, module in layer.named_modules()
        if isinstance(module, leaves)
    ]
    places = [(mla, "attend_expanded"), (mla, "attend_latent"), (mla, "rotate"), (ffn, "swiglu")]
    originals = [(place, name, getattr(place, name)) for place, name in places]
    for place, name, function in originals:
        setattr(place, name, partial(_watched, parts, name, function))
    try:
        yield parts
    finally:
        for hook in hooks:
            hook.remove()
        for place, name, function in originals:
            setattr(place, name, function)


def _noted(parts: list[Part], name: str, module: nn.Module, given: tuple, result: Any) -> None:
    limit = LIMITS.get(type(module), ROUNDED)
    parts.append(Part(name, partial(_leaf_by_torch, module, *given), result, limit))


def _watched(parts: list[Part], name: str, function: Callable, *given: Any) -> Any:
    result = function(*given)
    *inputs, impl = given
    assert impl == "triton", f"{name} was not computed by a kernel"
    again = {"attend_expanded": _by_heads, "attend_latent": _by_rows}.get(name, _at_once)
    limit = {"rotate": ROUNDED, "swiglu": OFTEN}.get(name, ATTENDED)
    parts.append(Part(name, partial(again, function, *inputs), result, limit))
    return result


def _leaf_by_torch(module: nn.Module, *given: Any) -> Any:
    """Call a leaf as torch computes it, then leave it as it was."""
    switch(module, "torch")
    try:
        return module(*given)
    finally:
        switch(module, "triton")


def switch(model: nn.Module, impl: str) -> None:
    """Let all parts compute with `impl`, stored ones too."""
    use(model, impl)
    for module in model.modules():
        if isinstance(module, Stored | StoredExperts):
            module.impl = impl


def _at_once(function: Callable, *given: Any) -> Any:
    return function(*given, "torch")


def _by_heads(function: Callable, q_nope, q_rope, k_nope, k_rope, v, mask, scale) -> Tensor:
    """Attend some heads at a time: torch's scores of all would be gigabytes."""
    parts = zip(*(x.split(_HEADS, dim=2) for x in (q_nope, q_rope, k_nope, v)), strict=True)
    done = [function(q, r, k, k_rope, v, mask, scale, "torch") for q, r, k, v in parts]
    return torch.cat(done, dim=2)


def _by_rows(function: Callable, q_latent, q_rope, held: Pages, mask, scale) -> Tensor:
    """Attend some rows of a batch at a time."""
    parts = zip(*(x.split(_ROWS) for x in (q_latent, q_rope, *held[1:])), strict=True)
    return torch.cat([
        function(q, r, Pages(held.store, table, lengths), mask, scale, "torch")
        for q, r, table, lengths in parts
    ])  # fmt: skip


@torch.no_grad()
def all_right(parts: list[Part]) -> Verdict:
    """Compare every part; the worst of them, as a share of what it may differ by, is named."""
    worst = Verdict("no part was watched", False)
    most = -1.0
    for part in parts:
        verdict = compare(part)
        if not verdict.right:
            return verdict
        assert verdict.error is not None, "right results have an error"
        if verdict.error / part.limit > most:
            worst, most = verdict, verdict.error / part.limit
    return worst


def compare(part: Part) -> Verdict:
    """Compare one part's results with torch's: numbers by norm, chosen experts by name."""
    expected = part.again()
    if isinstance(part.result, Tensor):
        return _near(part, [(part.result, expected)])
    routes, others = part.result, expected
    same = (routes.ids.sort(-1).values == others.ids.sort(-1).values).float().mean().item()
    if not same > 1 - 1e-3 or (routes.load.sum() != others.load.sum()):
        return Verdict(f"{part.name}: {1 - same:.1%} of the experts are others", False)
    return _near(part, [(routes.score, others.score)])


def _near(part: Part, pairs: list[tuple[Tensor, Tensor]]) -> Verdict:
    gap = Gap()
    for found, exact in pairs:
        for one, other in zip(found.split(256), exact.split(256), strict=True):
            gap.add(part.name, one, other.double())
    return gap.judge(part.limit)


def by_torch(prepare: Callable[..., Any], *inputs: Any) -> Callable[[], Any]:
    """Return the same call, computed by torch; it returns a tuple of one."""
    call = prepare(*inputs)

    def called() -> tuple[Any]:
        switch(call.stack.blocks, "torch")
        try:
            return (call(),)  # so that a check sees whose result it is
        finally:
            switch(call.stack.blocks, "triton")

    return called


def blocks_are_right(run: Callable[[], Tensor], blocks: nn.ModuleList, result: Any) -> Verdict:
    """Run once more and compare the parts of each layer; only one layer's are kept at a time.

    The result must be that of the timed call, bit by bit; torch's must be near it.
    """
    found: list[Verdict] = []
    watches: list[Any] = []

    def enter(block: nn.Module, given: tuple) -> None:
        watch = watched(block)
        watches.append((watch, watch.__enter__()))

    def leave(block: nn.Module, given: tuple, y: Any) -> None:
        watch, parts = watches.pop()
        watch.__exit__(None, None, None)
        found.append(all_right(parts))

    if isinstance(result, tuple):
        gap = Gap()
        gap.add("the layer's result", result[0], run().double())
        return gap.judge(WHOLE)
    hooks = [block.register_forward_pre_hook(enter) for block in blocks]
    hooks += [block.register_forward_hook(leave) for block in blocks]
    try:
        again = run()
    finally:
        for hook in hooks:
            hook.remove()
    if not torch.equal(again, result):
        return Verdict("two runs on the same input differ", False)
    wrong = [verdict for verdict in found if not verdict.right]
    return wrong[0] if wrong else max(found, key=lambda verdict: verdict.error or 0.0)
