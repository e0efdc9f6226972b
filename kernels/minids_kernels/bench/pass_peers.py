"""Who else has what moves bytes and little else: liger-kernel, fla, torchao behind torch.

A package that is not installed raises ImportError, a call that it no longer has AttributeError or
TypeError: each becomes a line of the report.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from minids.formats.groups import TILE, Scaled
from minids_kernels.bench import passes, peers
from minids_kernels.bench.case import Call, Prepare

LIGER, FLA, CUT, TORCH = "liger-kernel", "fla", "cut-cross-entropy", "torch"
TORCHAO = "torch, torchao Triton"  # the function by torch, then quantised by torchao
_LIGER, _FLA = "liger_kernel.transformers.functional", "fla.modules"


def liger(name: str, *settings: Any, trained: bool = False) -> Prepare:
    """A function of liger-kernel, forward or with gradients."""

    def prepare(*inputs: Any) -> Call:
        function = getattr(importlib.import_module(_LIGER), f"liger_{name}")
        way = passes.trained if trained else passes.forward
        return way(function, *settings)(*inputs)

    return prepare


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """torch's own RMSNorm."""
    return F.rms_norm(x, [x.shape[-1]], gain, eps)


def liger_added(x: Tensor, y: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """liger-kernel's sum and its norm."""
    norm, total = importlib.import_module(_LIGER).liger_fused_add_rms_norm(x, y, gain, eps)
    return total, norm


def then_torchao(function: Callable[..., Tensor], *settings: Any) -> Prepare:
    """A function, compiled, then torchao's quantisation by tiles."""

    def prepare(*inputs: Any) -> Call:
        module = importlib.import_module(peers._TORCHAO)
        make = passes.forward(function, *settings, compiled=True)(*inputs)

        def run() -> Scaled:
            values, scale = module.triton_fp8_blockwise_act_quant_lhs(make())
            return Scaled(values, scale, TILE)

        return run

    return prepare


def fla_rotary(x: Tensor, phase: Tensor, *dy: Tensor) -> Call:
    """fla's rotation of neighbouring channels; it wants cosines in the dtype of x."""
    rotate = importlib.import_module(f"{_FLA}.rotary").rotary_embedding
    cos, sin = (part[0].to(x.dtype).contiguous() for part in (phase.real, phase.imag))
    turn = partial(rotate, cos=cos, sin=sin, interleaved=True)
    return passes.trained(turn)(x, *dy) if dy else partial(turn, x)


def liger_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """liger-kernel's; it writes the gradient over the logits while it goes forward."""
    function = importlib.import_module(_LIGER).liger_cross_entropy
    return function(logits, targets, reduction="sum")


def fla_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """fla's; in backward it writes the gradient over the logits."""
    module = importlib.import_module(f"{_FLA}.fused_cross_entropy")
    return module.FusedCrossEntropyLoss(reduction="sum", inplace_backward=True)(logits, targets)


def liger_linear(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """liger-kernel's fused linear cross-entropy, by chunks of tokens."""
    function = importlib.import_module(_LIGER).liger_fused_linear_cross_entropy
    return function(hidden, weight, targets, reduction="sum")


def fla_linear(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """fla's, by chunks of tokens too."""
    module = importlib.import_module(f"{_FLA}.fused_linear_cross_entropy")
    return module.FusedLinearCrossEntropyLoss(reduction="sum")(hidden, targets, weight)


def cut_linear(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """cut-cross-entropy's: no logits in memory, and none of the least gradients."""
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return function(hidden, weight, targets, reduction="sum")
