"""Job `loss`: cross-entropy over V3's words, from logits, and from the states before them.

Gradients of logits are floored as if one pass could read and write them; a row of V3's words fits
no multiprocessor, and a gradient may come from behind, so ours reads twice. The linear form counts
six operations for each state, word and token: what makes logits again counts nothing.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from minids import loss as linear
from minids.fused import loss as fused
from minids_kernels import loss_cross_entropy, loss_linear
from minids_kernels.bench import checks, passes, peers
from minids_kernels.bench import pass_peers as others
from minids_kernels.bench.attention import GRADIENT_ERROR, Gap
from minids_kernels.bench.case import OURS, Call, Case, Goal, Prepare, Verdict
from minids_kernels.bench.floors import Work
from minids_kernels.bench.shapes import TOKENS, V3_EXPERTS

JOB = "loss"
WORDS = 129_280
FORWARD = (Goal("percent_of_copy", 90),)
BOTH = (Goal("ratio", 1.0, others.LIGER),)
LINEAR = (Goal("tflops", 550), Goal("percent_of_memory", 10))
# relative: rounding errors of a sum's terms cancel. Of products in BF16 the logits are rounded too
LOSS_ERROR = 2e-4
_SPREAD = 3.0  # of logits: likely words then weigh as much in gradients as the right ones
_ROWS, _WORDS = 16, 2048  # checked at either end; words at a time, in FP64


def cases(tokens: int = TOKENS, words: int = WORDS, width: int = V3_EXPERTS.dim) -> Iterator[Case]:
    """Yield cross-entropy of logits, then of states."""
    shape, numbers = f"{tokens} x {words}", tokens * words
    inputs = partial(logits_and_targets, tokens, words)
    yield Case(JOB, f"forward, {shape}", Work(2 * numbers), inputs,
               {OURS: passes.forward(loss_cross_entropy.cross_entropy),
                peers.COMPILED: passes.forward(fused.cross_entropy, compiled=True)},
               loss_is_near, FORWARD)  # fmt: skip
    sides: dict[str, Prepare] = {
        OURS: differentiated(partial(loss_cross_entropy.cross_entropy, in_place=True), copied=True),
        others.LIGER: differentiated(others.liger_cross_entropy, copied=True),
        others.FLA: differentiated(others.fla_cross_entropy, copied=True),
        peers.COMPILED: differentiated(fused.cross_entropy, compiled=True),
        others.TORCH: differentiated(fused.cross_entropy),
    }
    yield Case(JOB, f"forward and gradient in place, {shape}", Work(4 * numbers), inputs,
               sides, gradient_is_near, BOTH)  # fmt: skip
    operations = 6 * numbers * width
    moved = 2 * 2 * (tokens + words) * width  # states and weight, their gradients
    sides = {
        OURS: differentiated(loss_linear.target_sum),
        others.LIGER: differentiated(others.liger_linear),
        others.CUT: differentiated(others.cut_linear),
        others.FLA: differentiated(others.fla_linear),
        others.TORCH: differentiated(linear.target_sum),
        peers.COMPILED: differentiated(linear.target_sum, compiled=True),
    }
    yield Case(JOB, f"from states, forward and backward, {shape}",
               Work(moved, operations, "bf16_tflops"), partial(states, tokens, words, width),
               sides, linear_is_near, LINEAR, memory_bytes=4 * numbers)  # fmt: skip


def logits_and_targets(tokens: int, words: int, device: str) -> tuple[Tensor, Tensor]:
    """Draw logits as a trained model may have them."""
    logits = torch.randn(tokens, words, dtype=torch.bfloat16, device=device) * _SPREAD
    return logits, torch.randint(words, (tokens,), device=device)


def states(tokens: int, words: int, width: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Draw states and a weight whose logits are spread alike."""
    hidden = torch.randn(tokens, width, device=device).bfloat16()
    weight = torch.randn(words, width, dtype=torch.bfloat16, device=device)
    weight *= _SPREAD / width**0.5
    return hidden, weight, torch.randint(words, (tokens,), device=device)


def differentiated(function, copied: bool = False, compiled: bool = False) -> Prepare:
    """Return a side: the loss and the gradient of each input but the targets.

    Who writes gradients over logits gets a copy of them; after its first call they are gradients,
    which take as long.
    """

    def prepare(*inputs: Tensor) -> Call:
        run = torch.compile(function, dynamic=False) if compiled else function
        *given, targets = inputs
        given = [x.clone() if copied else x for x in given]

        def both() -> tuple[Tensor, ...]:
            leaves = [passes.leaf(x) for x in given]
            loss = run(*leaves, targets)
            return loss.detach(), *torch.autograd.grad(loss, leaves)

        return both

    return prepare


def loss_is_near(result: Tensor, logits: Tensor, targets: Tensor) -> Verdict:
    """Compare the sum with FP64."""
    exact = torch.zeros((), dtype=torch.double, device=logits.device)
    for x, of_rows in zip(logits.split(_ROWS), targets.split(_ROWS), strict=True):
        exact += F.cross_entropy(x.double(), of_rows, reduction="sum")
    gap = Gap()
    gap.add("the loss", result, exact)
    return gap.judge(LOSS_ERROR)


def gradient_is_near(result: tuple, logits: Tensor, targets: Tensor) -> Verdict:
    """Compare the sum, and the gradients of some rows."""
    verdict = loss_is_near(result[0], logits, targets)
    if not verdict.right:
        return verdict
    rows = checks._ends(len(logits), _ROWS, logits.device)
    weight = logits[rows].double().softmax(-1)
    gap = Gap()
    gap.add("the gradient", result[1][rows], weight - F.one_hot(targets[rows], logits.shape[1]))
    return gap.judge(checks.BF16_ERROR)


def linear_is_near(result: tuple, hidden: Tensor, weight: Tensor, targets: Tensor) -> Verdict:
    """Compare the sum, some states' gradients and some words', without all logits in FP64."""
    loss, d_hidden, d_weight = result
    wide, n_words = hidden.double(), len(weight)
    lse = torch.full_like(wide[:, 0], -torch.inf)
    for part in weight.split(_WORDS):
        lse = torch.logaddexp(lse, (wide @ part.double().mT).logsumexp(-1))
    right = (wide * weight[targets].double()).sum(-1)
    gap = Gap()
    gap.add("the loss", loss, (lse - right).sum())
    verdict = gap.judge(LOSS_ERROR)
    if not verdict.right:
        return verdict
    gap, rows = Gap(), checks._ends(len(hidden), _ROWS, hidden.device)
    exact = -weight[targets[rows]].double()
    for part in weight.split(_WORDS):
        exact += (wide[rows] @ part.double().mT - lse[rows, None]).exp() @ part.double()
    gap.add("states' gradient", d_hidden[rows], exact)
    # those of the first and last words, and of words that are right somewhere
    words = torch.cat([checks._ends(n_words, _ROWS, hidden.device), targets[rows]])
    grad = (wide @ weight[words].double().mT - lse[:, None]).exp()
    grad -= (targets[:, None] == words).double()
    gap.add("weight's gradient", d_weight[words], grad.mT @ wide)
    return gap.judge(GRADIENT_ERROR)
