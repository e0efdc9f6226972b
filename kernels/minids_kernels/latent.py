"""What attention kernels are told beside their queries: which keys are seen, where latents lie.

Layout  the tuples below; minids.attention.Causal and minids.serve.pages.Pages have the same fields.
Grid    none: this file holds no kernel.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Causal(NamedTuple):
    """Query t of row b is at start_b + t and sees the keys up to there, of its own document."""

    start: Tensor  # [B] integers
    documents: Tensor | None = None  # [B, S] integers, with S = T and start = 0


class Pages(NamedTuple):
    """One layer's cached latents: slot s of row b is store[table[b, s // page], s % page]."""

    store: Tensor  # [pages, page, C + R]
    table: Tensor  # [B, n] int32; of a row, the first ceil(length / page) numbers mean something
    lengths: Tensor  # [B] int32; what lies behind may be anything, NaN too


class Step(NamedTuple):
    """One tile of keys that a program multiplies with its tile of queries: what figures draw."""

    program: tuple[int, int, int]  # its place in the grid
    row: int  # of the batch
    heads: tuple[int, int]  # first, and the one behind the last; likewise below
    queries: tuple[int, int]
    keys: tuple[int, int]
    masked: bool  # some query of the tile does not see some of its keys


class Traffic(NamedTuple):
    """Bytes that one call moves."""

    loaded_bytes: int  # by all programs: what the L2 cache hands out
    stored_bytes: int
    least_bytes: int  # every number that is needed once, every result once


def spans(documents: Tensor) -> tuple[Tensor, Tensor]:
    """Return, int32 [B, S], the first and the last place of each token's document in its row."""
    order = documents.argsort(dim=1, stable=True)
    number = documents.gather(1, order)
    place = torch.arange(number.shape[1], device=number.device).expand_as(number)
    starts = number.diff(dim=1, prepend=number[:, :1] - 1) != 0
    ends = number.diff(dim=1, append=number[:, -1:] + 1) != 0
    first = place.where(starts, 0).cummax(dim=1).values
    last = place.where(ends, number.shape[1]).flip(1).cummin(dim=1).values.flip(1)
    first, last = (
        torch.zeros_like(order).scatter(1, order, order.gather(1, x)) for x in (first, last)
    )
    return first.int(), last.int()
