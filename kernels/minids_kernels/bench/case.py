"""What is measured: a case is one shape of one job; a row is what came out of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from minids_kernels.bench.floors import Rates, Steps, Work

OURS = "minids"  # the side that is measured, where it is a kernel of ours
Call = Callable[[], Any]  # runs once on the device and returns the result
Prepare = Callable[..., Call]  # gets a case's inputs; what it does itself is not timed


class Verdict(NamedTuple):
    """How a result compares with what it should be."""

    text: str
    right: bool
    error: float | None = None  # relative norm against FP64 of the same inputs


_LESS = ("us", "percent_of_memory")  # measures of which less is better


class Goal(NamedTuple):
    """What a kernel should reach: `measure` is a property of Row, or "ratio" to a peer.

    Of times and memory the number is the most that is allowed.
    """

    measure: str
    at_least: float
    peer: str = ""
    instead: "Goal | None" = None  # to reach this one is enough, too

    def judge(self, row: "Row") -> dict[str, Any]:
        """Return the goal in words, the value that the row reached, and whether that suffices.

        Of two goals the one that is nearer to being reached comes first, and is the value's.
        """
        value, words = self._value(row), f"{self.at_least:g} {self._unit()}"
        if self.measure in _LESS:
            reached = None if value is None else value <= self.at_least
            return {"goal": f"{words} at most", "value": value, "reached": reached}
        if self.instead is not None:
            other = self.instead.judge(row)
            theirs = other["value"]
            if theirs is not None and theirs / self.instead.at_least > (value or 0) / self.at_least:
                return other | {"goal": f"{other['goal']} (or {words})"}
            words = f"{words} (or {other['goal']})"
        reached = None if value is None else value >= self.at_least
        return {"goal": words, "value": value, "reached": reached}

    def _value(self, row: "Row") -> float | None:
        return row.ratio(self.peer) if self.measure == "ratio" else getattr(row, self.measure)

    def _unit(self) -> str:
        return {
            "tflops": "TFLOP/s",
            "tb_s": "TB/s",
            "percent_of_copy": "% of the measured copy",
            "percent_of_bandwidth": "% of the datasheet's bandwidth",
            "percent_of_floor": "% of the floor",
            "us": "µs",
            "percent_of_memory": "% of all logits' memory",
            "ratio": f"x {self.peer}",
        }[self.measure]


@dataclass(frozen=True)
class Case:
    """One shape: how to draw its inputs, who computes on them (first: what is measured), a check.

    A side's name is its column.
    """

    job: str
    name: str
    work: Work | Steps
    inputs: Callable[[str], tuple]  # from a device: tensors and tuples of them
    sides: dict[str, Prepare]
    check: Callable[..., Verdict] | None = None  # of a result and the inputs it came from
    goals: tuple[Goal, ...] = ()
    tokens: int = 0  # of a call, where it does a model's work
    layers: int = 0  # of the model, where a call is one of them
    memory_bytes: int = 0  # what a plain implementation would need, where that is the point


Cases = Callable[..., Iterator[Case]]  # a job, cheap to list: nothing is allocated yet


@dataclass
class Side:
    """One implementation in a row; without times, `note` says why."""

    us: float | None = None  # median of all repeats
    spread_us: float | None = None  # their 80th less their 20th percentile
    medians_us: list[float] = field(default_factory=list)  # of each of the rounds
    repeats: int = 0
    right: bool = False  # it ran, and its result is what it should be
    error: float | None = None
    note: str = ""  # how its result compares, or why there is none
    scratch_bytes: int | None = None  # on a GPU: the most that a call needs beside its results


@dataclass
class Row:
    """The result of one case; the first side is ours, ratios above 1 mean that it is faster."""

    job: str
    name: str
    work: Work | Steps
    sides: dict[str, Side]
    datasheet: Rates
    ceilings: Rates
    goals: tuple[Goal, ...]
    tokens: int = 0
    layers: int = 0
    memory_bytes: int = 0

    @property
    def ours(self) -> Side:
        return next(iter(self.sides.values()))

    @property
    def peers(self) -> dict[str, Side]:
        return dict(list(self.sides.items())[1:])

    @property
    def floor_us(self) -> float | None:
        return self.work.us_at(self.datasheet)

    @property
    def bound(self) -> str:
        """Say which of its two floors is the higher one."""
        memory, compute = self.work.memory_us(self.datasheet), self.work.compute_us(self.datasheet)
        if memory is None or compute is None:
            return ""
        return "memory" if memory >= compute else "compute"

    @property
    def percent_of_floor(self) -> float | None:
        return self._percent(self.floor_us)

    @property
    def percent_of_ceiling(self) -> float | None:
        return self._percent(self.work.us_at(self.ceilings))

    @property
    def percent_of_copy(self) -> float | None:
        return self._percent(self.work.memory_us(self.ceilings))

    @property
    def percent_of_bandwidth(self) -> float | None:
        return self._percent(self.work.memory_us(self.datasheet))

    @property
    def us(self) -> float | None:
        return self.ours.us

    @property
    def percent_of_memory(self) -> float | None:
        """Return what a call needs beside its results, of what a plain one would."""
        needed = self.ours.scratch_bytes
        return None if needed is None or not self.memory_bytes else 100 * needed / self.memory_bytes

    @property
    def tflops(self) -> float | None:
        return self._per_us(self.work.operations)

    @property
    def tb_s(self) -> float | None:
        return self._per_us(self.work.moved_bytes)

    @property
    def tokens_per_s(self) -> float | None:
        return None if not self.tokens or self.ours.us is None else 1e6 * self.tokens / self.ours.us

    @property
    def model_us(self) -> float | None:
        """Return what as many such layers take as the model has."""
        return None if not self.layers or self.ours.us is None else self.layers * self.ours.us

    def ratio(self, peer: str) -> float | None:
        """Return a peer's time over ours."""
        theirs, ours = self.sides[peer].us if peer in self.sides else None, self.ours.us
        return None if theirs is None or ours is None else theirs / ours

    def _percent(self, least_us: float | None) -> float | None:
        return None if least_us is None or self.ours.us is None else 100 * least_us / self.ours.us

    def _per_us(self, amount: int) -> float | None:
        """Return millions of `amount` in a microsecond: TFLOP/s, TB/s."""
        return None if not amount or self.ours.us is None else amount / self.ours.us / 1e6

    def as_json(self) -> dict[str, Any]:
        """Return everything, computed columns too."""
        return {
            "job": self.job,
            "name": self.name,
            "moved_bytes": self.work.moved_bytes,
            "operations": self.work.operations,
            "floor_us": self.floor_us,
            "bound": self.bound,
            "percent_of_floor": self.percent_of_floor,
            "percent_of_ceiling": self.percent_of_ceiling,
            "percent_of_copy": self.percent_of_copy,
            "tflops": self.tflops,
            "tb_s": self.tb_s,
            "tokens": self.tokens,
            "tokens_per_s": self.tokens_per_s,
            "layers": self.layers,
            "model_us": self.model_us,
            "memory_bytes": self.memory_bytes,
            "percent_of_memory": self.percent_of_memory,
            "sides": {name: vars(side) for name, side in self.sides.items()},
            "ratios": {name: self.ratio(name) for name in self.peers},
            "goals": [goal.judge(self) for goal in self.goals],
        }
