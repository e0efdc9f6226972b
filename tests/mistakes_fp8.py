"""Wrong on purpose: a layer's three FP8 products, each with a mistake that someone made.

Paper   DeepSeek-V3 (arXiv:2412.19437), section 3.3; test_mistakes.py has the property that exposes
        each of them.
Dims    x [M, I], weight [O, I] and dy [M, O] give y [M, O], dx [M, I] and dw [O, I].
"""

import torch

from minids import Transformer
from minids.formats.bits import E5M2, round_to
from minids.fp8 import BLOCK, COLUMN, TILE, Scaled, dequantise, quantise, scaled_matmul


def three(x, weight, dy, *, tiles=None, blocks=None, matmul=scaled_matmul, cached=None, dx=None):
    """Do the three products as minids does, but for what is given."""
    tiles = quantise(x, TILE) if tiles is None else tiles
    blocks = quantise(weight, BLOCK) if blocks is None else blocks
    cached = dequantise(tiles) if cached is None else cached
    columns = quantise(dy, COLUMN).mT, quantise(cached, COLUMN).mT
    dx = matmul(quantise(dy, TILE), blocks.mT) if dx is None else dx
    return matmul(tiles, blocks), dx, matmul(*columns)


def plain(a: Scaled, b: Scaled) -> torch.Tensor:
    return dequantise(a) @ dequantise(b).mT


def scale_divided(x, weight, dy, scale_fmt=None):
    """Reads `weight_scale_inv` as its name sounds."""

    def matmul(a, b):
        return scaled_matmul(a._replace(scale=1 / a.scale), b._replace(scale=1 / b.scale))

    return three(x, weight, dy, matmul=matmul)


def weight_gradient_of_the_input(x, weight, dy, scale_fmt=None):
    """Keeps x in 16 or 32 bits for backward, and multiplies by that."""
    return three(x, weight, dy, cached=x)


def gradients_in_e5m2(x, weight, dy, scale_fmt=None):
    """As FP8 recipes before V3 had it."""
    scale = dy.abs().amax(-1, keepdim=True) / E5M2.max
    rounded = round_to(dy / scale, E5M2) * scale
    return three(x, weight, dy, dx=rounded @ dequantise(quantise(weight, BLOCK)))


def tiles_along_tokens(x, weight, dy, scale_fmt=None):
    return three(x, weight, dy, tiles=quantise(x, COLUMN), matmul=plain)


def one_scale_a_tensor(x, weight, dy, scale_fmt=None):
    return three(x, weight, dy, tiles=quantise(x, tuple(x.shape)), matmul=plain)


def weights_by_tiles(x, weight, dy, scale_fmt=None):
    """A scale for each row of a block, also in backward."""
    return three(x, weight, dy, blocks=quantise(weight, TILE), matmul=plain)


def weights_by_tiles_of_each_product(x, weight, dy, scale_fmt=None):
    """As before, but backward quantises the transposed weight once more."""
    again = quantise(weight.mT.contiguous(), TILE)
    dx = scaled_matmul(quantise(dy, TILE), again)
    return three(x, weight, dy, blocks=quantise(weight, TILE), dx=dx, matmul=plain)


def by_given_scale(x: torch.Tensor, scale: torch.Tensor, clamp: bool = True) -> Scaled:
    """Quantise rows of at most 128 numbers."""
    values = x / scale
    values = values.clamp(-448, 448) if clamp else values
    return Scaled(values.to(torch.float8_e4m3fn), scale.float(), TILE)


def delayed_scaling(clamp: bool):
    """Scales by the largest number of the call before: nothing must be read twice."""
    largest = []

    def products(x, weight, dy, scale_fmt=None):
        largest.append(x.abs().amax(-1, keepdim=True))
        scale = largest[max(0, len(largest) - 2)] / 448
        return three(x, weight, dy, tiles=by_given_scale(x, scale, clamp))

    return products


def powers_of_two_to_nearest(clamp: bool):
    """Rounds the exponent of a scale down where that is nearer."""

    def products(x, weight, dy, scale_fmt=None):
        scale = (x.abs().amax(-1, keepdim=True) / 448).log2().round().exp2()
        return three(x, weight, dy, tiles=by_given_scale(x, scale, clamp))

    return products


def scale_of_nothing(x, weight, dy, scale_fmt=None):
    """Divides by the largest number, whatever it is."""
    return three(x, weight, dy, tiles=by_given_scale(x, x.abs().amax(-1, keepdim=True) / 448))


def scaled_after_the_sum(x, weight, dy, scale_fmt=None):
    """Adds the products of all groups, then applies the first one's scales."""

    def matmul(a, b):
        scale = a.scale[:, :1] * b.scale[0, 0]
        return (a.values.float() @ b.values.float().mT) * scale

    return three(x, weight, dy, matmul=matmul)


def head_in_fp8(cfg):
    model = Transformer(cfg)
    model.head.recipe = model.layers[0].attn.w_dkv.recipe
    return model
