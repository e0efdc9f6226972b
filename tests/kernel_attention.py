"""Inputs of latent attention for tests of its kernels, and what comes out, by the equations.

exact_expanded, exact_latent   loops in FP64 over the numbers that were drawn, with log-sum-exp
draw_pages                     a paged cache with NaN in every slot that is not held and wild
                               numbers in every entry of the table that is not used
tile_loads                     which tiles a kernel reads, as the interpreter runs it
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from kernel_inputs import poison
from minids_kernels import cards
from minids_kernels.latent import Causal, Pages
from torch import Tensor

PAGE = 64
LENGTHS = (0, 1, 63, 64, 65, 4096)
HEADS = (1, 3, 16, 64, 128)
# Widths N, R, V of the presets (toy, nano, small, published), then ragged ones
WIDTHS = [(4, 2, 4), (32, 16, 32), (64, 32, 64), (128, 64, 128), (24, 8, 40)]
LATENTS = [(4, 2), (32, 16), (128, 32), (512, 64), (40, 8)]  # C and R, likewise

# Relative to the norm of the exact result. FP32: sums in another order, exp2 of the card. BF16: p
# is rounded before it meets v, 2^-9 at most, and so is the result; FP16 eight times less.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
# of gradients: p, ds, o and the result are rounded, each as above; a difference of near numbers is
# taken. Interpreted, at most 5e-7, 3.3e-3 and 4e-4 were seen.
GRADIENT = {torch.float32: 4e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
LSE = 2e-6  # relative to 1 + |lse|: exact products of narrow numbers, FP32 sums


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative error that is allowed; a card's FP32 products are as exact ("ieee")."""
    return TOLERANCE[dtype]


def error(x: Tensor, y: Tensor) -> float:
    """Return how far x is from y, relative to the norm of y; 0 where both are 0."""
    x, y = x.detach().cpu().double(), y.detach().cpu().double()
    assert x.shape == y.shape, (x.shape, y.shape)
    gap, size = (x - y).norm(), y.norm()
    return float(gap / size) if size else float(gap)


class Expanded(NamedTuple):
    """What attend_expanded reads."""

    q_nope: Tensor  # [B, T, H, N]
    q_rope: Tensor  # [B, T, H, R]
    k_nope: Tensor  # [B, S, H, N]
    k_rope: Tensor  # [B, S, R]
    v: Tensor  # [B, S, H, V]


def draw_expanded(
    batch: int, queries: int, keys: int, heads: int, widths: tuple[int, int, int],
    dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0,
) -> Expanded:  # fmt: skip
    """Return random queries, keys and values, laid out as minids.mla leaves them.

    q_nope and k_nope, v are slices of one product; the rotary key is a slice of the latent.
    """
    n, r, v = widths
    generator = torch.Generator().manual_seed(seed)
    q, kv, rope = (
        torch.randn(*shape, generator=generator).to(dtype).to(device)
        for shape in (
            (batch, queries, heads, n + r),
            (batch, keys, heads, n + v),
            (batch, keys, 3 + r),
        )
    )
    return Expanded(q[..., :n], q[..., n:].clone(), kv[..., :n], rope[..., 3:], kv[..., n:])


def exact_expanded(x: Expanded, mask: Causal | None, scale: float) -> tuple[Tensor, Tensor]:
    """Return the output [B, T, H, V] and the log-sum-exp [B, H, T], in FP64, on the CPU."""
    q_nope, q_rope, k_nope, k_rope, v = (part.cpu().double() for part in x)
    (batch, queries, heads, _), keys = q_nope.shape, k_nope.shape[1]
    o, lse = torch.zeros(batch, queries, heads, v.shape[-1]).double(), []
    for b in range(batch):
        start = keys if mask is None else int(mask.start[b])
        sees = torch.arange(keys) <= start + torch.arange(queries)[:, None]
        if mask is not None and mask.documents is not None:
            number = mask.documents[b].cpu()
            sees &= number[:queries, None] == number
        for h in range(heads):
            score = q_nope[b, :, h] @ k_nope[b, :, h].T + q_rope[b, :, h] @ k_rope[b].T
            score = (score * scale).masked_fill(~sees, -math.inf)
            lse.append(score.logsumexp(-1))
            weight = (score - lse[-1][:, None]).exp()
            seen = sees.any(0)  # what nobody sees may be NaN
            o[b, :, h] = weight[:, seen] @ v[b, seen, h]
    return o, torch.stack(lse).unflatten(0, (batch, heads))


