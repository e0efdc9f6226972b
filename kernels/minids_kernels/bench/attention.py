"""Latent attention for its jobs: inputs as minids.mla leaves them, results and gradients in FP64.

FP64 goes head by head and some queries at a time: no scores of a whole prompt are ever stored.
"""

from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from minids.serve.pages import SIZE, Pages
from minids_kernels.bench.case import Verdict
from minids_kernels.bench.shapes import Attention
from minids_kernels.latent import Causal

# relative norm: weights are rounded to BF16 (2^-9 at most) before they meet values, and so is the
# result; of gradients the scores' are rounded too, and differences of near numbers are taken
OUTPUT_ERROR, GRADIENT_ERROR = 4e-3, 1e-2
_HEADS = 4  # checked of a prompt's output: the first and the last ones
_ROWS = 2  # checked of a batch at either end
_QUERIES = 1024  # of one head at a time


class Prompt(NamedTuple):
    """One text, or several behind each other, as products leave queries, keys and values."""

    q: Tensor  # [1, T, H, nope + rope]
    kv: Tensor  # [1, T, H, nope + value]
    latent: Tensor  # [1, T, latent + rope]; its last part is the rotary key of all heads
    documents: Tensor | None  # [1, T]


class Expanded(NamedTuple):
    """What attend_expanded reads: parts of a prompt."""

    q_nope: Tensor
    q_rope: Tensor
    k_nope: Tensor
    k_rope: Tensor
    v: Tensor


class Forward(NamedTuple):
    """What backward kernels read beside a prompt."""

    o: Tensor  # [1, T, H, value]
    lse: Tensor  # [1, H, T], FP32
    do: Tensor  # like o


class Gradients(NamedTuple):
    """Of Expanded; a peer's rotary keys may be those of each head, to be added up."""

    q_nope: Tensor
    q_rope: Tensor
    k_nope: Tensor
    k_rope: Tensor  # [1, T, rope] or [1, T, H, rope]
    v: Tensor


class Queries(NamedTuple):
    """Of each row's last tokens, W^UK absorbed."""

    latent: Tensor  # [B, T, H, latent]
    rope: Tensor  # [B, T, H, rope]


# Inputs


def prompt(sizes: Attention, lengths: tuple[int, ...], device: str) -> Prompt:
    """Draw a prompt of texts of these lengths behind each other."""
    heads, nope, rope, value, latent = sizes
    widths = ((heads, nope + rope), (heads, nope + value), (latent + rope,))
    q, kv, latents = (
        torch.randn(1, sum(lengths), *width, device=device).bfloat16() for width in widths
    )
    numbers = torch.arange(len(lengths), device=device)
    documents = numbers.repeat_interleave(torch.tensor(lengths, device=device))[None]
    return Prompt(q, kv, latents, documents if len(lengths) > 1 else None)


def expanded(sizes: Attention, of: Prompt) -> Expanded:
    """Return a prompt's parts, as views."""
    q_nope, q_rope = of.q.split([sizes.nope, sizes.rope], dim=-1)
    k_nope, v = of.kv.split([sizes.nope, sizes.value], dim=-1)
    return Expanded(q_nope, q_rope, k_nope, of.latent[..., sizes.latent :], v)


def causal(of: Prompt) -> Causal:
    """Return what its queries see."""
    start = torch.zeros(len(of.q), dtype=torch.int32, device=of.q.device)
    return Causal(start, of.documents)


