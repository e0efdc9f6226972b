"""Job `experts_bf16`: V3's routed experts in BF16, forward, and with the gradients of all weights.

22.5 GB of weights, as many of gradients: on a card with less memory a case says so.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from minids_kernels import moe_experts
from minids_kernels.bench import routed
from minids_kernels.bench.case import OURS, Case, Goal, Prepare
from minids_kernels.bench.floors import Work
from minids_kernels.bench.routed import Routed, Wide
from minids_kernels.bench.shapes import V3_EXPERTS, Experts

JOB = "experts_bf16"
GROUPED, COMPILED = "grouped_mm", "grouped_mm, compiled"
NEAR, FAST = Goal("ratio", 0.9, GROUPED), Goal("tflops", 400)
_MANY = 8192  # tokens from which the rate can be reached: fewer wait for the weights


def cases(tokens: tuple[int, ...] = (4096, 8192), sizes: Experts = V3_EXPERTS) -> Iterator[Case]:
    """Yield forward, then forward and backward; compiling takes seconds: for the fewer tokens."""
    for n in tokens:
        sides: dict[str, Prepare] = {
            OURS: partial(routed.calls_wide, moe_experts.run_experts),
            GROUPED: partial(routed.calls_wide, routed.by_grouped_mm),
        }
        yield Case(JOB, f"forward, {n} tokens", work(n, sizes, False),
                   partial(drawn, n, sizes), sides, routed.is_near, goals(n))  # fmt: skip
    for n in tokens:
        sides = {
            OURS: partial(routed.trained, moe_experts.run_experts),
            GROUPED: partial(routed.trained, routed.by_grouped_mm),
        }
        if n == tokens[0]:
            sides[COMPILED] = partial(routed.trained, routed.by_grouped_mm, compiled=True)
        yield Case(JOB, f"forward and backward, {n} tokens", work(n, sizes, True),
                   partial(with_gradient, n, sizes), sides,
                   routed.gradients_are_near, goals(n))  # fmt: skip


def goals(tokens: int) -> tuple[Goal, ...]:
    """Return what is aimed at."""
    return (FAST, NEAR) if tokens >= _MANY else (NEAR,)


def work(tokens: int, sizes: Experts, trained: bool) -> Work:
    """Return what must be done: weights of chosen experts once a pass, rows of visits.

    Backward reads them again, writes the gradients of all, and multiplies twice as often.
    """
    dim, hidden, n_experts, k = sizes
    weight, visits = 3 * dim * hidden, tokens * k
    busy = routed.active(tokens, sizes)
    rows = visits * (2 * dim + 2 * hidden)
    numbers = busy * weight + rows
    if trained:  # gate and up are kept, and read; gradients of rows and halves
        numbers += (busy + n_experts) * weight + rows + visits * 3 * 2 * hidden
    return Work(2 * numbers, (3 if trained else 1) * 2 * visits * weight, "bf16_tflops")


def drawn(tokens: int, sizes: Experts, device: str) -> tuple[Routed, Wide]:
    """Draw tokens and weights."""
    return routed.routed(tokens, sizes, device), routed.wide_weights(sizes, device)


def with_gradient(tokens: int, sizes: Experts, device: str) -> tuple[Routed, Wide, Tensor]:
    """Draw a gradient of the result beside them."""
    dy = torch.randn(tokens, sizes.dim, device=device).bfloat16()
    return *drawn(tokens, sizes, device), dy
