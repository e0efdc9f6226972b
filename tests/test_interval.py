"""Student's intervals, against values worked by hand and against chance."""

import pytest
import torch

from minids.learn.interval import interval


def test_three_runs_by_hand():
    # mean 2, standard deviation 1: 4.303 / sqrt(3)
    assert interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(2.4843, abs=1e-4))


@pytest.mark.parametrize("n", range(2, 11))
def test_interval_holds_the_true_mean_95_times_in_100(n):
    runs = torch.randn(4000, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    hits = sum(abs(middle) <= half for middle, half in map(interval, runs.tolist()))
    assert hits / 4000 == pytest.approx(0.95, abs=0.011)  # three standard deviations


@pytest.mark.parametrize("n", [0, 1, 11])
def test_other_numbers_of_runs_are_refused(n):
    with pytest.raises(ValueError, match=f"needs 2 to 10 runs, got {n}"):
        interval([1.0] * n)
