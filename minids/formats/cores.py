"""Products of FP8 on the tensor cores of a Hopper GPU, through torch's own scaled product.

Paper   DeepSeek-V3 (arXiv:2412.19437), section 3.3.2, Figure 7b; the product is cuBLAS's.
Dims    M and N rows of the operands, K the summed axis, in groups of 128.
Book    book/11_fp8.ipynb               Kernel  none
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from minids.formats.groups import BLOCK, TILE, Scaled

_LEAST_CUDA = (12, 9)  # the first whose cuBLAS scales by groups of 128


def can_take(a: Scaled, b: Scaled) -> bool:
    """Say whether torch multiplies these on tensor cores: a Hopper GPU, whole groups of 128."""
    x, cuda = a.values, torch.version.cuda or "0"  # None in builds for other makers' GPUs
    return (
        x.is_cuda
        and tuple(map(int, cuda.split("."))) >= _LEAST_CUDA
        and torch.cuda.get_device_capability(x.device) == (9, 0)
        and {a.group, b.group} <= {TILE, BLOCK}
        and TILE in (a.group, b.group)
        and x.shape[-1] % TILE[1] == 0
        and len(b.values) % TILE[1] == 0
        and (a.group == TILE or len(x) % TILE[1] == 0)
    )


def matmul(a: Scaled, b: Scaled, dtype: torch.dtype) -> Float[Tensor, "M N"]:
    """Call torch's product by groups; it rounds to BF16 or FP32, and to others from there."""
    out = dtype if dtype == torch.bfloat16 else torch.float32
    y = F.scaled_mm(*arguments(a, b), output_dtype=out)
    return y[: len(a.values)].to(dtype)


def arguments(a: Scaled, b: Scaled) -> tuple:
    """Lay out what `F.scaled_mm` takes: rows and blocks' scales come in fours."""
    values, scales, kinds = [], [], []
    for x in (a, b):
        tile = x.group == TILE
        lines = -len(x.values) % 4 if tile else 0
        values.append(F.pad(x.values.view(torch.uint8), (0, 0, 0, lines)).view(x.values.dtype))
        if tile:
            scales.append(F.pad(x.scale, (0, 0, 0, lines)).mT.contiguous().mT)
            kinds.append(F.ScalingType.BlockWise1x128)
        else:
            scales.append(F.pad(x.scale, (0, -x.scale.shape[-1] % 4)).contiguous().mT)
            kinds.append(F.ScalingType.BlockWise128x128)
    a_values, b_values = (x.contiguous() for x in values)
    return a_values, b_values.mT, scales[0], kinds[0], scales[1], kinds[1]