def cached(
    sizes: Attention, lengths: tuple[int, ...], queries: int, device: str
) -> tuple[Queries, Pages]:
    """Draw latents of these lengths, their pages out of order, and queries."""
    shape = len(lengths), queries, sizes.heads
    of = Queries(*(torch.randn(*shape, width, device=device).bfloat16()
                   for width in (sizes.latent, sizes.rope)))  # fmt: skip
    used = [-(-length // SIZE) for length in lengths]
    width = sizes.latent + sizes.rope
    store = torch.randn(sum(used), SIZE, width, dtype=torch.bfloat16, device=device)
    order = torch.randperm(sum(used), device=device).int()
    table = torch.zeros(len(lengths), max(used), dtype=torch.int32, device=device)
    for row, (first, end) in enumerate(pairwise(accumulate(used, initial=0))):
        table[row, : end - first] = order[first:end]
    return of, Pages(store, table, torch.tensor(lengths, dtype=torch.int32, device=device))


def forward(sizes: Attention, of: Prompt) -> Forward:
    """Return the output and its log-sum-exp, exact before rounding, and a random gradient."""
    heads, tokens = sizes.heads, of.q.shape[1]
    o = torch.empty(1, tokens, heads, sizes.value, dtype=of.q.dtype, device=of.q.device)
    lse = torch.empty(1, heads, tokens, device=of.q.device)
    for head in range(heads):
        for part in _parts(sizes, of, head):
            o[0, part.rows, head] = (part.weight @ part.v).to(o.dtype)
            lse[0, head, part.rows] = part.lse.float()
    return Forward(o, lse, torch.randn_like(o))


# Results


def prefill_is_right(sizes: Attention, result: Tensor, of: Prompt) -> Verdict:
    """Compare some heads of an output [1, T, H, value] with FP64."""
    gap = Gap()
    for head in ends(sizes.heads, _HEADS // 2):
        for part in _parts(sizes, of, head):
            gap.add("o", result[0, part.rows, head], part.weight @ part.v)
    return gap.judge(OUTPUT_ERROR)


def decode_is_right(sizes: Attention, result: Tensor, of: Queries, pages: Pages) -> Verdict:
    """Compare some rows of an output [B, T, H, latent] with FP64, all heads."""
    gap, queries = Gap(), result.shape[1]
    for row in ends(len(result), _ROWS):
        length = int(pages.lengths[row])
        used = pages.table[row, : -(-length // SIZE)].long()
        held = pages.store[used].flatten(0, 1)[:length].double()
        for t in range(queries):
            seen = held[: length - queries + t + 1]
            q = torch.cat([of.latent[row, t], of.rope[row, t]], dim=-1).double()
            weight = (q @ seen.mT * sizes.scale).softmax(-1)
            gap.add("o", result[row, t], weight @ seen[:, : sizes.latent])
    return gap.judge(OUTPUT_ERROR)


def gradients_are_right(sizes: Attention, result: Gradients, of: Prompt, given: Forward) -> Verdict:
    """Compare all gradients with FP64."""
    gap, nope, tokens = Gap(), sizes.nope, of.q.shape[1]
    dk_rope = torch.zeros(tokens, sizes.rope, dtype=torch.double, device=of.q.device)
    for head in range(sizes.heads):
        dk = dk_rope.new_zeros(tokens, nope + sizes.rope)
        dv = dk_rope.new_zeros(tokens, sizes.value)
        for part in _parts(sizes, of, head):
            do = given.do[0, part.rows, head].double()
            dweight = do @ part.v.mT
            mean = (part.weight * dweight).sum(-1, keepdim=True)
            dscore = part.weight * (dweight - mean) * sizes.scale
            dq = dscore @ part.k
            gap.add("dq_nope", result.q_nope[0, part.rows, head], dq[:, :nope])
            gap.add("dq_rope", result.q_rope[0, part.rows, head], dq[:, nope:])
            dk[: len(part.k)] += dscore.mT @ part.q
            dv[: len(part.k)] += part.weight.mT @ do
        gap.add("dk_nope", result.k_nope[0, :, head], dk[:, :nope])
        gap.add("dv", result.v[0, :, head], dv)
        dk_rope += dk[:, nope:]
    found = result.k_rope[0].double()
    gap.add("dk_rope", found if found.dim() == 2 else found.sum(1), dk_rope)
    return gap.judge(GRADIENT_ERROR)


def ends(n: int, few: int) -> list[int]:
    """Return the first and the last few of n; all if they are few."""
    return list(range(n)) if n <= 2 * few else [*range(few), *range(n - few, n)]


class Gap:
    """How far results are from exact ones, part by part."""

    def __init__(self):
        self.squares: dict[str, list[Tensor]] = {}

    def add(self, name: str, found: Tensor, exact: Tensor) -> None:
        """Add a piece of a result."""
        sums = [((found.double() - exact) ** 2).sum(), (exact**2).sum()]
        before = self.squares.get(name, [0.0, 0.0])
        self.squares[name] = [a + b for a, b in zip(before, sums, strict=True)]

    def judge(self, limit: float) -> Verdict:
        """Return the largest relative norm; the names of results that are too far."""
        names = list(self.squares)
        errors = torch.tensor([float((a / b).sqrt()) for a, b in self.squares.values()])
        wrong = [n for n, error in zip(names, errors, strict=True) if not error <= limit]  # NaN too
        worst = errors.max().item()  # NaN, if there is one
        text = f"error {worst:.1e}, more than {limit:.1e}: {', '.join(wrong)}"
        return Verdict(text if wrong else "", not wrong, worst)


class Part(NamedTuple):
    """Some queries of one head in FP64, the keys up to the last of them, and their weights."""

    rows: slice
    q: Tensor
    k: Tensor
    v: Tensor
    weight: Tensor
    lse: Tensor


def _parts(sizes: Attention, of: Prompt, head: int) -> Iterator[Part]:
    """Yield one head's attention, some queries at a time."""
    parts = expanded(sizes, of)
    q = of.q[0, :, head].double()
    k = torch.cat([parts.k_nope[0, :, head], parts.k_rope[0]], dim=-1).double()
    v = parts.v[0, :, head].double()
    for first in range(0, len(q), _QUERIES):
        end = min(first + _QUERIES, len(q))
        rows = slice(first, end)
        place = torch.arange(end, device=q.device)
        seen = place <= place[rows, None]
        if of.documents is not None:
            seen &= of.documents[0, :end] == of.documents[0, rows, None]
        score = (q[rows] @ k[:end].mT * sizes.scale).masked_fill(~seen, -torch.inf)
        lse = score.logsumexp(-1, keepdim=True)
        yield Part(rows, q[rows], k[:end], v[:end], (score - lse).exp(), lse[:, 0])
