"""Job `mla_backward`: the gradients of attention over a prompt, without the forward pass."""

from collections.abc import Iterator
from functools import partial

from minids_kernels import mla_prefill_backward
from minids_kernels.bench import attention_peers as peers
from minids_kernels.bench.attention import (
    Forward,
    Gradients,
    Prompt,
    causal,
    expanded,
    forward,
    gradients_are_right,
    prompt,
)
from minids_kernels.bench.case import OURS, Call, Case, Goal, Prepare
from minids_kernels.bench.floors import causal_pairs, prefill_backward
from minids_kernels.bench.mla_prefill import ALL_SCORES, Texts, named
from minids_kernels.bench.shapes import V3, Attention

JOB = "mla_backward"
GOALS = (Goal("tflops", 360),)
COMPILED = 4096  # tokens up to which: compiling both passes takes seconds


def cases(prompts: tuple[Texts, ...] = ((4096,), (8192,)), sizes: Attention = V3) -> Iterator[Case]:
    """Yield prompts, short ones first."""
    for texts in prompts:
        sides: dict[str, Prepare] = {OURS: partial(ours, sizes)}
        for name, way in peers.SDPA.items():
            if name != peers.MATH or sum(texts) <= ALL_SCORES:
                sides[name] = partial(peers.backward, partial(peers.sdpa, way), sizes)
        if sum(texts) <= COMPILED:
            sides[peers.FLEX] = partial(peers.backward, peers.flex, sizes)
        work = prefill_backward(sum(texts), causal_pairs(texts), sizes)
        yield Case(JOB, named(texts), work, partial(inputs, sizes, texts), sides,
                   partial(gradients_are_right, sizes), GOALS)  # fmt: skip


def inputs(sizes: Attention, texts: Texts, device: str) -> tuple[Prompt, Forward]:
    """Draw a prompt and a gradient of what attention makes of it."""
    drawn = prompt(sizes, texts, device)
    return drawn, forward(sizes, drawn)


def ours(sizes: Attention, of: Prompt, given: Forward) -> Call:
    """The kernels; the output and its log-sum-exp are not theirs but exact."""
    parts, mask = expanded(sizes, of), causal(of)

    def run() -> Gradients:
        o, lse, do = given
        return Gradients(*mla_prefill_backward.gradients(do, *parts, o, lse, mask, sizes.scale))

    return run
