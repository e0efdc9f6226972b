"""Gradients of expanded attention: equal to autograd's of the equation, in FP64."""

import math
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_attention import (
    GRADIENT,
    HEADS,
    WIDTHS,
    Expanded,
    draw_expanded,
    error,
    exact_expanded,
    tile_loads,
)
from kernel_inputs import (
    LAYOUTS,
    assert_caught,
    bitwise_equal,
    is_written,
    laid_out,
    poisoned_memory,
)
from minids_kernels import cards, configs, mla_prefill_backward
from minids_kernels.latent import Causal
from minids_kernels.mla_prefill_backward import CANDIDATES, Keys, Queries, gradients
from torch import Tensor

pytestmark = pytest.mark.usefixtures("interpreter")

SCALE = 0.3


def causal(*start: int, device: str = "cpu") -> Causal:
    return Causal(torch.tensor(start, device=device))


def exact(x: Expanded, do: Tensor, mask: Causal | None, scale: float = SCALE) -> list[Tensor]:
    """Return autograd's gradients of the equation, in FP64; leftovers of a cache become 0 first."""
    (_, T, H, _), S = x.q_nope.shape, x.k_nope.shape[1]
    q_nope, q_rope, k_nope, k_rope, v = (part.cpu().double().nan_to_num() for part in x)
    leaves = [part.requires_grad_() for part in (q_nope, q_rope, k_nope, k_rope, v)]
    score = torch.einsum("bthn,bshn->bhts", q_nope, k_nope)
    score = (score + torch.einsum("bthr,bsr->bhts", q_rope, k_rope)) * scale
    if mask is not None:
        at = mask.start.cpu()[:, None] + torch.arange(T)
        sees = torch.arange(S) <= at[..., None]
        if mask.documents is not None:
            number = mask.documents.cpu()
            sees &= number[:, :, None] == number[:, None]
        score = score.masked_fill(~sees[:, None], -math.inf)
        score = score.masked_fill(~sees.any(-1)[:, None, :, None], 0)
        weight = score.softmax(-1) * sees[:, None]
    else:
        weight = score.softmax(-1)
    o = torch.einsum("bhts,bshv->bthv", weight, v)
    return list(torch.autograd.grad(o, leaves, do.cpu().double()))


def saved(x: Expanded, mask: Causal | None, scale: float = SCALE) -> tuple[Tensor, Tensor]:
    """Return what the forward pass keeps: output and log-sum-exp, rounded."""
    o, lse = exact_expanded(x, mask, scale)
    return o.to(x.v), lse.float().to(x.v.device)


def found(
    x: Expanded, do: Tensor, mask: Causal | None, scale: float = SCALE,
    module: ModuleType = mla_prefill_backward,
) -> tuple[Tensor, ...]:  # fmt: skip
    return module.gradients(do, *x, *saved(x, mask, scale), mask, scale)


def drawn(T: int, S: int, heads: int = 2, widths=(24, 8, 40), batch: int = 2, device: str = "cpu",
          dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Expanded, Tensor]:  # fmt: skip
    x = draw_expanded(batch, T, S, heads, widths, dtype, device, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    do = torch.randn(batch, T, heads, widths[2], generator=generator).to(x.v)
    return x, do


def check(x: Expanded, do: Tensor, mask: Causal | None, module=mla_prefill_backward) -> None:
    with poisoned_memory():
        y = found(x, do, mask, module=module)
    wanted = exact(x, do, mask)
    for name, part, one, other in zip(x._fields, x, y, wanted, strict=True):
        assert one.dtype == part.dtype
        assert is_written(one), name
        assert error(one, other) < GRADIENT[part.dtype], name


@pytest.mark.parametrize("dtype", GRADIENT, ids=str)
@pytest.mark.parametrize("mask", [None, "causal", "documents"])
def test_equal_autograd_in_fp64(mask, dtype, device):
    x, do = drawn(70, 70, device=device, dtype=dtype)
    masks = {
        None: None,
        "causal": causal(0, 0, device=device),
        "documents": Causal(
            torch.zeros(2, device=device).long(),
            torch.stack([torch.arange(70) // 20, torch.arange(70) * 7 % 3]).to(device),
        ),
    }
    check(x, do, masks[mask])
