"""The jobs by name: each is a file of this folder with a function that yields its cases."""

from minids_kernels.bench import (
    ceilings,
    decode,
    gemm,
    levels,
    mla_backward,
    mla_decode,
    mla_prefill,
    quantise,
    wgrad,
)
from minids_kernels.bench.case import Cases

_FP8 = (quantise, decode, wgrad, gemm)
_ATTENTION = (mla_backward, mla_prefill, mla_decode)
# in the order in which they run: the one with most cases gets the time that all others leave; in
# each the smallest cases come first and the largest are dropped
JOBS: dict[str, Cases] = {
    module.JOB: module.cases for module in (ceilings, levels, *_FP8, *_ATTENTION)
}
