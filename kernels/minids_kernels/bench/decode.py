"""Job `decode`: few tokens at a time, so that reading the weights is nearly all there is to do."""

from collections.abc import Iterator

from minids_kernels.bench import gemm, peers
from minids_kernels.bench.case import Case, Goal
from minids_kernels.bench.shapes import WEIGHTS, Weight

JOB = "decode"
GOALS = (Goal("percent_of_bandwidth", 75), Goal("ratio", 1.5, peers.SCALED_MM))


def cases(
    tokens: tuple[int, ...] = (1, 16, 64), weights: tuple[Weight, ...] = WEIGHTS
) -> Iterator[Case]:
    """Yield each weight with each number of tokens, small weights first."""
    for weight in weights:
        for m in tokens:
            yield gemm.case(JOB, m, weight, GOALS)
