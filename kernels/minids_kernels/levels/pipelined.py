"""Level 4: pipelined - while one step is multiplied, the next ones are on their way.

The kernel is level 3's, word for word. The compiler turns its loop over: loads become
asynchronous copies into a ring of buffers in shared memory, and a step multiplies what
was asked for some steps before.

Gains    the tensor cores wait at the start of a tile alone.
Bound    by what copies cost the threads: an address and a mask for every 16 bytes, and
         registers for both.
Letters, memory, grid: as level 3.
Book     book/12_kernels.ipynb
"""

from torch import Tensor

from minids_kernels.levels import matrices, rasterised
from minids_kernels.levels.matrices import LINE
from minids_kernels.levels.tiled import BLOCK

STAGES = 4


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Return a b^T [M, N] in the operands' dtype, summed in FP32."""
    a, b, c, card = matrices.plain("levels.pipelined", a, b)
    return rasterised.launch(a, b, c, matrices.stages(card, STAGES, 2 * BLOCK * LINE))
