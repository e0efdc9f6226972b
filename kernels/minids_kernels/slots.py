"""Where rows of routed experts lie: sorted by expert, each expert's first at the start of a tile.

Layout  V = tokens x K visits stand in P slots. P is known without looking at the ids, so nothing
        waits for the GPU: each of at most V experts leaves less than one tile of `size` empty.
Grid    none: this file holds no kernel. minids.experts.slots.Slots has the same fields.
"""

from typing import NamedTuple

from torch import Tensor


class Slots(NamedTuple):
    """Which visit stands in which slot; visit t K + k is token t's to its k-th expert."""

    visit: Tensor  # [P] int32, V where a slot is empty
    place: Tensor  # [tokens, K] int32: the slot of a visit
    start: Tensor  # [E + 1] int32: first slots, multiples of size; the last: the end of all
    expert: Tensor  # [P / size] int32: whose slots a tile holds, -1 behind the end
    size: int


def n_slots(visits: int, experts: int, size: int) -> int:
    """Return P: enough for any ids, a multiple of `size`."""
    most = visits + min(experts, visits) * (size - 1)
    return -(-most // size) * size
