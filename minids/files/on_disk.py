"""Parts of a layer whose weights are in its files, and in memory only while they are used.

Paper   DeepSeek-V3 (arXiv:2412.19437), section 2.1.2, Eq. 12.
Dims    BT tokens, D width, K experts a token, F expert width.
Book    book/11_fp8.ipynb               Kernel  none
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from minids.experts.grouped import by_expert, one_token, run_expert
from minids.files.mapped import Mapped
from minids.files.shards import expert_tensor


class OnDisk(nn.Module):
    """A Linear that reads its weight where it is used, and keeps nothing of it."""

    recipe = None  # it multiplies in the dtype of the run, not in FP8

    def __init__(self, read: Callable[[], Tensor]):
        super().__init__()
        self.read = read

    @property
    def weight(self) -> Tensor:
        return self.read()

    def forward(self, x: Float[Tensor, "*shape in_dim"]) -> Float[Tensor, "*shape out_dim"]:
        return F.linear(x, self.read())


class ExpertsOnDisk(nn.Module):
    """The routed experts of a layer: those that a token chose are read, one at a time."""

    def __init__(self, files: Mapped, layer: int, experts: int):
        super().__init__()
        self.files, self.layer, self.experts = files, layer, experts

    def forward(
        self, x: Float[Tensor, "BT D"], gate: Float[Tensor, "BT K"], ids: Int[Tensor, "BT K"]
    ) -> Float[Tensor, "BT D"]:
        chosen = sorted({*ids.flatten().tolist()})
        self.files.prefetch([name for e in chosen for name in self._names(e)])
        if len(x) == 1:
            return one_token(x, gate, ids, self._weights)
        return by_expert(x, gate, ids, self.experts, self._run)

    def _run(
        self, visits: Float[Tensor, "visits D"], load: Int[Tensor, " E"]
    ) -> Float[Tensor, "visits D"]:
        rows = enumerate(visits.split(load.tolist()))
        return torch.cat([run_expert(part, *self._weights(e)) for e, part in rows if len(part)])

    def _weights(self, e: int) -> tuple[Float[Tensor, "2 F D"], Float[Tensor, "D F"]]:
        gate, up, down = self._names(e)
        return self.files.weight(gate, up), self.files.weight(down)

    def _names(self, e: int) -> list[str]:
        return [expert_tensor(self.layer, e, part) for part in ("gate", "up", "down")]
