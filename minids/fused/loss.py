"""Cross-entropy of logits: what the loss is from there on.

Paper   DeepSeek-V3 (arXiv:2412.19437), Eq. 24.
Dims    n targets, `vocab` words.
Book    book/02_model.ipynb             Kernel  minids_kernels/loss_cross_entropy.py
"""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from minids.impl import kernels
from minids.norm import at_least_fp32

IGNORED = -100  # a target that does not count


def cross_entropy(
    logits: Float[Tensor, "n vocab"], targets: Int[Tensor, " n"], impl: str = "torch"
) -> Float[Tensor, ""]:
    """Sum -log p(target) in nats, in FP32 at least; targets of IGNORED count nothing."""
    if impl == "triton":
        return kernels().cross_entropy(logits, targets)
    return F.cross_entropy(at_least_fp32(logits), targets, ignore_index=IGNORED, reduction="sum")
