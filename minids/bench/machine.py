"""What a measurement was taken on: date, processor, versions. Every log and table carries it.

Paper   none.
Dims    none.
Book    none                            Kernel  none
"""

import importlib.metadata
import platform
from datetime import date
from pathlib import Path
from typing import Any


def machine(threads: int, packages: tuple[str, ...] = ("torch",)) -> dict[str, Any]:
    """Return date, CPU, threads, Python and the versions of `packages`."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():  # Linux
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    return {
        "date": date.today().isoformat(),
        "cpu": cpu,
        "threads": threads,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }
