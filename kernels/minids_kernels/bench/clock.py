"""Times of calls on a GPU: cold caches, warm clocks, no launches of the host in between."""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from triton.testing import do_bench

from minids_kernels.bench.case import Call

# Below this, events around single calls would also time the host's launches: calls are captured
# in a CUDA graph instead. Above, the host is ahead: clearing the cache takes the GPU 90 us.
LONG_US = 100.0
_LAUNCHES = 200  # in a graph: its own launch, some 10 us, is then nothing to a call
_REPLAYS = 15
_REPEATS_MS = 60  # of a long call, in all
CACHES = 5  # inputs rotate through this many times the L2 cache, so that each call finds it cold
COPIES = 256  # of inputs at most: a few kilobytes stay in the cache, as behind what wrote them


class Timer(Protocol):
    """What a benchmark needs of a clock; tests put another in its place."""

    def measure(self, calls: Sequence[Call]) -> list[float]:
        """Return the microseconds of repeats; `calls` do the same on different memory."""
        ...

    def warm(self) -> None:
        """Bring the clocks to where they stay under load."""
        ...


class CudaTimer:
    """Events around long calls, replays of a graph for short ones."""

    def measure(self, calls: Sequence[Call]) -> list[float]:
        """Return the microseconds of repeats, without the first calls, which compile."""
        for call in calls:
            call()
        torch.cuda.synchronize()
        if _elapsed_us(lambda: [call() for call in calls]) / len(calls) >= LONG_US:
            times: Any = do_bench(calls[0], rep=_REPEATS_MS, return_mode="all")
            return [1000 * ms for ms in times]
        return _replayed(calls)

    def warm(self) -> None:
        """Multiply for a third of a second."""
        a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
        for _ in range(200):
            torch.mm(a, a)
        torch.cuda.synchronize()


def _replayed(calls: Sequence[Call]) -> list[float]:
    """Return the mean time of a call in each replay of a graph that holds many of them.

    Results are held for a pass over the inputs: memory that is written again at once stays in the
    cache and costs less.
    """
    passes = math.ceil(_LAUNCHES / len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = []
        for _ in range(passes):
            held = [call() for call in calls]
        del held
    graph.replay()
    torch.cuda.synchronize()
    return [_elapsed_us(graph.replay) / (passes * len(calls)) for _ in range(_REPLAYS)]


def _elapsed_us(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return 1000 * start.elapsed_time(end)
