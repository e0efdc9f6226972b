"""Run jobs: every side of a case on the same inputs, checked before it is timed, timed twice."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minids_kernels.bench import ceilings, clock
from minids_kernels.bench.case import Call, Case, Row, Side
from minids_kernels.bench.clock import Timer
from minids_kernels.bench.floors import Rates

JOB_S = 150.0  # no kernel's job takes longer, however much time is left
ROUNDS = 2  # each side is timed twice, the others in between: what drifts shows in the spread


@dataclass(frozen=True)
class Bench:
    """Where and how long to measure."""

    device: str
    timer: Timer
    cache_bytes: int  # of the card's L2
    datasheet: Rates
    total_s: float = math.inf  # for all jobs; sides and cases left by then are dropped, and named
    now: Callable[[], float] = time.monotonic
    job_s: float = JOB_S


@dataclass
class Report:
    """What a run found; `stamp` says on what."""

    stamp: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)  # cases for which the time did not last
    stopped: str = ""  # why the run ended before its end

    @property
    def wrong(self) -> list[str]:
        """Return the cases whose measured side failed or gave a wrong result."""
        rows = [row for row in self.rows if not row.ours.right]
        return [f"{row.job}: {row.name}: {row.ours.note}" for row in rows]


def run(jobs: dict[str, list[Case]], bench: Bench, report: Report) -> Iterator[None]:
    """Measure job by job, adding to the report; yields after each case.

    Job `ceilings`, where it is among them, goes first: later rows are compared with it.
    """
    order, end = sorted(jobs, key=lambda name: name != ceilings.JOB), bench.now() + bench.total_s
    for n, job in enumerate(order):
        bench.timer.warm()
        share = (end - bench.now()) / (len(order) - n)  # what a job leaves is for those behind it
        deadline = bench.now() + min(share, bench.job_s)
        for case in jobs[job]:
            if bench.now() < deadline:
                reached = ceilings.reached(report.rows)
                report.rows.append(measure(case, bench, deadline, reached))
                torch.cuda.empty_cache()  # for the next case's shapes; does nothing on a CPU
            else:
                report.dropped.append(f"{job}: {case.name}")
            yield


def measure(case: Case, bench: Bench, deadline: float, reached: Rates) -> Row:
    """Return the row of a case; a side that fails is a note in it, and so is one dropped."""
    torch.manual_seed(0)
    sides = {name: Side() for name in case.sides}
    whole = (case.goals, case.tokens, case.layers, case.memory_bytes)
    row = Row(case.job, case.name, case.work, sides, bench.datasheet, reached, *whole)
    drawn: list[tuple] = []
    if not attempt(row.ours, lambda: drawn.extend(draw(case, bench))):
        return row
    calls: dict[str, list[Call]] = {}
    for name, side in sides.items():
        if side is not row.ours and bench.now() >= deadline:
            side.note = "dropped, the job's time was over"
        else:
            attempt(side, partial(start, case, name, side, drawn, calls))
    times: dict[str, list[list[float]]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name in calls:
            attempt(sides[name], partial(time_once, bench.timer, calls[name], times[name]))
    for name, rounds in times.items():
        summarise(sides[name], rounds)
    return row


def draw(case: Case, bench: Bench) -> list[tuple]:
    """Return a case's inputs and as many copies as no cache can hold, or clock.COPIES in all."""
    inputs = case.inputs(bench.device)
    sets = math.ceil(clock.CACHES * bench.cache_bytes / case.work.moved_bytes)
    return [inputs, *(duplicate(inputs) for _ in range(min(sets, clock.COPIES) - 1))]


def start(
    case: Case, name: str, side: Side, drawn: list[tuple], calls: dict[str, list[Call]]
) -> None:
    """Check what a side makes of a copy of the inputs, then prepare it for every set of them."""
    prepare = case.sides[name]
    call = prepare(*duplicate(drawn[0]))
    result, side.scratch_bytes = with_memory(call) if case.memory_bytes else (call(), None)
    del call
    side.right = True
    if case.check is not None:
        side.note, side.right, side.error = case.check(result, *drawn[0])
    calls[name] = [prepare(*inputs) for inputs in drawn]


def with_memory(call: Call) -> tuple[Any, int | None]:
    """Return a result, and on a GPU the most bytes that the second call had beside its result."""
    result = call()
    if not torch.cuda.is_available():
        return result, None
    del result  # the first call also compiled, and fetched what stays
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    return result, torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()


def time_once(timer: Timer, calls: list[Call], rounds: list[list[float]]) -> None:
    """Add one round of times."""
    rounds.append(timer.measure(calls))


def attempt(side: Side, step: Callable[[], Any]) -> bool:
    """Take a step; say whether it went well, or note in one line what it raised."""
    try:
        step()
    except ImportError as error:
        side.note = f"not installed: {error.name or error}"
    except Exception as error:  # whatever a peer raises must not end the run
        first = str(error).strip().partition("\n")[0]
        side.note = f"failed: {type(error).__name__}: {first[:160]}"
    else:
        return True
    side.right = False
    return False


def summarise(side: Side, rounds: Sequence[Sequence[float]]) -> None:
    """Fill in the median of all repeats and their spread; nothing where a round is missing."""
    if len(rounds) < ROUNDS:
        return
    times = [us for repeats in rounds for us in repeats]
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    side.us, side.spread_us = statistics.median(times), fifths[-1] - fifths[0]
    side.medians_us = [statistics.median(repeats) for repeats in rounds]
    side.repeats = len(times)


def duplicate(inputs: tuple) -> tuple:
    """Return copies in memory of their own."""
    parts = [
        x.clone() if isinstance(x, Tensor) else duplicate(x) if isinstance(x, tuple) else x
        for x in inputs
    ]
    return tuple(parts) if type(inputs) is tuple else type(inputs)(*parts)
