"""One layer as it is published: weights in FP8 blocks, norms and centroids in BF16, on one card.

A layer of minids (minids/block.py) whose matrices are taken out, before any has memory, and parts
put in their place that hold blocks: quantise the input by tiles, multiply, as the release does.
"""

import math

import torch
from torch import Tensor, nn

from minids import fp8
from minids.block import Block
from minids.config import Config
from minids.experts.scaled import run_scaled_experts
from minids.formats.groups import ACTIVATION_FLOOR, BLOCK, TILE, Scaled, dequantise, quantise
from minids.impl import use
from minids.linear import Linear
from minids.moe import Experts


class Stored(nn.Module):
    """A Linear whose weight is FP8 blocks; absorbed products take it in BF16, kept beside them."""

    recipe = None  # nothing of it is trained

    def __init__(self, blocks: Scaled, impl: str):
        super().__init__()
        self.blocks, self.impl = blocks, impl
        self._wide: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        if self._wide is None:
            self._wide = dequantise(self.blocks, torch.bfloat16, self.impl)
        return self._wide

    def forward(self, x: Tensor) -> Tensor:
        tiles = quantise(x.flatten(0, -2), TILE, None, ACTIVATION_FLOOR, self.impl)
        y = fp8.scaled_matmul(tiles, self.blocks, x.dtype, self.impl)
        return y.unflatten(0, x.shape[:-1])


class StoredExperts(nn.Module):
    """Routed experts on FP8 blocks."""

    def __init__(self, w_gate_up: Scaled, w_down: Scaled, impl: str):
        super().__init__()
        self.w_gate_up, self.w_down, self.impl = w_gate_up, w_down, impl

    def forward(self, x: Tensor, gate: Tensor, ids: Tensor) -> Tensor:
        return run_scaled_experts(x, gate, ids, self.w_gate_up, self.w_down, impl=self.impl)


def stored_layer(cfg: Config, device: str, impl: str = "triton") -> Block:
    """Draw an MoE layer of this model in FP8; its matrices are never all in memory otherwise."""
    with torch.device("meta"):
        block = Block(cfg, cfg.n_dense_layers)
    for name, module in list(block.named_modules()):
        parent = block.get_submodule(name.rpartition(".")[0])
        if isinstance(module, Linear):
            blocks = drawn(module.weight.shape, cfg.init_std, device, impl)
            setattr(parent, name.rpartition(".")[2], Stored(blocks, impl))
        elif isinstance(module, Experts):
            stacks = (drawn(w.shape, cfg.init_std, device, impl) for w in module.parameters())
            setattr(parent, name.rpartition(".")[2], StoredExperts(*stacks, impl))
    return ready(block, cfg, device, impl)


def trained_layer(cfg: Config, device: str, impl: str = "triton") -> Block:
    """Draw an MoE layer that trains in FP8: one BF16 copy of each weight is all that is kept."""
    with torch.device("meta"):
        block = Block(cfg, cfg.n_dense_layers).bfloat16()
    return ready(block, cfg, device, impl)


def ready(block: Block, cfg: Config, device: str, impl: str) -> Block:
    """Give what is still on the meta device memory and numbers; the router's bias stays FP32."""
    block.to_empty(device=device)
    with torch.no_grad():
        for name, weight in block.named_parameters():
            if name.endswith("gain"):
                weight.data = torch.ones_like(weight, dtype=torch.bfloat16)
            else:
                weight.data = weight.data.bfloat16().normal_(0.0, cfg.init_std)
        for name, bias in block.named_buffers():
            assert name.endswith("bias"), f"{name} has no rule"
            bias.data = torch.zeros_like(bias, dtype=torch.float32)
    use(block, impl)
    return block


def drawn(shape: torch.Size, std: float, device: str, impl: str) -> Scaled:
    """Draw a matrix, or a stack of them, in FP8 blocks; one matrix at a time is in BF16."""
    *stack, rows, cols = shape
    values = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
    groups = tuple(math.ceil(n / size) for n, size in zip((rows, cols), BLOCK, strict=True))
    scale = torch.empty((*stack, *groups), device=device)
    matrices = zip(values.view(-1, rows, cols), scale.view(-1, *groups), strict=True)
    for matrix, its_scale in matrices:
        wide = torch.randn(rows, cols, dtype=torch.bfloat16, device=device) * std
        blocks = quantise(wide, BLOCK, impl=impl)
        matrix.copy_(blocks.values)
        its_scale.copy_(blocks.scale)
    return Scaled(values, scale, BLOCK)
