"""SwiGLU: one half of the hidden layer gates the other.

Paper   DeepSeek-V3 (arXiv:2412.19437), Eq. 12 (FFN); SwiGLU, arXiv:2002.05202.
Dims    D width, F hidden width (`inter_dim`; shared experts: `n_shared_experts * moe_inter_dim`).
Book    book/02_model.ipynb             Kernel  minids_kernels/ffn_swiglu.py
"""

from jaxtyping import Float
from torch import Tensor, nn

from minids import fp8
from minids.fused.swiglu import swiglu
from minids.linear import Linear


class SwiGLU(nn.Module):
    """W_down( silu(W_gate x) * W_up x )."""

    def __init__(self, dim: int, hidden_dim: int, recipe: fp8.Recipe | None = None):
        super().__init__()
        self.w_gate = Linear(dim, hidden_dim, recipe)
        self.w_up = Linear(dim, hidden_dim, recipe)
        self.w_down = Linear(hidden_dim, dim, recipe)
        self.impl = "torch"

    def forward(self, x: Float[Tensor, "*shape D"]) -> Float[Tensor, "*shape D"]:
        gate, up = self.w_gate(x), self.w_up(x)
        if self.w_down.recipe is not None and self.training:
            return fp8.gated_linear(gate, up, self.w_down.weight, self.w_down.recipe)
        return self.w_down(swiglu(gate, up, self.impl))
