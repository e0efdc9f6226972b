"""Where visits stand in memory: sorted by expert, each expert's first one at the start of a tile.

Paper   DeepSeek-V3 (arXiv:2412.19437), section 3.3.2: groups of 128 tokens in weight gradients.
Dims    BT tokens, E experts, K experts a token, P slots, `size` slots a tile.
Book    book/07_moe.ipynb               Kernel  minids_kernels/moe_align.py
"""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Int
from torch import Tensor

from minids.balance import expert_load


class Slots(NamedTuple):
    """Which visit stands in which slot; visit t K + k is token t's to its k-th expert."""

    visit: Int[Tensor, " P"]  # BT*K where a slot is empty
    place: Int[Tensor, "BT K"]  # the slot of a visit
    start: Int[Tensor, " E1"]  # first slots, multiples of size; the last: the end of all
    expert: Int[Tensor, " tiles"]  # whose slots a tile holds, -1 behind the end
    size: int


def align(ids: Int[Tensor, "BT K"], experts: int, size: int) -> Slots:
    """Give each visit a slot; a tile of `size` slots holds visits to one expert, in their order.

    P is enough for any ids, so that its size waits for no device: an expert leaves less than one
    tile empty, and at most BT*K experts are visited at all.
    """
    visits, device = rearrange(ids, "bt k -> (bt k)"), ids.device
    n = len(visits)
    most = -(-(n + min(experts, n) * (size - 1)) // size) * size
    load = expert_load(ids, experts)
    ends = (load + size - 1).div(size, rounding_mode="floor").cumsum(0) * size
    start = torch.cat([ends.new_zeros(1), ends])
    order = visits.argsort(stable=True)
    before = (load.cumsum(0) - load)[visits[order]]  # visits to the experts before its own
    slot = start[visits[order]] + torch.arange(n, device=device) - before
    visit = torch.full((most,), n, device=device).scatter(0, slot, order)
    place = torch.empty_like(order).scatter(0, order, slot)
    tiles = torch.arange(most // size, device=device) * size
    expert = torch.searchsorted(ends, tiles, right=True)
    expert = expert.where(tiles < ends[-1], -1)
    place = rearrange(place, "(bt k) -> bt k", k=ids.shape[1])
    return Slots(visit.int(), place.int(), start.int(), expert.int(), size)
