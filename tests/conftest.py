"""What every test shares: a seed, one thread, skips told aloud, no chance in Hypothesis."""

import browser
import hypothesis
import pytest
import torch
from browser import (  # noqa: F401  # fixtures, found by their names
    chromium,
    chromium_path,
    lab,
    lab_page,
    open_chapter,
    site,
    site_page,
    surface,
    touch_page,
    visitor,
)

# derandomize: the same examples on every machine; no deadline: a busy machine is not a failure
hypothesis.settings.register_profile("minids", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("minids")


@pytest.fixture(autouse=True)
def fixed_seed_and_one_thread():
    """Seed torch with 0 and run it on one thread: sums do not depend on the number of cores."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where torch sees no CUDA device; those of pages are slow."""
    skip = pytest.mark.skip(reason="NOT RUN: marked gpu, and torch sees no CUDA device here")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(skip)
        if {"site", "chromium_path"} & set(getattr(item, "fixturenames", [])):
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """Let all tests that miss a browser be one line at the end of the run, with their number."""
    report = yield
    if report.skipped and browser.MISSING in str(report.longrepr):
        report.longrepr = ("tests/browser.py", 1, browser.MISSING)
    return report
