"""Job `mla_prefill`: attention over a prompt with every head's own keys, 192 wide, values 128."""

from collections.abc import Iterator
from functools import partial

import minids_kernels as kernels
from minids_kernels.bench import attention_peers as peers
from minids_kernels.bench.attention import Prompt, causal, expanded, prefill_is_right, prompt
from minids_kernels.bench.case import OURS, Call, Case, Goal, Prepare
from minids_kernels.bench.floors import causal_pairs, prefill
from minids_kernels.bench.shapes import V3, Attention

JOB = "mla_prefill"
GOALS = (Goal("tflops", 480),)
Texts = tuple[int, ...]  # lengths of texts behind each other
DOCUMENTS: Texts = tuple(8192 * (2 * n + 1) // 64 for n in range(8))  # 128 to 1920 tokens
COMPILED = 8192  # tokens up to which: compiling takes seconds
ALL_SCORES = 4096  # tokens up to which 128 heads' scores fit memory several times over


def cases(
    prompts: tuple[Texts, ...] = (DOCUMENTS, (4096,), (8192,), (16384,)), sizes: Attention = V3
) -> Iterator[Case]:
    """Yield prompts, those with less to multiply first."""
    for texts in prompts:
        sides: dict[str, Prepare] = {OURS: partial(ours, sizes)}
        for name, way in peers.SDPA.items():
            if name != peers.MATH or sum(texts) <= ALL_SCORES:
                sides[name] = partial(peers.prefill, partial(peers.sdpa, way), sizes)
        if sum(texts) <= COMPILED:
            sides[peers.FLEX] = partial(peers.prefill, peers.flex, sizes)
        sides[peers.FLASHINFER] = partial(peers.flashinfer_prefill, sizes)
        work = prefill(sum(texts), causal_pairs(texts), sizes)
        goals = GOALS if len(texts) == 1 else ()
        yield Case(JOB, named(texts), work, partial(inputs, sizes, texts), sides,
                   partial(prefill_is_right, sizes), goals)  # fmt: skip


def named(texts: Texts) -> str:
    """Return the tokens, and how many texts they are."""
    return f"{sum(texts)} tokens" + (f", {len(texts)} documents" if len(texts) > 1 else "")


def inputs(sizes: Attention, texts: Texts, device: str) -> tuple[Prompt]:
    """Draw a prompt."""
    return (prompt(sizes, texts, device),)


def ours(sizes: Attention, of: Prompt) -> Call:
    """The kernel, on queries and keys as they lie in the products that made them."""
    return partial(kernels.attend_expanded, *expanded(sizes, of), causal(of), sizes.scale)
