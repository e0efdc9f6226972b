"""Which code computes: torch, which runs anywhere, or the Triton kernels, where they are asked for.

Paper   none: both compute the same; what differs is named in the kernels' files.
Dims    none.
Book    book/04_mla.ipynb, book/11_fp8.ipynb, book/12_kernels.ipynb     Kernel  minids_kernels
"""

from types import ModuleType

import torch
from torch import nn

IMPLS = ("torch", "triton")


def use(model: nn.Module, impl: str) -> None:
    """Let all layers of `model` compute with `impl`.

    Raises ValueError for another name and where torch sees no GPU; what `kernels` raises too.
    """
    from minids.attention import Attention
    from minids.ffn import SwiGLU
    from minids.linear import Linear
    from minids.mla import MLA
    from minids.model import Transformer
    from minids.moe import Experts
    from minids.norm import RMSNorm
    from minids.router import Router

    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    if impl == "triton" and not kernels().interpreted() and not torch.cuda.is_available():
        raise ValueError("impl='triton' needs an NVIDIA GPU, torch sees none: use impl='torch'")
    parts = (Attention, Experts, MLA, RMSNorm, Router, SwiGLU, Transformer)
    for module in model.modules():
        if isinstance(module, parts):
            module.impl = impl
        elif isinstance(module, Linear) and module.recipe is not None:
            module.recipe = module.recipe._replace(impl=impl)


def kernels() -> ModuleType:
    """Return the package of kernels, imported at its first use; ImportError without Triton."""
    try:
        import minids_kernels
    except ImportError as error:
        raise ImportError(
            "impl='triton' needs Triton, which exists for Linux: pip install 'minids[kernels]'"
        ) from error
    return minids_kernels
