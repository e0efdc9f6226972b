"""A quantised matrix, as minids.formats.groups has it; kernels import nothing of minids."""

from typing import NamedTuple

from torch import Tensor


class Scaled(NamedTuple):
    """Values in E4M3 (or BF16) and one FP32 scale a group of rows x cols."""

    values: Tensor
    scale: Tensor
    group: tuple[int, int]

    @property
    def mT(self) -> "Scaled":
        """The transposed matrix; no value moves."""
        rows, cols = self.group
        return Scaled(self.values.mT, self.scale.mT, (cols, rows))
