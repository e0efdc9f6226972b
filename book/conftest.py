"""What nbval leaves out: time, memory and share of compared cells of each chapter, with limits.

A chapter gets one more test, `limits`, after its last cell; a table of all chapters ends the run.
"""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import psutil
import pytest
from nbval.plugin import IPyNbCell, IPyNbFile

collect_ignore = ["_build", "_tools", "demos", "teach"]  # copies, tools, and what others test
MIN_COMPARED = 0.6
MEASURED = "chapter"  # the name under which a report carries what was measured


@dataclass
class Measured:
    """What running a chapter cost, and how much of it was compared."""

    name: str
    says_s: str  # what its header box promises
    seconds: float = 0.0
    busy_s: float = 0.0  # of the processor: much less than seconds where the machine is shared
    peak_mib: float = 0.0
    cells: int = 0
    compared: int = 0


class LimitError(Exception):
    """A chapter passed a limit."""


class Limits(pytest.Item):
    """The last test of a chapter: it stayed within its limits."""

    def runtest(self) -> None:
        chapter = measured(self.parent)
        self.user_properties.append((MEASURED, asdict(chapter)))
        limit_s = self.config.getoption("book_limit_s")
        if chapter.seconds > limit_s:
            raise LimitError(
                f"{chapter.name} took {chapter.seconds:.0f} s, more than {limit_s:g}; "
                f"its kernel had {chapter.busy_s:.0f} s of the processor"
            )
        if chapter.compared < MIN_COMPARED * chapter.cells:
            raise LimitError(
                f"{chapter.compared} of {chapter.cells} cells of {chapter.name} are compared, "
                f"must be {MIN_COMPARED:.0%} or more: fewer nbval-ignore-output"
            )

    def repr_failure(self, excinfo: pytest.ExceptionInfo) -> str:
        return str(excinfo.value)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, f"{self.path.name}::limits"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--book-limit-s", type=float, default=120.0, help="seconds that a chapter may take (120)"
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Add the test of the limits after the last cell of each chapter."""
    last = {item.parent: number for number, item in enumerate(items) if is_cell(item)}
    for chapter, number in reversed(last.items()):
        items.insert(number + 1, Limits.from_parent(chapter, name="limits"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Measure a cell, the start of the kernel included where it is the first."""
    start = perf_counter()
    result = yield
    if is_cell(item):
        measured(item.parent).seconds += perf_counter() - start
    return result


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Count a cell, and look at its kernel before it may be stopped."""
    if is_cell(item):
        chapter = measured(item.parent)
        chapter.cells += 1
        executed = item.cell.execution_count is not None
        chapter.compared += executed and item.options["check"] and not item.options["skip"]
        chapter.peak_mib = max(chapter.peak_mib, kernel_peak_mib(item.parent))
        chapter.busy_s = max(chapter.busy_s, kernel_busy_s(item.parent))


def is_cell(item: pytest.Item) -> bool:
    return isinstance(item, IPyNbCell)


def measured(chapter: IPyNbFile) -> Measured:
    """Return what was measured of a chapter so far."""
    if not hasattr(chapter, "measured"):
        text = chapter.path.read_text(encoding="utf-8")
        says = re.search(r"min to read, (\d+) s to run", text)
        chapter.measured = Measured(chapter.path.name, says[1] if says else "")
    return chapter.measured


def kernel_pid(chapter: IPyNbFile) -> int | None:
    alive = chapter.kernel is not None and chapter.kernel.is_alive()
    return chapter.kernel.km.provisioner.pid if alive else None


def kernel_busy_s(chapter: IPyNbFile) -> float:
    """Return the seconds of processor that the kernel has had, on all cores together."""
    pid = kernel_pid(chapter)
    return sum(psutil.Process(pid).cpu_times()[:2]) if pid else 0.0


def kernel_peak_mib(chapter: IPyNbFile) -> float:
    """Return the most memory that the kernel held: its peak on Linux, elsewhere its size now."""
    if (pid := kernel_pid(chapter)) is None:
        return 0.0
    status = Path(f"/proc/{pid}/status")
    peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(peak[1]) / 2**10 if peak else psutil.Process(pid).memory_info().rss / 2**20


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print one line a chapter."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    chapters = {
        value["name"]: value
        for report in reports
        for key, value in getattr(report, "user_properties", ())
        if key == MEASURED
    }
    if not chapters:
        return
    terminalreporter.section("chapters")
    head = ("chapter", "says", "took", "processor", "peak memory", "compared")
    names = "{:<28} {:>6} {:>8} {:>10} {:>12}  {}".format(*head)
    terminalreporter.line(names)
    for name, at in sorted(chapters.items()):
        says = f"{at['says_s']} s" if at["says_s"] else "-"
        terminalreporter.line(
            f"{name:<28} {says:>6} {at['seconds']:>6.1f} s {at['busy_s']:>8.1f} s "
            f"{at['peak_mib']:>8,.0f} MiB  "
            f"{at['compared']} of {at['cells']} cells, {at['compared'] / at['cells']:.0%}"
        )
    terminalreporter.line(f"all: {sum(at['seconds'] for at in chapters.values()):.1f} s")
