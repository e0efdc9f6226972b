"""The KV cache: what attention must remember of a token, once a layer, and how to forget it.

Paper   DeepSeek-V3 (arXiv:2412.19437), section 2.1.1: for MLA c_kv and k_rope, 576 numbers in V3.
Dims    B rows, S slots (slot = position), W numbers a token a layer (`Config.cache_dim`).
Book    book/03_cache.ipynb             Kernel  none
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minids.serve.pages import Pages, PageTable


class Cache:
    """Slots for `capacity` tokens a row; rows may have different lengths, always from slot 0 on.

    With a `page_size` rows take slots out of one store, page by page; `n_pages` of them may be
    fewer than all rows could fill. Cached values carry no gradient. Slots at or past a row's length
    hold leftovers: a causal mask hides them, because slot numbers are positions.
    """

    def __init__(
        self, layers: int, batch: int, capacity: int, width: int, like: Tensor,
        page_size: int | None = None, n_pages: int | None = None,
    ):  # fmt: skip
        if batch < 1 or capacity < 1:
            raise ValueError(f"batch and capacity must be at least 1, got {batch} and {capacity}")
        self.capacity, slots, self.pages = capacity, (batch, capacity), None
        if page_size is not None:
            fill_all = batch * -(-capacity // max(page_size, 1))
            slots = (fill_all if n_pages is None else n_pages, page_size)
            self.pages = PageTable(batch, *slots, like.device)
        self.store = torch.zeros(layers, *slots, width, dtype=like.dtype, device=like.device)
        self.lengths = [0] * batch  # tokens held by each row

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, used or not."""
        return self.store.nbytes

    def positions(self, new_tokens: int) -> Int[Tensor, "B T"]:
        """Return the positions that the next `new_tokens` tokens of each row take."""
        start = torch.tensor(self.lengths, device=self.store.device)
        return start[..., None] + torch.arange(new_tokens, device=self.store.device)

    def layer(self, index: int) -> "CacheLayer":
        """Return the part that one attention layer appends to."""
        return CacheLayer(self, index)

    def reserve(self, new_tokens: int) -> None:
        """Take pages for `new_tokens` more tokens a row; ValueError when they do not fit."""
        if max(self.lengths) + new_tokens > self.capacity:
            raise ValueError(
                f"cache is full: it holds {max(self.lengths)} tokens of {self.capacity}, "
                f"{new_tokens} more were given"
            )
        if self.pages is not None:
            self.pages.grow([held + new_tokens for held in self.lengths])

    def advance(self, counts: int | Sequence[int]) -> None:
        """Count appended tokens as held, after all layers appended; `counts` may differ by row."""
        counts = [counts] * len(self.lengths) if isinstance(counts, int) else counts
        self.lengths = [held + new for held, new in zip(self.lengths, counts, strict=True)]
        if self.pages is not None:
            self.pages.shrink(self.lengths)

    def rollback(self, counts: int | Sequence[int]) -> None:
        """Forget the last tokens, as many of every row or of each; ValueError if fewer are held."""
        counts = [counts] * len(self.lengths) if isinstance(counts, int) else list(counts)
        if len(counts) != len(self.lengths):
            raise ValueError(f"one count a row: got {len(counts)} for {len(self.lengths)} rows")
        for held, count in zip(self.lengths, counts, strict=True):
            if not 0 <= count <= held:
                raise ValueError(f"cannot roll back {count} tokens of a row that holds {held}")
        self.advance([-count for count in counts])


@dataclass(frozen=True)
class CacheLayer:
    """One layer's slots of a Cache."""

    cache: Cache
    index: int

    def append(self, new: Float[Tensor, "B T W"]) -> Float[Tensor, "B S W"]:
        """Store new tokens behind each row's held ones; return slots to the longest row's end."""
        cache, slots = self.cache, self.cache.store[self.index]
        if cache.pages is not None:
            held = self.write(new)
            if not max(cache.lengths):  # a prompt: what was written is all there is
                return new.detach().to(held.store.dtype)
            return held.latent()[:, : max(cache.lengths) + new.shape[1]]
        start, end = min(cache.lengths), max(cache.lengths) + new.shape[1]
        if start == max(cache.lengths):
            slots[:, start:end] = new.detach()
        else:
            rows = torch.arange(new.shape[0], device=new.device)[..., None]
            slots[rows, cache.positions(new.shape[1])] = new.detach()
        return slots[:, :end]

    def write(self, new: Float[Tensor, "B T W"]) -> Pages:
        """Store new tokens as append does; return the pages, of a cache that has them."""
        assert self.cache.pages is not None, "the caller asked before"
        return self.cache.pages.write(self.cache.store[self.index], self.cache.lengths, new)
