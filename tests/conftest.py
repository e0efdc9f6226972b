"""What every test shares: a seed, one thread, skips told aloud, no chance in Hypothesis.

Kernels are interpreted where torch sees no GPU, and run where it sees one, by the same tests; those
that only a GPU can run are marked `gpu`.
"""

import contextlib
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

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

HAS_TRITON = find_spec("triton") is not None  # it exists for Linux alone
if HAS_TRITON and not torch.cuda.is_available():
    # Triton reads it where a kernel is defined, so it must be set before a test imports kernels
    os.environ.setdefault("TRITON_INTERPRET", "1")

# derandomize: the same examples on every machine; no deadline: a busy machine is not a failure
hypothesis.settings.register_profile("minids", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("minids")


@pytest.fixture(autouse=True)
def fixed_seed_and_one_thread():
    """Seed torch with 0 and run it on one thread: sums do not depend on the number of cores."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def device() -> str:
    """Return where kernels run: "cpu" in Triton's interpreter, else "cuda"."""
    from minids_kernels import cards

    return "cpu" if cards.interpreted() else "cuda"


@pytest.fixture(scope="module")
def interpreter() -> Iterator[None]:
    """Give Triton's interpreter right numbers for BF16 and FP8; on a GPU do nothing."""
    from minids_kernels import cards
    from triton_shim import shimmed

    with shimmed() if cards.interpreted() else contextlib.nullcontext():
        yield


class WithoutTriton(pytest.Module):
    """A file of kernel tests where Triton is not installed: one skip instead of an error."""

    def collect(self):
        pytest.skip("NOT RUN: Triton is not installed here (it exists for Linux)")


def pytest_pycollect_makemodule(module_path: Path, parent) -> pytest.Module | None:
    """Do not import kernels where there is no Triton."""
    if module_path.name.startswith("test_kernel_") and not HAS_TRITON:
        return WithoutTriton.from_parent(parent, path=module_path)
    return None


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where torch sees no CUDA device; those of pages are slow.

    Where it sees one, all that run on `device` are tests of that GPU: `-m gpu` chooses them too.
    """
    skip = pytest.mark.skip(reason="NOT RUN: marked gpu, and torch sees no CUDA device here")
    for item in items:
        fixtures = set(getattr(item, "fixturenames", []))
        if "device" in fixtures and torch.cuda.is_available():
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(skip)
        if {"site", "chromium_path"} & fixtures:
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """Let all tests that miss a browser be one line at the end of the run, with their number."""
    report = yield
    if report.skipped and browser.MISSING in str(report.longrepr):
        report.longrepr = ("tests/browser.py", 1, browser.MISSING)
    return report
