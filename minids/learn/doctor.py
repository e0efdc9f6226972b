"""Does this machine have what the book needs: what is there, what is missing, how to get it.

Paper   none.
Dims    none.
Book    book/00_start.ipynb             Kernel  none
"""

import importlib
import os
import platform
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import NamedTuple

# no import of minids here: `python minids/learn/doctor.py` also runs where torch is broken

CORE, BOOK, TEST, KERNELS = ".", ".[book]", ".[test]", ".[kernels]"  # what pip is asked for
USE = {CORE: "minids itself", BOOK: "chapters", TEST: "comparisons", KERNELS: "chapter 12"}
PACKAGES = {
    CORE: ["torch", "numpy", "einops", "jaxtyping", "safetensors", "tokenizers", "tqdm", "typer"],
    BOOK: ["matplotlib", "jupyterlab", "ipywidgets"],
    TEST: ["transformers"],
    KERNELS: ["triton"],
}
MEMORY_GIB, DISK_GIB = 4, 1  # what the tour uses, with room to spare


class Found(NamedTuple):
    """One package; `problem` is empty, "missing", or says why it does not import."""

    name: str
    source: str
    version: str
    problem: str = ""


def look(name: str, source: str) -> Found:
    """Find one package, and import it if minids itself needs it: a broken one is no use."""
    try:
        if source == CORE:
            importlib.import_module(name)
        elif find_spec(name) is None:
            return Found(name, source, "", "missing")
        return Found(name, source, version(name))
    except PackageNotFoundError:
        return Found(name, source, "version unknown")  # a folder without metadata
    except Exception as error:  # broken binaries raise what they like
        missing = isinstance(error, ModuleNotFoundError) and error.name == name
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        reason = "missing" if missing else f"broken: {first_line}"
        return Found(name, source, "", reason)


def memory_gib() -> float | None:
    """Return the machine's memory in GiB, None where the system does not say (Windows)."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):
        return None


def gpus() -> list[str]:
    """Return name and memory of each CUDA device that torch sees; none without torch."""
    try:
        cuda = importlib.import_module("torch").cuda
        devices = [cuda.get_device_properties(n) for n in range(cuda.device_count())]
    except Exception:  # a missing torch, or a driver that does not fit: said elsewhere, or no GPU
        return []
    return [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in devices]


def minids_version() -> str:
    """Return the installed version."""
    try:
        return version("minids")
    except PackageNotFoundError:
        return "not installed (run from its folder)"


def machine(disk_gib: float) -> list[tuple[str, str]]:
    """Return what the computer is, line by line."""
    memory = memory_gib()
    return [
        ("Python", f"{platform.python_version()} ({platform.system()} {platform.machine()})"),
        ("minids", minids_version()),
        ("cores", str(os.cpu_count() or "unknown")),
        ("memory", "unknown" if memory is None else f"{memory:.1f} GiB"),
        ("disk", f"{disk_gib:.1f} GiB free here"),
        ("GPU", "; ".join(gpus()) or "none that torch can use: all chapters run on the CPU"),
    ]


def advice(found: list[Found], disk_gib: float) -> list[str]:
    """Return what is missing with the command that brings it, and what is too small."""
    pip, lines = f"{sys.executable} -m pip install", []
    broken = [package.name for package in found if package.problem.startswith("broken")]
    if broken:
        lines.append(f"broken: {pip} --force-reinstall {' '.join(broken)}")
    for source, use in USE.items():
        missing = [at.name for at in found if at.source == source and at.problem == "missing"]
        if missing and source == KERNELS and platform.system() != "Linux":
            lines.append("triton (chapter 12) exists for Linux only")
        elif missing:
            names = ", ".join(missing)
            lines.append(f'{names} ({use}), in the folder of pyproject.toml: {pip} -e "{source}"')
    memory = memory_gib()
    if memory is not None and memory < MEMORY_GIB:
        lines.append(f"memory: {memory:.1f} GiB, the tour wants {MEMORY_GIB}: close other programs")
    if disk_gib < DISK_GIB:
        lines.append(f"disk: {disk_gib:.1f} GiB free, training wants {DISK_GIB}: make room")
    return lines


def verdict(found: list[Found]) -> str:
    """Say in a line which chapters this machine can do."""
    lacking = {package.source for package in found if package.problem}
    if CORE in lacking:
        return "minids does not work yet: do what stands above, then run this again."
    if BOOK in lacking:
        return "You can train and generate in the terminal (minids tour); chapters need the above."
    if KERNELS in lacking:
        return "You can do every chapter but 12 (kernels)."
    if not gpus():
        return "You can do every chapter; the timings of chapter 12 (kernels) need an NVIDIA GPU."
    return "You can do every chapter, with the GPU where it pays."


def wanted() -> list[tuple[str, str]]:
    """Return name and source of each package; Colab is a Jupyter of its own and needs no other."""
    pairs = [(name, source) for source, names in PACKAGES.items() for name in names]
    return [pair for pair in pairs if pair[0] != "jupyterlab" or "google.colab" not in sys.modules]


def doctor(show: Callable[[str], object] = print) -> bool:
    """Show machine, packages, what is missing and a verdict; return whether minids itself works."""
    found = [look(name, source) for name, source in wanted()]
    disk_gib = shutil.disk_usage(".").free / 2**30
    for name, value in machine(disk_gib):
        show(f"{name:13} {value}")
    for package in found:
        show(f"{package.name:13} {package.problem or package.version}")
    for line in advice(found, disk_gib):
        show(f"to do         {line}")
    show(verdict(found))
    return not any(package.problem for package in found if package.source == CORE)


if __name__ == "__main__":
    raise SystemExit(0 if doctor() else 1)
