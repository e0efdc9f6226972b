"""Triton kernels of minids, one file a kernel; each wrapper has the signature of its reference."""

from minids_kernels.cards import interpreted
from minids_kernels.ffn_swiglu import gated_backward, gated_quantise, swiglu, swiglu_quantise
from minids_kernels.fp8_dequantise import dequantise
from minids_kernels.fp8_matmul import scaled_matmul
from minids_kernels.fp8_quantise import quantise, quantise_twice, requantise
from minids_kernels.latent import Causal, Pages
from minids_kernels.loss_cross_entropy import cross_entropy
from minids_kernels.loss_linear import target_sum
from minids_kernels.mla_decode import attend_latent
from minids_kernels.mla_prefill import attend_expanded
from minids_kernels.moe_align import align
from minids_kernels.moe_experts import run_experts, run_scaled_experts, train_experts
from minids_kernels.norm_rms import (
    add_rms_norm,
    add_rms_norm_quantise,
    rms_norm,
    rms_norm_quantise,
)
from minids_kernels.rope_rotate import rotate
from minids_kernels.router_topk import Routes, route
from minids_kernels.scaled import Scaled
from minids_kernels.slots import Slots
from minids_kernels.train_adamw import AdamW

__all__ = [
    "AdamW",
    "Causal",
    "Pages",
    "Routes",
    "Scaled",
    "Slots",
    "add_rms_norm",
    "add_rms_norm_quantise",
    "align",
    "attend_expanded",
    "attend_latent",
    "cross_entropy",
    "dequantise",
    "gated_backward",
    "gated_quantise",
    "interpreted",
    "quantise",
    "quantise_twice",
    "requantise",
    "rms_norm",
    "rms_norm_quantise",
    "rotate",
    "route",
    "run_experts",
    "run_scaled_experts",
    "scaled_matmul",
    "swiglu",
    "swiglu_quantise",
    "target_sum",
    "train_experts",
]
