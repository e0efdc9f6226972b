"""Job `router`: V3's choice of experts by groups, from logits, in one launch."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from minids import router as reference
from minids.balance import expert_load
from minids_kernels import router_topk
from minids_kernels.bench import passes
from minids_kernels.bench.case import OURS, Case, Goal, Prepare, Verdict
from minids_kernels.bench.floors import Work
from minids_kernels.bench.shapes import V3_EXPERTS, Experts

JOB = "router"
TOPK, COMPILED = "torch.topk", "torch.topk, compiled"  # of equal ones any may come first
_GOAL, _MANY = Goal("us", 4), 1024  # tokens up to which it holds
_GROUPS, _KEEP, _BEST, _SCALE = 8, 4, 2, 2.5
# a score may be another unit in the last place than torch's, and so of two near experts the other
# be chosen: weights differ by so little, and of a thousand tokens at most one has other experts
_ERROR, _DIFFER = 1e-5, 1e-3


def cases(
    tokens: tuple[int, ...] = (1, 128, 1024, 4096),
    sizes: Experts = V3_EXPERTS,
    groups: int = _GROUPS,
) -> Iterator[Case]:
    """Yield few tokens first."""
    how = (groups, min(_KEEP, groups), _BEST, sizes.k, True, _SCALE)
    for n in tokens:
        sides: dict[str, Prepare] = {
            OURS: passes.forward(router_topk.route, *how),
            TOPK: passes.forward(by_topk, *how),
            COMPILED: passes.forward(by_topk, *how, compiled=True),
        }
        per_token = 4 * sizes.experts * 2 + (4 + 8) * sizes.k  # logits, scores; weights, experts
        work = Work(n * per_token + (4 + 8) * sizes.experts)
        yield Case(JOB, f"{n} x {sizes.experts}", work, partial(drawn, n, sizes), sides,
                   partial(is_right, how), (_GOAL,) if n <= _MANY else ())  # fmt: skip


def drawn(tokens: int, sizes: Experts, device: str) -> tuple[Tensor, Tensor]:
    """Draw logits and biases."""
    logit = torch.randn(tokens, sizes.experts, device=device)
    return logit, 0.1 * torch.randn(sizes.experts, device=device)


def by_topk(
    logit: Tensor, bias: Tensor, groups: int, keep: int, best: int, k: int, normalise: bool,
    scale: float,
) -> reference.Routes:  # fmt: skip
    """The reference without its stable sorts, and with a count that does not wait for the GPU."""
    score = logit.sigmoid()
    choice = (score + bias).unflatten(-1, (groups, -1))
    kept = choice.topk(best, dim=-1).values.sum(-1).topk(keep, dim=-1).indices
    dropped = torch.ones_like(choice[..., 0], dtype=torch.bool).scatter(-1, kept, False)
    ids = choice.masked_fill(dropped[..., None], -torch.inf).flatten(-2).topk(k, dim=-1).indices
    gate = score.gather(-1, ids)
    if normalise:
        gate = gate / (gate.sum(-1, keepdim=True) + 1e-20)
    load = torch.zeros(logit.shape[-1], dtype=torch.int64, device=logit.device)
    load.scatter_add_(0, ids.flatten(), torch.ones_like(ids.flatten()))
    return reference.Routes(scale * gate, ids, score, load)


def is_right(how: tuple, result: tuple, logit: Tensor, bias: Tensor) -> Verdict:
    """Compare with the reference in FP64, and the load with the experts that were chosen."""
    found = reference.Routes(*result)
    expected = reference.route(logit.double(), bias.double(), *how)
    same = (found.ids == expected.ids).all(-1)
    differing = len(same) - int(same.sum())
    if differing > _DIFFER * len(same):
        return Verdict(f"{differing} of {len(same)} tokens have other experts", False)
    if not torch.equal(found.load, expert_load(found.ids, logit.shape[-1])):
        return Verdict("the load does not count the chosen experts", False)
    gap = (found.gate[same].double() - expected.gate[same]).norm() / expected.gate[same].norm()
    scores = (found.score.double() - expected.score).norm() / expected.score.norm()
    error = max(gap.item(), scores.item())  # NaN must not pass
    near = gap.item() <= _ERROR and scores.item() <= _ERROR
    return Verdict("" if near else f"error {error:.1e}, more than {_ERROR:.1e}", near, error)
