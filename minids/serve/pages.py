"""A paged cache: rows get their slots page by page out of one store, and give them back.

Paper   PagedAttention, arXiv:2309.06180.
Dims    B rows, S slots (slot = position), T new tokens a row, W numbers a token a layer.
Book    book/03_cache.ipynb             Kernel  minids_kernels/mla_decode.py
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

SIZE = 64  # tokens of a page, as kernels want them


class Pages(NamedTuple):
    """One layer's slots, as kernels read them: slot s of row b is store[table[b, s // page]]."""

    store: Float[Tensor, "pages page W"]
    table: Int[Tensor, "B n"]  # of a row, only the first ceil(length / page) numbers mean something
    lengths: Int[Tensor, " B"]  # tokens of each row; what lies behind may be anything, NaN too

    def latent(self) -> Float[Tensor, "B S W"]:
        """Return the rows side by side, 0 behind their ends."""
        page, n = self.store.shape[1], self.table.shape[1]
        ends, slots = self.lengths[:, None], torch.arange(n * page, device=self.store.device)
        used = self.table.where(slots[::page] < ends, 0).long()
        held = rearrange(self.store[used], "b n page w -> b (n page) w")
        return held.masked_fill((slots >= ends)[..., None], 0)

    def mask(self, queries: int) -> Bool[Tensor, "B T S"]:
        """Return which slots each row's last T tokens see: their own and those before."""
        slots = torch.arange(self.table.shape[1] * self.store.shape[1], device=self.store.device)
        at = self.lengths[:, None] - queries + torch.arange(queries, device=slots.device)
        return slots <= at[..., None]


class PageTable:
    """Which pages of a store each row holds, in order, and which are free."""

    def __init__(self, batch: int, n_pages: int, size: int, device: torch.device):
        if size < 1 or n_pages < 1:
            raise ValueError(f"size and number of pages must be at least 1, got {size}, {n_pages}")
        self.size, self.device = size, device
        self.rows: list[list[int]] = [[] for _ in range(batch)]
        self.free = list(range(n_pages))[::-1]  # the last one is given next
        self._table: Int[Tensor, "B n"] | None = None
        self._next: tuple[tuple[int, ...], Int[Tensor, "B T"]] | None = None

    def grow(self, lengths: Sequence[int]) -> None:
        """Give rows pages for so many tokens; ValueError, none given, where too few are free."""
        need = [-(-n // self.size) - len(row) for n, row in zip(lengths, self.rows, strict=True)]
        if (missing := sum(max(0, n) for n in need)) > len(self.free):
            total = len(self.free) + sum(map(len, self.rows))
            raise ValueError(
                f"cache is full: {len(self.free)} of its {total} pages of {self.size} tokens are "
                f"free, {missing} are needed: roll back, or give it more pages"
            )
        for row, count in zip(self.rows, need, strict=True):
            row.extend(self.free.pop() for _ in range(count))
        self._table = None if missing else self._table

    def shrink(self, lengths: Sequence[int]) -> None:
        """Take back the pages behind each row's end."""
        for row, length in zip(self.rows, lengths, strict=True):
            while len(row) * self.size >= length + self.size:
                self.free.append(row.pop())
                self._table = None

    @property
    def table(self) -> Int[Tensor, "B n"]:
        """The pages of each row, int32, on the store's device; -1 where a row has no more."""
        if self._table is None:
            n = max(map(len, self.rows))
            rows = [row + [-1] * (n - len(row)) for row in self.rows]
            self._table = torch.tensor(rows, dtype=torch.int32, device=self.device)
        return self._table

    def write(
        self, store: Float[Tensor, "pages page W"], held: Sequence[int], new: Float[Tensor, "B T W"]
    ) -> Pages:
        """Store new tokens behind those that each row holds; return the row's pages then."""
        self.grow([length + new.shape[1] for length in held])
        at = self._positions(held, new.shape[1])
        pages = self.table.gather(1, at // self.size).long()
        store[pages, at % self.size] = new.detach()
        return Pages(store, self.table, at[:, -1].int() + 1)

    def _positions(self, held: Sequence[int], new_tokens: int) -> Int[Tensor, "B T"]:
        """Return where the next tokens go: every layer asks, the first one brings it to the GPU."""
        key = (new_tokens, *held)
        if self._next is None or self._next[0] != key:
            start = torch.tensor(held, device=self.device)
            self._next = key, start[:, None] + torch.arange(new_tokens, device=self.device)
        return self._next[1]
