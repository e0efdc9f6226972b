"""Logs of experiments that take longer than a chapter should: who ran what, when, on what.

Each experiment `minids/learn/experiments/<stem>.py` keeps its results beside it in `<stem>.json`;
figures and chapters read them, and `python -m minids.learn.experiments.<stem>` makes them anew.
"""

import json
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import torch

from minids.bench.machine import machine

LIMIT_BYTES = 200_000  # a log is shown and shipped: it stays small


def write(stem: str, results: dict[str, Any], *, command: str, seconds: float) -> Path:
    """Write `<stem>.json` with what made it; `seconds` is how long that took.

    ValueError, with nothing written, where `results` is no JSON or the file would pass 200 kB.
    """
    stamped = {
        "command": command,
        "seconds": round(seconds),
        "machine": machine(torch.get_num_threads()),
        "results": results,
    }
    try:
        text = json.dumps(stamped, indent=1, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"results of {stem!r} must be plain JSON: {error}") from None
    if len(text) > LIMIT_BYTES:
        raise ValueError(
            f"the log of {stem!r} must stay under {LIMIT_BYTES:,} B, got {len(text):,}"
        )
    path = Path(str(_folder().joinpath(f"{stem}.json")))
    path.write_text(text, encoding="utf-8")
    return path


def read(stem: str) -> dict[str, Any]:
    """Return a log: command, seconds, machine with date, results; ValueError if there is none."""
    try:
        return json.loads(_folder().joinpath(f"{stem}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"no log {stem!r}; `python -m minids.learn.experiments.{stem}` makes it"
        ) from None


def _folder() -> Traversable:
    return resources.files("minids.learn.experiments")
