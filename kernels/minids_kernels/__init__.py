"""Triton kernels of minids, one file a kernel; each wrapper has the signature of its reference."""

from minids_kernels.cards import interpreted
from minids_kernels.scaled import Scaled

__all__ = ["Scaled", "interpreted"]
