"""Triton kernels of minids, one file a kernel; each wrapper has the signature of its reference."""
