"""Routed experts in FP8: on weights as they are published, and while the model trains.

Paper   DeepSeek-V3 (arXiv:2412.19437), sections 3.3.1-3.3.3, Figure 6; Eq. 12.
Dims    BT tokens, D width, E experts, K experts a token, F expert width; visits: the BT*K rows.
Book    book/11_fp8.ipynb               Kernel  minids_kernels/moe_experts.py
"""

from functools import partial
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minids import fp8
from minids.experts.grouped import by_expert
from minids.formats.groups import ACTIVATION_FLOOR, BLOCK, TILE, Scaled, quantise
from minids.fused.swiglu import swiglu
from minids.impl import kernels


def run_scaled_experts(
    x: Float[Tensor, "BT D"],
    gate: Float[Tensor, "BT K"],
    ids: Int[Tensor, "BT K"],
    w_gate_up: Scaled,
    w_down: Scaled,
    input_scale: str | None = None,
    hidden_scale: str | None = None,
    impl: str = "torch",
) -> Float[Tensor, "BT D"]:
    """Run experts whose weights [E 2 F D] and [E D F] are FP8 blocks, as in the released files.

    Inputs and hidden rows are quantised by tiles, `input_scale` and `hidden_scale` "ue8m0" by
    powers of two; gate and up have the input's dtype. Forward only.
    """
    if impl == "triton":
        return kernels().run_scaled_experts(
            x, gate, ids, w_gate_up, w_down, input_scale, hidden_scale
        )
    run = partial(_run, w_gate_up, w_down, input_scale, hidden_scale)
    return by_expert(x, gate, ids, len(w_down.values), run)


def train_experts(
    x: Float[Tensor, "BT D"],
    gate: Float[Tensor, "BT K"],
    ids: Int[Tensor, "BT K"],
    w_gate_up: Float[Tensor, "E 2 F D"],
    w_down: Float[Tensor, "E D F"],
    into: fp8.Recipe,
    out: fp8.Recipe,
    impl: str = "torch",
) -> Float[Tensor, "BT D"]:
    """Run experts, all products of them and of their gradients in FP8 (Figure 6)."""
    if impl == "triton":
        return kernels().train_experts(x, gate, ids, w_gate_up, w_down, into, out)
    run = partial(fp8.gated_experts, w_gate_up, w_down, into, out)
    return by_expert(x, gate, ids, len(w_down), run)


def _run(
    w_gate_up: Scaled,
    w_down: Scaled,
    input_scale: str | None,
    hidden_scale: str | None,
    visits: Float[Tensor, "visits D"],
    load: Int[Tensor, " E"],
) -> Float[Tensor, "visits D"]:
    y, ends = [], [0, *load.cumsum(0).tolist()]
    for e, (first, end) in enumerate(pairwise(ends)):
        rows = quantise(visits[first:end], TILE, input_scale, ACTIVATION_FLOOR)
        gate, up = (
            fp8.scaled_matmul(rows, _of(w_gate_up, e, half), visits.dtype) for half in (0, 1)
        )
        hidden = quantise(swiglu(gate, up), TILE, hidden_scale, ACTIVATION_FLOOR)
        y.append(fp8.scaled_matmul(hidden, _of(w_down, e), visits.dtype))
    return torch.cat(y)


def _of(w: Scaled, *place: int) -> Scaled:
    """Return one matrix of a stack of them."""
    return Scaled(w.values[place], w.scale[place], BLOCK)
