"""Job `rope`: V3's rotary parts of all heads' queries and their one key, where they lie."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from minids import rope
from minids_kernels import rope_rotate
from minids_kernels.bench import pass_peers as others
from minids_kernels.bench import passes, peers
from minids_kernels.bench.case import OURS, Call, Case, Goal, Verdict
from minids_kernels.bench.floors import Work
from minids_kernels.bench.shapes import TOKENS, V3, Attention

JOB = "rope"
GOALS = (Goal("percent_of_copy", 90),)
_THETA = 10_000.0


def cases(tokens: int = TOKENS, sizes: Attention = V3) -> Iterator[Case]:
    """Yield queries and key in place, queries alone, queries and their gradient."""
    heads, width = sizes.heads, sizes.rope
    phases = 8 * tokens * width // 2
    queries = tokens * heads * width
    shape = f"{tokens} x {heads} x {width}"
    forward, trained = passes.forward, passes.trained
    apart = partial(drawn, tokens, sizes)
    yield Case(JOB, f"queries alone, {shape}", Work(4 * queries + phases), apart,
               {OURS: forward(rope_rotate.rotate),
                peers.COMPILED: forward(rope.rotate, compiled=True),
                others.FLA: others.fla_rotary},
               partial(passes.is_near, rope.rotate, passes.ROUNDED), GOALS)  # fmt: skip
    yield Case(JOB, f"queries and key in place, {shape}",
               Work(4 * (queries + tokens * width) + phases), partial(in_place, tokens, sizes),
               {OURS: both}, both_are_near, GOALS)  # fmt: skip
    yield Case(JOB, f"queries and their gradient, {shape}", Work(8 * queries + phases),
               lambda device: (*apart(device), *apart(device)[:1]),
               {OURS: trained(rope_rotate.rotate),
                peers.COMPILED: trained(rope.rotate, compiled=True),
                others.FLA: others.fla_rotary},
               partial(passes.gradients_are_near, rope.rotate, passes.ROUNDED), GOALS)  # fmt: skip


def drawn(tokens: int, sizes: Attention, device: str) -> tuple[Tensor, Tensor]:
    """Draw queries' rotary parts, and the phases of a prompt's positions."""
    shape = 1, tokens, sizes.heads, sizes.rope
    freq = _THETA ** (-torch.arange(0, sizes.rope, 2, device=device) / sizes.rope)
    phase = rope.phases(torch.arange(tokens, device=device)[None], freq)
    return torch.randn(shape, device=device).bfloat16(), phase


def in_place(tokens: int, sizes: Attention, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Draw whole queries [1, T, H, nope + rope], whole latents [1, T, latent + rope], phases."""
    _, phase = drawn(tokens, sizes, device)
    q = torch.randn(1, tokens, sizes.heads, sizes.nope + sizes.rope, device=device)
    latent = torch.randn(1, tokens, sizes.latent + sizes.rope, device=device)
    return q.bfloat16(), latent.bfloat16(), phase


def both(q: Tensor, latent: Tensor, phase: Tensor) -> Call:
    """One launch for queries and key; each call turns them further."""
    width = 2 * phase.shape[-1]
    parts = q[..., -width:], latent[..., -width:]

    def run() -> tuple[Tensor, Tensor]:
        rope_rotate.rotate_both(*parts, phase)
        return q, latent

    return run


def both_are_near(result: tuple, q: Tensor, latent: Tensor, phase: Tensor) -> Verdict:
    """Compare what was turned with FP64; the rest must be as it was."""
    at = -2 * phase.shape[-1]
    if not all(torch.equal(y[..., :at], x[..., :at])
               for y, x in zip(result, (q, latent), strict=True)):  # fmt: skip
        return Verdict("what is beside the rotary parts has changed", False)
    turned = tuple(y[..., at:] for y in result)

    def turn(*parts: Tensor) -> tuple[Tensor, Tensor]:
        return rope.rotate(parts[0], phase), rope.rotate(parts[1], phase)

    return passes.is_near(turn, passes.ROUNDED, turned, q[..., at:], latent[..., at:])
