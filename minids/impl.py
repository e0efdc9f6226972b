"""Which code computes: torch, which runs anywhere, or the Triton kernels, where they are asked for.

Paper   none: both compute the same; what differs is named in the kernels' files.
Dims    none.
Book    book/04_mla.ipynb, book/11_fp8.ipynb               Kernel  minids_kernels
"""

from types import ModuleType

import torch
from torch import nn

IMPLS = ("torch", "triton")


def use(model: nn.Module, impl: str) -> None:
    """Let the layers of `model` compute with `impl`: kernels attend (MLA) and multiply FP8.

    Raises ValueError for another name, where torch sees no GPU, and where no layer has a kernel;
    what `kernels` raises too.
    """
    from minids.linear import Linear
    from minids.mla import MLA
    from minids.model import Transformer
    from minids.moe import Experts

    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    if impl == "triton" and not kernels().interpreted() and not torch.cuda.is_available():
        raise ValueError("impl='triton' needs an NVIDIA GPU, torch sees none: use impl='torch'")
    n_switched = 0
    for module in model.modules():
        if isinstance(module, Linear) and module.recipe is not None:
            module.recipe = module.recipe._replace(impl=impl)
            n_switched += 1
        elif isinstance(module, MLA | Transformer):
            module.impl = impl
            n_switched += isinstance(module, MLA)
        elif isinstance(module, Experts):
            into, out = (how and how._replace(impl=impl) for how in module.recipes)
            module.recipes = into, out
    if impl == "triton" and not n_switched:
        rule = "impl='triton' has kernels for attn='mla' and precision='fp8'"
        raise ValueError(f"{rule}, the model has neither: choose impl='torch'")


def kernels() -> ModuleType:
    """Return the package of kernels, imported at its first use; ImportError without Triton."""
    try:
        import minids_kernels
    except ImportError as error:
        raise ImportError(
            "impl='triton' needs Triton, which exists for Linux: pip install 'minids[kernels]'"
        ) from error
    return minids_kernels
