"""One product in eight levels: each is the one before and one idea more.

    c[m, n] = sum over k   a[m, k] b[n, k]        in FP32, rounded once

Levels 1 to 6 take matrices of BF16, FP16 or FP32 (the last to compare: they are tuned for 16
bits), levels 7 and 8 quantised ones, of any sizes. A file says what its idea gains and what bounds
it next. They are for reading, with chapter 12: the library itself multiplies by torch,
fp8_matmul.py and fp8_decode.py.
"""

from minids_kernels.levels import (
    described,
    loop,
    persistent,
    pipelined,
    rasterised,
    scaled,
    swapped,
    tiled,
)
from minids_kernels.levels.level import Level, Walk
from minids_kernels.levels.traffic import Loads, loads

__all__ = ["LEVELS", "Level", "Loads", "Walk", "loads"]

_ALONG = Walk(tiled.BLOCK, tiled.BLOCK, programs=2)
_SQUARE = _ALONG._replace(group=rasterised.GROUP)
_LARGE = _SQUARE._replace(programs=1)  # its ring of buffers fills the shared memory

LEVELS = (
    Level(1, loop, Walk(1, 1, programs=32)),
    Level(2, tiled, _ALONG),
    Level(3, rasterised, _SQUARE),
    Level(4, pipelined, _LARGE),
    Level(5, described, _LARGE),
    Level(6, persistent, _LARGE),
    Level(7, scaled, _LARGE, scaled=True),
    Level(8, swapped, Walk(swapped.FEW, swapped.ROWS, programs=3), scaled=True),
)