def draw_pages(
    lengths: Sequence[int], width: int, dtype: torch.dtype = torch.float32, device: str = "cpu",
    seed: int = 0, more_pages: int = 1,
) -> Pages:  # fmt: skip
    """Return latents of these lengths in pages out of order, among NaN and wild numbers.

    The table is `more_pages` wider than the longest row needs.
    """
    generator = torch.Generator().manual_seed(seed)
    used = [-(-length // PAGE) for length in lengths]
    n_pages, n = sum(used) + 3, max(used) + more_pages
    order = torch.randperm(n_pages, generator=generator).tolist()
    store = poison(torch.empty(n_pages, PAGE, width, dtype=dtype))
    wild = torch.tensor([2**31 - 1, -(2**31), n_pages, -1, 2**30 + 7]).int()
    table = wild.repeat(len(lengths) * n)[: len(lengths) * n].unflatten(0, (len(lengths), n))
    for row, length in enumerate(lengths):
        for j in range(used[row]):
            table[row, j] = order.pop()
            count = min(PAGE, length - j * PAGE)
            numbers = torch.randn(count, width, generator=generator)
            store[table[row, j], :count] = numbers.to(dtype)
    ends = torch.tensor(list(lengths), dtype=torch.int32)
    return Pages(store.to(device), table.to(device), ends.to(device))


def exact_latent(
    q_latent: Tensor, q_rope: Tensor, pages: Pages, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output [B, T, H, C] and the log-sum-exp [B, T, H], in FP64, on the CPU.

    A query that sees no slot gets 0 and -inf.
    """
    (batch, queries, heads, latent_dim), page = q_latent.shape, pages.store.shape[1]
    o = torch.zeros(batch, queries, heads, latent_dim).double()
    lse = torch.full((batch, queries, heads), -math.inf).double()
    q = torch.cat([q_latent, q_rope], dim=-1).cpu().double()
    for b, length in enumerate(pages.lengths.tolist()):
        table = pages.table[b, : -(-length // page)].long()
        held = pages.store[table].flatten(0, 1)[:length].cpu().double()
        for t in range(queries):
            seen = held[: max(0, length - queries + t + 1)]
            if len(seen):
                score = q[b, t] @ seen.T * scale
                lse[b, t] = score.logsumexp(-1)
                o[b, t] = score.softmax(-1) @ seen[:, :latent_dim]
    return o, lse


class TileLoad(NamedTuple):
    """One load through a descriptor: which program, from which memory, from where on, how much."""

    program: tuple[int, int, int]
    address: int  # of the described memory's first element
    at: tuple[int, ...]
    block: tuple[int, ...]


@contextmanager
def tile_loads() -> Iterator[list[TileLoad]]:
    """Record every load through a descriptor, in order, while kernels are interpreted."""
    from triton.runtime.interpreter import InterpreterBuilder, interpreter_builder

    assert cards.interpreted(), "only the interpreter can be watched"
    found: list[TileLoad] = []
    load = InterpreterBuilder.create_descriptor_load

    def recorded(self, desc, indices, *rest):
        program = tuple(int(n) for n in interpreter_builder.grid_idx)
        at = tuple(int(index.data.item()) for index in indices)
        found.append(TileLoad(program, int(desc.base.data.item()), at, tuple(desc.block_shape)))
        return load(self, desc, indices, *rest)

    InterpreterBuilder.create_descriptor_load = recorded
    try:
        yield found
    finally:
        InterpreterBuilder.create_descriptor_load = load
