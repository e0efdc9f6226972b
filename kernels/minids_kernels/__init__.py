"""Triton kernels of minids, one file a kernel; each wrapper has the signature of its reference."""

from minids_kernels.cards import interpreted
from minids_kernels.fp8_dequantise import dequantise
from minids_kernels.fp8_matmul import scaled_matmul
from minids_kernels.fp8_quantise import quantise, quantise_twice, requantise
from minids_kernels.latent import Causal, Pages
from minids_kernels.mla_decode import attend_latent
from minids_kernels.mla_prefill import attend_expanded
from minids_kernels.scaled import Scaled

__all__ = [
    "Causal",
    "Pages",
    "Scaled",
    "attend_expanded",
    "attend_latent",
    "dequantise",
    "interpreted",
    "quantise",
    "quantise_twice",
    "requantise",
    "scaled_matmul",
]
