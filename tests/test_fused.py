"""Steps that kernels make in one pass are the steps, one after the other."""

import pytest
import torch

from minids.formats.groups import COLUMN, TILE, Scaled, dequantise, quantise
from minids.fused.norm import add_rms_norm, add_rms_norm_quantise, rms_norm_quantise
from minids.fused.swiglu import gated_backward, gated_quantise, swiglu, swiglu_quantise
from minids.norm import RMSNorm

FP32 = 1e-6  # relative, a few operations


@pytest.fixture
def norm() -> RMSNorm:
    norm = RMSNorm(130, 1e-6)
    torch.nn.init.normal_(norm.gain, 1.0, 0.3)
    return norm


def equal(ours, theirs) -> bool:
    return all(map(torch.equal, ours[:2], theirs[:2])) and ours[2] == theirs[2]


def test_norm_behind_a_residual_path(norm):
    x, y = torch.randn(2, 3, 130), torch.randn(2, 3, 130)
    total, normed = add_rms_norm(x, y, norm.gain, norm.eps)
    assert torch.equal(total, x + y)
    assert torch.equal(normed, norm(x + y))


def test_norm_before_an_fp8_product(norm):
    x, y = torch.randn(2, 5, 130).unbind()
    how = ("ue8m0", 1e-4)
    assert equal(rms_norm_quantise(x, norm.gain, 1e-6, *how), quantise(norm(x), TILE, *how))
    total, codes = add_rms_norm_quantise(x, y, norm.gain, 1e-6, *how)
    assert torch.equal(total, x + y)
    assert equal(codes, quantise(norm(x + y), TILE, *how))


def test_swiglu_by_hand():
    # silu(0) = 0, silu(-inf) is not asked; silu(1) = 1 / (1 + 1/e)
    gate, up = torch.tensor([0.0, 1.0]), torch.tensor([5.0, 3.0])
    assert swiglu(gate, up).tolist() == pytest.approx([0.0, 3 / (1 + 2.718281828**-1)])


def test_hidden_rows_and_their_halves_are_quantised_alike():
    gate, up = torch.randn(2, 5, 130).unbind()
    hidden, *halves = gated_quantise(gate, up, "ue8m0", None, 1e-4)
    assert equal(hidden, quantise(swiglu(gate, up), TILE, "ue8m0", 1e-4))
    assert equal(hidden, swiglu_quantise(gate, up, "ue8m0", 1e-4))
    assert all(equal(*pair) for pair in zip(halves, map(quantise, (gate, up)), strict=True))


def test_gradients_of_the_halves_are_autograds():
    """Of the numbers that the FP8 copies stand for."""
    gate, up, d_hidden = torch.randn(3, 200, 130).unbind()
    halves = quantise(gate), quantise(up)
    wide = [dequantise(half).requires_grad_() for half in halves]
    want = torch.autograd.grad(swiglu(*wide), wide, d_hidden)
    *got, hidden = gated_backward(d_hidden, *halves, "ue8m0", torch.float32)
    for ours, theirs in zip(got, want, strict=True):
        assert (ours - theirs).norm() <= FP32 * theirs.norm()
    assert equal(hidden, quantise(swiglu(*wide).detach(), COLUMN, "ue8m0"))


def test_what_kernels_return_is_what_the_references_return(interpreter):
    """Annotations are checked in tests: a tuple of another module would not pass."""
    pytest.importorskip("triton", reason="NOT RUN: kernels need Triton, made for Linux")
    gate, up, gain = torch.randn(3, 130), torch.randn(3, 130), torch.ones(130)
    for impl in ("torch", "triton"):
        halves = gated_quantise(gate, up, impl=impl)
        results = (
            *halves,
            swiglu_quantise(gate, up, impl=impl),
            gated_backward(gate, *halves[1:], impl=impl)[2],
            rms_norm_quantise(gate, gain, 1e-6, impl=impl),
            add_rms_norm_quantise(gate, up, gain, 1e-6, impl=impl)[1],
        )
        assert all(type(part) is Scaled for part in results)
