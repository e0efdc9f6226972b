"""The one matrix product of the model: y = W x, no bias anywhere, in FP8 while it is trained so.

Paper   DeepSeek-V3 (arXiv:2412.19437), section 3.3.1: the products that FP8 replaces.
Dims    the last axis is mapped, all others are carried.
Book    book/02_model.ipynb             Kernel  none
Differs from nn.Linear: weights are left unset (model.py draws them from its own generator), so that
        building a model neither touches the global random state nor fills 671B numbers twice.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minids import fp8


class Linear(nn.Module):
    """Multiply the last axis by a learned matrix; in training mode with a recipe, in FP8."""

    def __init__(self, in_dim: int, out_dim: int, recipe: fp8.Recipe | None = None):
        super().__init__()
        self.recipe = recipe
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim))

    def forward(self, x: Float[Tensor, "*shape in_dim"]) -> Float[Tensor, "*shape out_dim"]:
        if self.recipe is not None and self.training:
            return fp8.linear(x, self.weight, self.recipe)
        return F.linear(x, self.weight)
