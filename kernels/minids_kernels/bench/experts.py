"""Job `experts`: V3's routed experts in FP8, as they are published, on one card: 11.3 GB.

Errors are against FP64 that quantises nothing but the weights: quantised inputs and hidden rows
cost 4e-2. Who multiplies the same weights in BF16 does not pay that, but reads 22.5 GB.
"""

from collections.abc import Iterator
from functools import partial

import torch

from minids.experts import scaled
from minids_kernels import moe_experts
from minids_kernels.bench import routed
from minids_kernels.bench.case import OURS, Call, Case, Goal
from minids_kernels.bench.floors import routed_experts
from minids_kernels.bench.routed import Blocks, Routed
from minids_kernels.bench.shapes import V3_EXPERTS, Experts

JOB = "experts"
LOOP, GROUPED = "torch, a loop", "grouped_mm BF16"
FEW, MANY = Goal("percent_of_bandwidth", 80), Goal("percent_of_floor", 60)
_FEW, _MANY = 512, 8192


def cases(
    tokens: tuple[int, ...] = (1, 32, 128, 512, 4096, 8192), sizes: Experts = V3_EXPERTS
) -> Iterator[Case]:
    """Yield few tokens first; the floor counts the experts that they chose."""
    for n in tokens:
        busy = routed.active(n, sizes)
        goals = (FEW,) if n <= _FEW else (MANY,) if n >= _MANY else ()
        name = f"{n} tokens, {busy} of {sizes.experts} experts"
        yield Case(JOB, name, routed_experts(n * sizes.k, busy, sizes), partial(drawn, n, sizes),
                   {OURS: ours, GROUPED: by_grouped_mm, LOOP: by_loop},
                   routed.scaled_is_near, goals)  # fmt: skip


def drawn(tokens: int, sizes: Experts, device: str) -> tuple[Routed, Blocks]:
    """Draw tokens and FP8 weights."""
    return routed.routed(tokens, sizes, device), Blocks(sizes, device)


def ours(of: Routed, weights: Blocks) -> Call:
    """The kernels."""
    return routed.calls(moe_experts.run_scaled_experts, of, weights.gate_up, weights.down)


def by_loop(of: Routed, weights: Blocks) -> Call:
    """torch's path: one expert after the other, products by groups in FP8 (cuBLAS on Hopper)."""
    return routed.calls(scaled.run_scaled_experts, of, weights.gate_up, weights.down)


def by_grouped_mm(of: Routed, weights: Blocks) -> Call:
    """The same weights in BF16; ValueError where they do not fit beside."""
    numbers = sum(w.values.numel() for w in (weights.gate_up, weights.down))
    free = torch.cuda.mem_get_info()[0] if of.x.is_cuda else None
    if free is not None and "wide" not in vars(weights) and 2.2 * numbers > free:
        raise ValueError(f"weights in BF16 need {2 * numbers / 1e9:.0f} GB beside")
    return routed.calls(routed.by_grouped_mm, of, weights.wide.gate_up, weights.wide.down)
