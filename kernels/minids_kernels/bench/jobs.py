"""The jobs by name: each is a file of this folder with a function that yields its cases."""

from minids_kernels.bench import (
    adamw,
    ceilings,
    decode,
    experts,
    experts_bf16,
    gemm,
    levels,
    loss,
    mla_backward,
    mla_decode,
    mla_prefill,
    norm,
    quantise,
    rope,
    router,
    swiglu,
    wgrad,
)
from minids_kernels.bench.case import Cases

_FP8 = (quantise, decode, wgrad, gemm)
_ATTENTION = (mla_backward, mla_prefill, mla_decode)
_SMALL = (router, norm, rope, swiglu)
_LARGE = (loss, experts)
_HUGE = (adamw, experts_bf16)  # whose inputs alone fill a card
# in the order in which they run: what a job leaves of its time goes to those behind it; in each the
# smallest cases come first and the largest are dropped
JOBS: dict[str, Cases] = {
    module.JOB: module.cases
    for module in (ceilings, *_SMALL, *_FP8, *_LARGE, *_ATTENTION, levels, *_HUGE)
}
