"""The training loss: nats of the right next word, from states or from logits.

Paper   DeepSeek-V3 (arXiv:2412.19437), Eq. 24 (the main model's loss is the same).
Dims    n targets, D width, `vocab` words.
Book    book/02_model.ipynb             Kernel  minids_kernels/loss_linear.py
"""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from minids.fused.loss import cross_entropy
from minids.impl import kernels


def target_sum(
    hidden: Float[Tensor, "n D"],
    weight: Float[Tensor, "vocab D"],
    targets: Int[Tensor, " n"],
    impl: str = "torch",
) -> Float[Tensor, ""]:
    """Return the cross-entropy of the head's logits; kernels never hold all of them at once."""
    if impl == "triton":
        return kernels().target_sum(hidden, weight, targets)
    return cross_entropy(F.linear(hidden, weight), targets)


def count_targets(tokens: Int[Tensor, "B T1"], mask: Int[Tensor, "B T1"] | None = None) -> int:
    """Return how many next-token targets a batch has; with `mask`, those inside one document."""
    if mask is None:
        return tokens[:, 1:].numel()
    return max(1, int((mask[:, 1:] == mask[:, :-1]).sum()))
