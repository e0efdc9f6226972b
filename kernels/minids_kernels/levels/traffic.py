"""How many bytes a level reads, by counting its tiles: no clock and no GPU is needed.

Grid, layouts none: this file holds no kernel.
Book     book/12_kernels.ipynb
"""

from typing import NamedTuple

import torch

from minids_kernels.levels.level import Level, Walk
from minids_kernels.tiles import DEPTH, ceil_div

_SCALE_BYTES = 4


class Loads(NamedTuple):
    """Bytes that one product reads."""

    l2: int  # by each program for itself: what the L2 cache is asked for
    memory: int  # what programs that run at the same time share, counted once


def loads(level: Level, M: int, N: int, K: int, n_sm: int = 132, bytes_each: int = 2) -> Loads:
    """Return what a level reads on a card with `n_sm` multiprocessors; 132 is Hopper's.

    `memory` is what comes from there if the L2 cache holds what one round of programs reads and
    nothing of the rounds before. A larger cache saves more; no operand is read less than once.
    Numbers of levels 7 and 8 have one byte, and their scales are counted too.
    """
    walk, tiles_m, tiles_n = level.walk, ceil_div(M, level.walk.rows), ceil_div(N, level.walk.cols)
    row_bytes = K if level.scaled else K * bytes_each
    scales = _SCALE_BYTES * ceil_div(K, DEPTH) if level.scaled else 0
    l2 = tiles_n * M * (row_bytes + scales) + tiles_m * N * row_bytes + tiles_m * tiles_n * scales
    memory, at_once, stripe = 0, n_sm * walk.programs, walk.group * tiles_n
    last_stripe = (ceil_div(tiles_m, walk.group) - 1) * stripe  # it may be lower than the others
    alike: dict[tuple[int, int], int] = {}  # rounds that lie in their stripes in the same way
    for first in range(0, tiles_m * tiles_n, at_once):
        end = min(first + at_once, tiles_m * tiles_n)
        key = (first % stripe if end <= last_stripe else first, end - first)
        if key not in alike:
            rows, cols = places(walk, torch.arange(first, end), tiles_m, tiles_n)
            of_a = _height(rows, walk.rows, M) * (row_bytes + scales)
            of_b = _height(cols, walk.cols, N) * row_bytes
            alike[key] = of_a + of_b + len(_once(cols * walk.cols // DEPTH)) * scales
        memory += alike[key]
    return Loads(l2, memory)


def places(
    walk: Walk, tile: torch.Tensor, tiles_m: int, tiles_n: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows and columns of the tiles with these numbers, as tiles.place does in a kernel."""
    stripe = walk.group * tiles_n
    above = tile // stripe * walk.group
    height = (tiles_m - above).clamp(max=walk.group)
    return above + tile % stripe % height, tile % stripe // height


def _height(panels: torch.Tensor, size: int, total: int) -> int:
    """Return how many rows of an operand these panels hold, each counted once."""
    return int((total - _once(panels) * size).clamp(max=size).sum())


def _once(numbers: torch.Tensor) -> torch.Tensor:
    """Return these numbers in order, each once; faster than sorting them."""
    return torch.bincount(numbers).nonzero()
