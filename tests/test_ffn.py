import math

import fp8_loop
import numpy as np
import torch

from minids import fp8
from minids.ffn import SwiGLU

# sums of at most 11 products in another order, in FP32
TOLERANCE = 1e-6
# FP32 rounding, relative norm; one value of 100 rounded to another FP8 code would move it by 3e-3
FP8_TOLERANCE = 3e-4


def drawn(dim: int, hidden_dim: int) -> SwiGLU:
    ffn = SwiGLU(dim, hidden_dim)
    for weight in ffn.parameters():
        weight.data.normal_(0.0, 0.5)
    return ffn


def test_by_hand():
    """silu(2) * 3 = 2 / (1 + e^-2) * 3 = 5.2847825, and silu(-2) * 5 = -1.1920292."""
    ffn = SwiGLU(1, 2)
    ffn.w_gate.weight.data = torch.tensor([[2.0], [-2.0]])
    ffn.w_up.weight.data = torch.tensor([[3.0], [5.0]])
    ffn.w_down.weight.data = torch.tensor([[1.0, 10.0]])
    expected = torch.tensor([5.2847825 - 11.920292])
    torch.testing.assert_close(ffn(torch.ones(1)), expected, rtol=TOLERANCE, atol=0)


def test_equals_a_loop():
    ffn = drawn(5, 11)
    x = torch.randn(2, 3, 5)
    gate, up, down = (w.weight.double() for w in (ffn.w_gate, ffn.w_up, ffn.w_down))
    expected = torch.zeros(2, 3, 5, dtype=torch.float64)
    for b in range(2):
        for t in range(3):
            for f in range(11):
                opened = sum((gate[f, d] * x[b, t, d]).item() for d in range(5))
                value = sum((up[f, d] * x[b, t, d]).item() for d in range(5))
                hidden = opened / (1 + math.exp(-opened)) * value
                for d in range(5):
                    expected[b, t, d] += down[d, f].item() * hidden
    torch.testing.assert_close(ffn(x).double(), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_up_is_linear_and_gate_is_not():
    ffn = drawn(4, 6)
    x = torch.randn(3, 4)
    y = ffn(x)
    ffn.w_up.weight.data *= 2
    torch.testing.assert_close(ffn(x), 2 * y, rtol=TOLERANCE, atol=TOLERANCE)
    ffn.w_up.weight.data /= 2
    ffn.w_gate.weight.data *= 2
    assert not torch.allclose(ffn(x), 2 * y, rtol=0.01)


def test_a_closed_gate_lets_nothing_through():
    ffn = drawn(4, 6)
    ffn.w_gate.weight.data.zero_()
    assert torch.equal(ffn(torch.randn(3, 4)), torch.zeros(3, 4))


def test_three_matrices_and_gradients_in_all():
    ffn = drawn(7, 3)
    assert sum(weight.numel() for weight in ffn.parameters()) == 3 * 7 * 3
    ffn(torch.randn(5, 7)).square().sum().backward()
    assert all(w.grad is not None and w.grad.any() for w in ffn.parameters())


def test_in_fp8_equals_the_loop():
    """Two layers that read x, one behind the product; dX adds what comes through gate and up."""
    roles, ffn = fp8_loop.Roles(), SwiGLU(130, 70, fp8.MOST)
    for weight in ffn.parameters():
        weight.data.normal_()
    x, dy = torch.randn(5, 130, requires_grad=True), torch.randn(5, 130)
    y = ffn(x)
    w_gate, w_up, w_down = (weight.detach().numpy() for weight in ffn.parameters())
    gate, up = (layer(x).detach().numpy() for layer in (ffn.w_gate, ffn.w_up))
    down = fp8_loop.gated_linear(gate, up, w_down, dy.numpy(), roles)
    d_halves = [half.astype(np.float32) for half in down.dx]
    halves = [fp8_loop.linear(x.detach().numpy(), w, d_half, roles)
              for w, d_half in zip((w_gate, w_up), d_halves, strict=True)]  # fmt: skip
    ours = [y, *torch.autograd.grad(y, [x, *ffn.parameters()], dy)]
    loop = [down.y, halves[0].dx + halves[1].dx, halves[0].dw, halves[1].dw, down.dw]
    for one, other in zip(ours, loop, strict=True):
        gap = np.linalg.norm(one.detach().numpy() - other)
        assert gap <= FP8_TOLERANCE * np.linalg.norm(other)
