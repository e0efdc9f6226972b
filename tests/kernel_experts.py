"""Routes, weights and slow oracles for the kernels of routed experts; all of their tests take here.

LOADS             ids by name, from even to as lopsided as they get: `draw_ids(name, ...)`
weights(...)      [E 2 F D] and [E D F], of numbers that make outputs of the order of 1
blocks(w)         the same in FP8, each matrix of the stack by blocks of 128 x 128
slots_by_loop     where visits stand, slot by slot, in Python's integers
experts_by_loop   the layer in FP64, a visit at a time, from Eqs. 12-14; nothing of minids
is_empty(slots)   [P], no visit stands there; among_experts(slots): [P], in a tile of an expert
spoil(x, rows)    NaN in these rows of a tensor, or of codes, in place

Letters as in minids: BT tokens, D width, E experts, K experts a token, F hidden width, P slots.
"""

from collections.abc import Callable

import torch
from minids_kernels.slots import Slots
from torch import Tensor

from minids.formats.groups import BLOCK, Scaled, quantise


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _any(tokens: int, experts: int, k: int) -> Tensor:
    """Return k different experts a token, in any order."""
    return torch.rand(tokens, experts, generator=_generator(0)).argsort(-1)[:, :k]


def _all_to_one(tokens: int, experts: int, k: int) -> Tensor:
    """Return ids in which every token visits the expert before the last, and others in any order.

    With k = 1 all other experts are empty.
    """
    ids = torch.rand(tokens, experts, generator=_generator(1))
    ids[:, max(experts - 2, 0)] = -1.0
    return ids.argsort(-1)[:, :k].flip(-1)


def _few_of_many(tokens: int, experts: int, k: int) -> Tensor:
    """Return ids among the last k + 1 experts: those before them, the first too, are empty."""
    pool = min(k + 1, experts)
    return experts - pool + _any(tokens, pool, k)


def _last_is_empty(tokens: int, experts: int, k: int) -> Tensor:
    return _any(tokens, max(experts - 1, k), k)


# name -> ids [tokens, k] in int64; k = E is a matter of k
LOADS: dict[str, Callable[[int, int, int], Tensor]] = {
    "any": _any,
    "all to one": _all_to_one,
    "few of many": _few_of_many,
    "last is empty": _last_is_empty,
}


def draw_ids(name: str, tokens: int, experts: int, k: int, device: str = "cpu") -> Tensor:
    """Return the ids of LOADS: each token's experts differ from one another."""
    return LOADS[name](tokens, experts, k).to(device)


def weights(
    experts: int, width: int, hidden: int, dtype=torch.float32, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return w_gate_up [E 2 F D] and w_down [E D F]."""
    generator = _generator(seed)
    into = torch.randn(experts, 2, hidden, width, generator=generator) / width**0.5
    out = torch.randn(experts, width, hidden, generator=generator) / hidden**0.5
    return into.to(device, dtype), out.to(device, dtype)


def blocks(w: Tensor, scale_fmt: str | None = None) -> Scaled:
    """Return a stack of matrices in FP8, their sizes spread over two powers of ten."""
    spread = 10.0 ** torch.rand(w.shape[:-1], generator=_generator(9)) - 0.5
    return quantise(w.float() * spread[..., None].to(w.device), BLOCK, scale_fmt)


def slots_by_loop(ids: Tensor, experts: int, size: int) -> Slots:
    """Give out slots one by one, expert after expert, each expert's visits in their order."""
    chosen = ids.flatten().tolist()
    slots_of, start, tiles = [], [0], []
    for e in range(experts):
        visits = [v for v, other in enumerate(chosen) if other == e]
        while len(visits) % size:
            visits.append(len(chosen))
        slots_of += visits
        start.append(len(slots_of))
        tiles += [e] * (len(visits) // size)
    most = len(chosen) + min(experts, len(chosen)) * (size - 1)
    while len(slots_of) < most or len(slots_of) % size:
        slots_of.append(len(chosen))
    tiles += [-1] * (len(slots_of) // size - len(tiles))
    place = [slots_of.index(v) for v in range(len(chosen))]
    parts = (torch.tensor(x, dtype=torch.int32) for x in (slots_of, place, start, tiles))
    visit, flat, first, expert = (x.to(ids.device) for x in parts)
    return Slots(visit, flat.reshape(ids.shape), first, expert, size)


def experts_by_loop(
    x: Tensor, gate: Tensor, ids: Tensor, w_gate_up: Tensor, w_down: Tensor
) -> Tensor:
    """Return the layer in FP64: token by token, expert by expert, by the equations."""
    y = torch.zeros(len(x), w_down.shape[1], dtype=torch.float64, device=x.device)
    for t, visited in enumerate(ids.tolist()):
        for k, e in enumerate(visited):
            halves = w_gate_up[e].double() @ x[t].double()
            hidden = halves[0] / (1 + (-halves[0]).exp()) * halves[1]
            y[t] += gate[t, k].double() * (w_down[e].double() @ hidden)
    return y


def is_empty(slots: Slots) -> Tensor:
    """Return where no visit stands."""
    return slots.visit == slots.place.numel()


def among_experts(slots: Slots) -> Tensor:
    """Return which slots lie in a tile of an expert, empty or not."""
    return (slots.expert >= 0).repeat_interleave(slots.size)


def spoil(x: Tensor, rows: Tensor) -> Tensor:
    """Write NaN to these rows, in place; the NaN code of E4M3 has all bits but the sign's."""
    if x.dtype == torch.float8_e4m3fn:
        x.view(torch.uint8)[rows] = 0x7F
    else:
        x[rows] = torch.nan
    return x
