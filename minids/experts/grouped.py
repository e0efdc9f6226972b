"""One product of many: rows sorted by expert, each expert's rows times its own matrix.

Paper   DeepSeekMoE, arXiv:2401.06066.
Dims    E experts, I inputs, O outputs; visits: rows of one expert are neighbours.
Book    book/07_moe.ipynb               Kernel  none
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor


def matmul_by_expert(
    x: Float[Tensor, "visits I"], w: Float[Tensor, "E O I"], load: Int[Tensor, " E"]
) -> Float[Tensor, "visits O"]:
    """Multiply the rows of each expert, neighbours in `x`, by its own matrix: y = W_e x."""
    if _can_group(x, w):
        return F.grouped_mm(x, rearrange(w, "e o i -> e i o"), offs=load.cumsum(0).int())
    # unbinding all weights at once: indexing them one by one fills E whole gradients with zeros
    parts = zip(x.split(load.tolist()), w.unbind(0), strict=True)
    return torch.cat([F.linear(rows, w_e) for rows, w_e in parts if len(rows)])


def _can_group(x: Tensor, w: Tensor) -> bool:
    """Say whether torch's grouped product takes them: rows of whole 16 bytes, no autocast."""
    device, row_bytes = x.device.type, (n * w.element_size() for n in w.shape[1:])
    return (
        device == "cpu"
        and x.dtype == w.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and not torch.is_autocast_enabled(device)
        and all(width % 16 == 0 for width in row_bytes)
    )
