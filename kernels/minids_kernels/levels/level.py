"""What the levels are to those who walk over them: a file, and the order of its tiles.

Grid, layouts none: this file holds no kernel.
"""

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

from torch import Tensor


class Walk(NamedTuple):
    """Which tiles of c programs make, in the order of their numbers."""

    rows: int  # of a tile
    cols: int
    group: int = 1  # tiles down before one to the right (tiles.place); 1: along the rows of c
    programs: int = 1  # that run on one multiprocessor of Hopper at a time


class Level(NamedTuple):
    """One way to multiply."""

    number: int
    module: ModuleType  # its file
    walk: Walk
    scaled: bool = False  # operands are quantised: a in groups of 1 x 128, b of 128 x 128

    @property
    def name(self) -> str:
        """Return the name of its file, a word."""
        return self.module.__name__.rpartition(".")[2]

    @property
    def idea(self) -> str:
        """Return what its file says first, behind its number and name."""
        return (self.module.__doc__ or "").partition("\n")[0].partition(" - ")[2].removesuffix(".")

    @property
    def multiply(self) -> Callable[..., Tensor]:
        """Return the function of a and b, two of Tensor or of Scaled."""
        return self.module.multiply
