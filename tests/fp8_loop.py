"""The FP8 recipe once more, a group at a time, in numpy: nothing of minids, nothing of torch's FP8.

Paper   DeepSeek-V3 (arXiv:2412.19437), sections 3.3.1-3.3.3, Figures 6 and 7; the floor of 1e-4 and
        the rounding of scales: inference/kernel.py of the release.
Dims    as in minids/fp8.py: M tokens, I and O widths of a weight [O, I].
Differs from minids in the way to a value: a format is the list of all its values, and the nearest
        one is looked up; a scale's power of two is found by logarithm; sums are FP64. Gated
        gradients come from torch's autograd, not from a formula.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

Array = NDArray[np.float32] | NDArray[np.float64]
LARGEST = 448.0


def values_of(exponent_bits: int, mantissa_bits: int, n_codes: int) -> NDArray[np.float64]:
    """List what the first `n_codes` codes without a sign stand for, in their order."""
    bias, steps = 2 ** (exponent_bits - 1) - 1, 2**mantissa_bits
    listed = []
    for code in range(n_codes):
        exponent, mantissa = divmod(code, steps)
        if exponent == 0:
            listed.append(mantissa / steps * 2.0 ** (1 - bias))
        else:
            listed.append((1 + mantissa / steps) * 2.0 ** (exponent - bias))
    return np.array(listed)


E4M3 = values_of(4, 3, 127)  # code 127 is NaN
E5M6 = values_of(5, 6, 31 * 64)  # the exponent 31 holds infinity and NaN


def nearest(x: Array, values: NDArray[np.float64]) -> NDArray[np.float32]:
    """Round to the nearest listed value, a tie to the even code."""
    middles = (values[1:] + values[:-1]) / 2
    size = np.abs(np.asarray(x, np.float64))
    code = np.searchsorted(middles, size)  # a tie finds the lower code
    tie = (code < len(middles)) & (middles[np.minimum(code, len(middles) - 1)] == size)
    code = np.where(tie & (code % 2 == 1), code + 1, code)
    return np.copysign(values[code], x).astype(np.float32)


class Grouped(NamedTuple):
    """Values and, spread over them, the scales of their groups: the matrix is their product."""

    values: NDArray[np.float32]
    scale: NDArray[np.float32]

    @property
    def T(self) -> "Grouped":
        return Grouped(self.values.T, self.scale.T)

    @property
    def matrix(self) -> NDArray[np.float32]:
        return self.values * self.scale


def quantise(
    x: Array, rows: int, cols: int, power_of_two: bool = False, floor: float = 0.0
) -> Grouped:
    """Walk over the groups; each is divided by its own scale and rounded to E4M3."""
    x = np.asarray(x, np.float32)
    values, scales = np.zeros_like(x), np.ones_like(x)
    for top in range(0, x.shape[0], rows):
        for left in range(0, x.shape[1], cols):
            place = np.s_[top : top + rows, left : left + cols]
            largest = np.float32(max(np.abs(x[place]).max(), np.float32(floor)))
            if largest == 0:
                continue
            scale = largest / np.float32(LARGEST)
            if power_of_two:
                scale = np.float32(2.0 ** math.ceil(math.log2(scale)))
            values[place], scales[place] = nearest(x[place] / scale, E4M3), scale
    return Grouped(values, scales)


def product(a: Grouped, b: Grouped) -> NDArray[np.float64]:
    """Return a b^T: 128 products are summed, then scaled, then added in FP32."""
    total = np.zeros((len(a.values), len(b.values)), np.float32)
    for start in range(0, a.values.shape[1], 128):
        part = np.s_[:, start : start + 128]
        summed = a.values[part].astype(np.float64) @ b.values[part].T.astype(np.float64)
        scale = np.outer(a.scale[:, start].astype(np.float64), b.scale[:, start])
        total += (summed * scale).astype(np.float32)
    return total.astype(np.float64)


class Roles(NamedTuple):
    """Which scales of a layer are powers of two (3.3.3), and whether its input waits in E5M6."""

    weight: bool = False
    inputs: bool = False
    gradient: bool = False
    e5m6: bool = False


class Products(NamedTuple):
    """A layer's output and the gradients of its inputs and of its weight."""

    y: NDArray[np.float64]
    dx: NDArray[np.float64] | tuple[NDArray[np.float64], NDArray[np.float64]]
    dw: NDArray[np.float64]


def linear(x: Array, w: Array, dy: Array, roles: Roles) -> Products:
    """Fprop, Dgrad and Wgrad of Figure 6."""
    tiles, blocks = quantise(x, 1, 128, roles.inputs, 1e-4), quantise(w, 128, 128, roles.weight)
    dx = product(quantise(dy, 1, 128, roles.gradient), blocks.T)
    cached = tiles.matrix
    if roles.e5m6:
        cached = nearest(np.asarray(x, np.float32) / tiles.scale, E5M6) * tiles.scale
    return Products(product(tiles, blocks), dx, _weight_gradient(dy, cached, roles))


def _weight_gradient(dy: Array, cached: Array, roles: Roles) -> NDArray[np.float64]:
    """Sum over tokens: groups are 128 tokens of one channel, of both operands."""
    by_output, by_input = (
        quantise(dy, 128, 1, roles.gradient),
        quantise(cached, 128, 1, roles.inputs),
    )
    return product(by_output.T, by_input.T)


def gated_linear(gate: Array, up: Array, w: Array, dy: Array, roles: Roles) -> Products:
    """The same behind SwiGLU: FP8 copies of gate and up are what backward knows of its input."""
    forward = linear(_swiglu(gate, up)[0], w, dy, roles)
    halves = [quantise(half, 1, 128, roles.weight).matrix for half in (gate, up)]
    hidden, gradient = _swiglu(*halves)
    d_gate, d_up = gradient(np.asarray(forward.dx))
    return Products(forward.y, (d_gate, d_up), _weight_gradient(dy, hidden, roles))


def _swiglu(gate: Array, up: Array):
    """Return silu(gate) * up in FP32, and what autograd in FP64 makes of its gradient."""
    a, b = torch.tensor(gate), torch.tensor(up)
    wide = [part.double().requires_grad_() for part in (a, b)]

    def gradient(d_hidden: Array) -> list[NDArray[np.float64]]:
        hidden = F.silu(wide[0]) * wide[1]
        return [part.numpy() for part in torch.autograd.grad(hidden, wide, torch.tensor(d_hidden))]

    return (F.silu(a) * b).numpy(), gradient
