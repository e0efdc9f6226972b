"""Exercises of chapter 00, to warm up: reading a shape, and joining heads.

Expected shapes are those of tensors that einops makes; expected numbers come from plain loops.
"""

from collections.abc import Callable

import torch
from einops import einsum, repeat
from torch import Tensor

from minids.learn.check import Exercise, Property, differs

B, T, S, H, N = 2, 3, 5, 4, 8  # no two alike, so that no axis can pass for another


def scores_shape() -> tuple[int, ...]:
    """Return the shape of the scores, as a tensor has it."""
    q, k = torch.ones(B, T, H, N), torch.ones(B, S, H, N)
    return tuple(einsum(q, k, "b t h n, b s h n -> b h t s").shape)


def four_axes(answer: object) -> str | None:
    if not isinstance(answer, list | tuple):
        return f"shape must be a list such as [1, 2], got {answer!r}."
    want = len(scores_shape())
    return None if len(answer) == want else f"shape has {len(answer)} axes, expected {want}."


def no_width(answer: list[int]) -> str | None:
    return f"{list(answer)} holds n = {N}, which the arrow's right side lacks." * (N in answer)


def in_order(answer: list[int]) -> str | None:
    """Name the first axis that is wrong, and not what it should be."""
    for place, (got, want) in enumerate(zip(answer, scores_shape(), strict=True)):
        if got != want:
            return f"axis {place} is {got!r}; the size of {'bhts'[place]!r} is another."
    return None


def joined(x: Tensor) -> Tensor:
    """Join heads by a loop over every number."""
    batch, heads, tokens, width = x.shape
    out = torch.empty(batch, tokens, heads * width, dtype=x.dtype)
    for b in range(batch):
        for h in range(heads):
            for t in range(tokens):
                for n in range(width):
                    out[b, t, h * width + n] = x[b, h, t, n]
    return out


def numbers(*shape: int) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).unflatten(0, shape)


def shape_of(f: Callable[[Tensor], Tensor]) -> str | None:
    got, want = f(numbers(2, 3, 4, 5)), [2, 4, 15]
    shape = list(got.shape) if isinstance(got, Tensor) else got
    call = "the shape of join_heads(x), with x of shape [2, 3, 4, 5],"
    return differs(call, shape, want)


def own_token(f: Callable[[Tensor], Tensor]) -> str | None:
    """Look where the numbers of one token go: x[b, h, t, n] is t itself."""
    x = repeat(torch.arange(3.0), "t -> 1 h t n", h=2, n=2)
    rows = f(x)[0].tolist()
    return differs(
        "join_heads(x), where x[b, h, t, n] = t,", rows, [[float(t)] * 4 for t in range(3)]
    )


def heads_in_order(f: Callable[[Tensor], Tensor]) -> str | None:
    """Look at one token: x[b, h, t, n] is 10 h + n."""
    x = torch.tensor([[[[0.0, 1.0]], [[10.0, 11.0]]]])
    return differs(
        "join_heads(x), where x[b, h, t, n] = 10 h + n,", f(x)[0, 0].tolist(), x.flatten().tolist()
    )


def any_size(f: Callable[[Tensor], Tensor]) -> str | None:
    x = numbers(2, 3, 4, 5)
    return differs("join_heads(x), where x counts 0, 1, 2, ... to 119,", f(x), joined(x))


EXERCISES = (
    Exercise(
        name="shape",
        title="The shape of scores",
        statement=f"Attention compares each query with each key. With `q` of shape [B, T, H, N] ="
        f" [{B}, {T}, {H}, {N}] and `k` of shape [B, S, H, N] = [{B}, {S}, {H}, {N}], what is the"
        ' shape of `einsum(q, k, "b t h n, b s h n -> b h t s")`? Set `shape` to a list of whole'
        " numbers. Write it down before you run anything.",
        start="shape = ...  # a list such as [1, 2, 3]\n",
        properties=(
            Property("there is an axis for each letter right of the arrow", four_axes),
            Property("an axis that is missing on the right is summed away", no_width),
            Property("axes stand in the order in which the right side names them", in_order),
        ),
        hints=(
            "Read the right side of the arrow, letter by letter.",
            "Each letter has one size, wherever it stands: b is the first axis of q, s the second"
            " of k.",
            f"b h t s, and b = {B}, h = {H}: the list begins [{B}, {H}, ...",
        ),
        solution=f"# b h t s: one score for each sequence, head, query and key.\n"
        f"# n is left of the arrow alone: the products of N = {N} pairs are summed.\n"
        f"shape = [{B}, {H}, {T}, {S}]\n",
        wrong={
            "the width is kept": f"shape = [{B}, {T}, {H}, {S}, {N}]\n",
            "the order of q": f"shape = [{B}, {T}, {H}, {S}]\n",
            "the scores of one head": f"shape = [{B}, {T}, {S}]\n",
            "the width in place of the keys": f"shape = [{B}, {H}, {T}, {N}]\n",
        },
    ),
    Exercise(
        name="join_heads",
        title="Join the heads",
        statement="After attention each head holds its own result: `x` has shape [B, H, T, N]. The"
        " output projection wants one vector a token, head 0's numbers first, then head 1's, and so"
        " on: shape [B, T, H * N]. Write `join_heads(x)`. Mind that numbers must go to the right"
        " place, and not only have the right shape.",
        start="def join_heads(x):\n    raise NotImplementedError\n",
        properties=(
            Property("the result has shape [B, T, H * N]", shape_of),
            Property("what a token holds comes from that token alone", own_token),
            Property(
                "within a token, head 0 comes first and each head stays together", heads_in_order
            ),
            Property("every number is where a loop over all of them puts it", any_size),
        ),
        hints=(
            "Which axes become one, and in which order? The slower one is named first.",
            "einops can say it in one line: the axes of x left of the arrow, what you want right of"
            " it, joined axes in brackets.",
            'The right side is "b t (h n)".',
        ),
        solution="from einops import rearrange\n\n\n"
        "def join_heads(x):\n"
        "    # (h n): h changes slowly, n fast, so that each head's numbers stay together\n"
        '    return rearrange(x, "b h t n -> b t (h n)")\n',
        wrong={
            "reshaped without moving an axis": "def join_heads(x):\n"
            "    b, h, t, n = x.shape\n"
            "    return x.reshape(b, t, h * n)\n",
            "heads interleaved": "from einops import rearrange\n\n\n"
            "def join_heads(x):\n"
            '    return rearrange(x, "b h t n -> b t (n h)")\n',
            "heads added up": "def join_heads(x):\n    return x.sum(dim=1)\n",
        },
    ),
)
