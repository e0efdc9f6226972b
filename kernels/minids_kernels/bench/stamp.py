"""What a measurement was taken on: card, driver, clocks, versions, commit, date, command."""

import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton

UNKNOWN = "unknown"
_CLOCKS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw")


def stamp(command: str) -> dict[str, Any]:
    """Return what the tables of a run are headed with; `load` is read while the card multiplies."""
    properties = torch.cuda.get_device_properties()
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "l2_mb": round(properties.L2_cache_size / 1e6, 1),
        "idle": clocks(),
        "load": clocks_under_load(),
        **software(command),
    }


def software(command: str) -> dict[str, Any]:
    """Return what needs no card: versions, commit, date (UTC), command."""
    return {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda or UNKNOWN,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
    }


def clocks() -> dict[str, str]:
    """Ask nvidia-smi, which changes nothing, for driver, clocks and power; "unknown" without it."""
    properties = torch.cuda.get_device_properties()
    query = ["nvidia-smi", f"--query-gpu={','.join(_CLOCKS)}", "--format=csv,noheader"]
    text = _output([*query, f"--id=GPU-{properties.uuid}"]) or _output(query)  # of an only card
    fields = [part.strip() for part in text.split(",")]
    if len(fields) != len(_CLOCKS):
        return dict.fromkeys(_CLOCKS, UNKNOWN)
    return dict(zip(_CLOCKS, fields, strict=True))


def clocks_under_load() -> dict[str, str]:
    """Return `clocks` while about a second of products is in the card's queue."""
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    for _ in range(700):
        torch.mm(a, a)
    found = clocks()
    torch.cuda.synchronize()
    return found


def commit() -> str:
    """Return the commit of this checkout, with "+" where files differ from it; else "unknown"."""
    here = ["git", "-C", str(Path(__file__).parent)]
    found = _output([*here, "rev-parse", "--short=12", "HEAD"])
    if not found:
        return UNKNOWN
    return found + (
        "+" if _output([*here, "status", "--porcelain", "--untracked-files=no"]) else ""
    )


def _output(command: list[str]) -> str:
    """Return what a program prints; nothing where it fails, hangs or is not installed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
