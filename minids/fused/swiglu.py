"""SwiGLU's product, and what FP8 makes of it: read once, written as the next products need it.

Paper   DeepSeek-V3 (arXiv:2412.19437), Eq. 12 and section 3.3.3; SwiGLU, arXiv:2002.05202.
Dims    M rows, F hidden width.
Book    book/11_fp8.ipynb               Kernel  minids_kernels/ffn_swiglu.py
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from minids.formats.groups import COLUMN, TILE, Scaled, dequantise, quantise
from minids.impl import kernels


def swiglu(
    gate: Float[Tensor, "*shape F"], up: Float[Tensor, "*shape F"], impl: str = "torch"
) -> Float[Tensor, "*shape F"]:
    """Return silu(gate) * up."""
    if impl == "triton":
        return kernels().swiglu(gate, up)
    return F.silu(gate) * up


def swiglu_quantise(
    gate: Float[Tensor, "*shape F"],
    up: Float[Tensor, "*shape F"],
    scale_fmt: str | None = None,
    floor: float = 0.0,
    impl: str = "torch",
) -> Scaled:
    """Return silu(gate) * up in FP8 by tiles."""
    if impl == "triton":
        return Scaled(*kernels().swiglu_quantise(gate, up, scale_fmt, floor))
    return quantise(swiglu(gate, up), TILE, scale_fmt, floor)


def gated_quantise(
    gate: Float[Tensor, "M F"],
    up: Float[Tensor, "M F"],
    hidden_scale: str | None = None,
    halves_scale: str | None = None,
    floor: float = 0.0,
    impl: str = "torch",
) -> tuple[Scaled, Scaled, Scaled]:
    """Return silu(gate) * up, gate and up in FP8 by tiles: what a product takes, and what waits.

    `floor` is the product's alone: the least max-abs of a tile.
    """
    if impl == "triton":
        parts = kernels().gated_quantise(gate, up, hidden_scale, halves_scale, floor)
        hidden, gate_codes, up_codes = (Scaled(*part) for part in parts)
        return hidden, gate_codes, up_codes
    hidden = quantise(swiglu(gate, up), TILE, hidden_scale, floor)
    return hidden, quantise(gate, TILE, halves_scale), quantise(up, TILE, halves_scale)


def gated_backward(
    d_hidden: Float[Tensor, "M F"],
    gate: Scaled,
    up: Scaled,
    hidden_scale: str | None = None,
    dtype: torch.dtype = torch.float32,
    impl: str = "torch",
) -> tuple[Float[Tensor, "M F"], Float[Tensor, "M F"], Scaled]:
    """Return the gradients of gate and up, and the hidden rows made again, by 128 tokens.

    All three come from the FP8 copies that waited (section 3.3.3).
    """
    if impl == "triton":
        d_gate, d_up, again = kernels().gated_backward(d_hidden, gate, up, hidden_scale, dtype)
        return d_gate, d_up, Scaled(*again)
    gate_wide, up_wide = dequantise(gate), dequantise(up)
    hidden = quantise(swiglu(gate_wide, up_wide), COLUMN, hidden_scale)
    sigmoid = gate_wide.sigmoid()
    d_gate = d_hidden * up_wide * sigmoid * (1 + gate_wide * (1 - sigmoid))
    d_up = d_hidden * gate_wide * sigmoid
    return d_gate.to(dtype), d_up.to(dtype), hidden
