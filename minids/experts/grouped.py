"""Experts over sorted rows: the visits of one expert are neighbours, and meet its matrices once.

Paper   DeepSeek-V3 (arXiv:2412.19437), section 2.1.2, Eqs. 12-14; DeepSeekMoE, arXiv:2401.06066.
Dims    BT tokens, D width, E experts, K experts a token, F expert width; visits: the BT*K rows.
Book    book/07_moe.ipynb               Kernel  minids_kernels/moe_experts.py
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from minids.balance import expert_load
from minids.fused.swiglu import swiglu
from minids.impl import kernels


def run_experts(
    x: Float[Tensor, "BT D"],
    gate: Float[Tensor, "BT K"],
    ids: Int[Tensor, "BT K"],
    w_gate_up: Float[Tensor, "E 2 F D"],
    w_down: Float[Tensor, "E D F"],
    impl: str = "torch",
) -> Float[Tensor, "BT D"]:
    """Run each expert once on the rows of the tokens that chose it, sum each token's (Eq. 12)."""
    if impl == "triton":
        return kernels().run_experts(x, gate, ids, w_gate_up, w_down)
    return by_expert(x, gate, ids, len(w_down), partial(_run, w_gate_up, w_down))


def _run(w_gate_up: Tensor, w_down: Tensor, visits: Tensor, load: Tensor) -> Tensor:
    halves = matmul_by_expert(visits, rearrange(w_gate_up, "e two f d -> e (two f) d"), load)
    gate, up = halves.chunk(2, dim=-1)
    return matmul_by_expert(swiglu(gate, up), w_down, load)


def by_expert(
    x: Float[Tensor, "BT D"],
    gate: Float[Tensor, "BT K"],
    ids: Int[Tensor, "BT K"],
    experts: int,
    run: Callable[[Tensor, Tensor], Tensor],
) -> Float[Tensor, "BT D"]:
    """Sort the BT*K visits by expert, `run` them with each expert's load, sum each token's."""
    order = rearrange(ids, "bt k -> (bt k)").argsort(stable=True)
    place = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=x.device))
    # lookups and their gradients add in a fixed order on every device, index_add does not
    visits = F.embedding(order // ids.shape[-1], x)  # rows of one expert are neighbours now
    y = run(visits, expert_load(ids, experts))
    rows = place.unflatten(-1, ids.shape)
    return F.embedding_bag(rows, y, mode="sum", per_sample_weights=gate.to(y.dtype))  # Eq. 12


def one_token(
    x: Float[Tensor, "1 D"],
    gate: Float[Tensor, "1 K"],
    ids: Int[Tensor, "1 K"],
    weights: Callable[[int], tuple[Tensor, Tensor]],
) -> Float[Tensor, "1 D"]:
    """Run a single token's experts one after the other; `weights` gives an expert's matrices."""
    y = torch.zeros_like(x)
    for weight, e in zip(gate.to(x.dtype).unbind(-1), ids[0].tolist(), strict=True):
        y = y + weight * run_expert(x, *weights(e))
    return y


def run_expert(
    x: Float[Tensor, "rows D"], w_gate_up: Float[Tensor, "2 F D"], w_down: Float[Tensor, "D F"]
) -> Float[Tensor, "rows D"]:
    """SwiGLU with given weights."""
    gate, up = F.linear(x, rearrange(w_gate_up, "two f d -> (two f) d")).chunk(2, dim=-1)
    return F.linear(swiglu(gate, up), w_down)


def dense_loop(
    x: Float[Tensor, "BT D"],
    gate: Float[Tensor, "BT K"],
    ids: Int[Tensor, "BT K"],
    w_gate_up: Float[Tensor, "E 2 F D"],
    w_down: Float[Tensor, "E D F"],
) -> Float[Tensor, "BT D"]:
    """The reference of run_experts: each sees each token, weight 0 if not chosen (Eq. 14)."""
    weight = torch.zeros(len(x), len(w_down), dtype=gate.dtype, device=x.device)
    weight = weight.scatter(-1, ids, gate).to(x.dtype)
    y = torch.zeros_like(x)
    for e, matrices in enumerate(zip(w_gate_up, w_down, strict=True)):
        y = y + weight[:, e, None] * run_expert(x, *matrices)
    return y


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
