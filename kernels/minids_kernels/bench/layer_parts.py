"""One layer as it is published: weights in FP8 blocks, norms and centroids in BF16, on one card.

A layer of minids (minids/block.py) whose matrices are taken out, before any has memory, and parts
put in their place that hold blocks: quantise the input by tiles, multiply, as the release does.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minids import Transformer, fp8
from minids.block import Block
from minids.config import Config
from minids.experts.scaled import run_scaled_experts
from minids.formats.groups import ACTIVATION_FLOOR, BLOCK, TILE, Scaled, dequantise, quantise
from minids.impl import use
from minids.linear import Linear
from minids.moe import Experts
from minids.router import Router

# a weight and its gradient in BF16, a turned FP8 copy that waits, another while products are made
_TRAINED_BYTES = 2 + 2 + 1 + 0.5
_ACTIVATION_BYTES = 8e9  # of 4,096 tokens; slots of visits may be twice as many as visits


class Stack(NamedTuple):
    """Layers behind each other; with what stands before and behind them, a whole model."""

    cfg: Config
    blocks: nn.ModuleList
    model: Transformer | None = None

    def enter(self, x: Tensor) -> Tensor:
        """Return the states before the layers: of words, their embeddings."""
        return x if self.model is None else F.embedding(x, self.model.embed)

    def leave(self, x: Tensor) -> Tensor:
        """Return the states behind the layers, or the logits of each row's last word."""
        return x if self.model is None else self.model.head(self.model.norm(x[:, -1:]))


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
            self._wide = dequantise(self.blocks, torch.bfloat16, impl=self.impl)
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


def stored_layer(cfg: Config, device: str, impl: str = "triton") -> Stack:
    """Draw an MoE layer of this model in FP8; its matrices are never all in memory otherwise."""
    with torch.device("meta"):
        block = Block(cfg, cfg.n_dense_layers)
    for name, module in list(block.named_modules()):
        parent = block.get_submodule(name.rpartition(".")[0])
        if isinstance(module, Linear):
            blocks = drawn(module.weight.shape, cfg.init_std, device, impl)
            setattr(parent, name.rpartition(".")[2], Stored(blocks, impl))
        elif isinstance(module, Experts):
            into, out = (drawn(w.shape, cfg.init_std, device, impl) for w in module.parameters())
            setattr(parent, name.rpartition(".")[2], StoredExperts(into, out, impl))
    return ready(cfg, [block], device, impl)


def trained_layer(cfg: Config, device: str, impl: str = "triton") -> Stack:
    """Draw an MoE layer that trains in FP8, its weights in BF16.

    Raises RuntimeError where gradients, FP8 copies and activations would not fit beside them.
    """
    with torch.device("meta"):
        block = Block(cfg, cfg.n_dense_layers)
    n_weights = sum(weight.numel() for weight in block.parameters())
    if device != "cpu":
        need, free = _TRAINED_BYTES * n_weights + _ACTIVATION_BYTES, torch.cuda.mem_get_info()[0]
        if need > free:
            raise RuntimeError(
                f"training needs about {need / 1e9:.0f} GB, {free / 1e9:.0f} are free"
            )
    return ready(cfg, [block], device, impl)


def whole_model(cfg: Config, device: str, impl: str = "triton") -> Stack:
    """Draw a model in BF16."""
    with torch.device("meta"):
        model = Transformer(cfg)
    return ready(cfg, model.layers, device, impl, model)


def ready(
    cfg: Config,
    blocks: Iterable[nn.Module],
    device: str,
    impl: str,
    model: Transformer | None = None,
) -> Stack:
    """Give what is on the meta device memory and numbers in BF16; routers' biases stay FP32."""
    stack = Stack(cfg, nn.ModuleList(blocks), model)
    whole = stack.blocks if model is None else model
    whole.bfloat16().to_empty(device=device)
    with torch.no_grad():
        for name, weight in whole.named_parameters():
            weight.fill_(1.0) if name.endswith("gain") else weight.normal_(0.0, cfg.init_std)
        for module in whole.modules():
            if isinstance(module, Router) and module.bias is not None:
                module.bias = nn.Buffer(torch.zeros(cfg.n_routed_experts, device=device))
    use(whole, impl)
    return stack


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
