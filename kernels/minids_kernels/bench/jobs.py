"""The jobs by name: each is a file of this folder with a function that yields its cases."""

from minids_kernels.bench import ceilings, decode, gemm, quantise, wgrad
from minids_kernels.bench.case import Cases

# in the order in which they run; in each the smallest cases come first and the largest are dropped
JOBS: dict[str, Cases] = {
    module.JOB: module.cases for module in (ceilings, quantise, decode, wgrad, gemm)
}
