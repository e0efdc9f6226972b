"""What every test shares: a seed, one thread, GPU tests skipped aloud, no chance in Hypothesis."""

import hypothesis
import pytest
import torch

# derandomize: the same examples on every machine; no deadline: a busy machine is not a failure
hypothesis.settings.register_profile("minids", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("minids")


@pytest.fixture(autouse=True)
def fixed_seed_and_one_thread():
    """Seed torch with 0 and run it on one thread: sums do not depend on the number of cores."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where torch sees no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="NOT RUN: marked gpu, and torch sees no CUDA device here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
