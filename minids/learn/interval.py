"""The mean of a few runs and its 95 % interval: what a chapter says of seeds."""

from collections.abc import Sequence
from statistics import mean, stdev

# Student's t for 95 %, both sides, by the number of runs
_T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def interval(runs: Sequence[float]) -> tuple[float, float]:
    """Return the mean of 2 to 10 runs and half of its 95 % interval (Student's t)."""
    if len(runs) not in _T95:
        raise ValueError(f"an interval needs 2 to 10 runs, got {len(runs)}")
    return mean(runs), _T95[len(runs)] * stdev(runs) / len(runs) ** 0.5
