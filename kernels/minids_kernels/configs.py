"""Tile sizes that were timed on a card; kernels fall back on their own rule of thumb.

Layout  configs.json, written by `python -m minids_kernels.bench tune`: one row a kernel, card and
        shape, with the time that won, the rule's time, date and commit. The first number of a shape
        (rows, tokens) stands for all down to half of it; the others, a model's widths, are exact.
Grid    none: this file holds no kernel.

A kernel is named by its file and the class of its configs, as "fp8_matmul.Prefill".
"""

import importlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from minids_kernels.cards import Card

FILE = Path(__file__).with_name("configs.json")
FIELDS = ("kernel", "card", "shape", "config", "us", "rule_us", "date", "commit")

Shape = tuple[int, ...]
Config = dict[str, Any]


class Trial(NamedTuple):
    """A config that is being timed, and which kernels asked for one, for which shapes."""

    kernel: str
    config: Config | None  # None: its rule of thumb
    asked: list[tuple[str, Shape]]


_trial: ContextVar[Trial | None] = ContextVar("trial", default=None)


def find(kernel: str, shape: Shape, card: Card) -> Config | None:
    """Return the tuned config of a kernel for this shape on this card; None where none was tuned.

    Raises ValueError, with the row, for a table that does not fit the kernels.
    """
    trial = _trial.get()
    if trial is not None:
        trial.asked.append((kernel, shape))
        if trial.kernel == kernel:
            return trial.config
    return _table().get((kernel, card.name, bucket(shape)))


def bucket(shape: Shape) -> Shape:
    """Return the shape whose row also serves this one: rows rounded up to a power of two."""
    rows, *widths = shape
    return (1 << max(rows - 1, 0).bit_length(), *widths)


@contextmanager
def trying(kernel: str, config: Config | None) -> Iterator[Trial]:
    """Give this config to every launch of a kernel in this context, whatever the table says."""
    trial = Trial(kernel, config, [])
    token = _trial.set(trial)
    try:
        yield trial
    finally:
        _trial.reset(token)


def candidates(kernel: str) -> Sequence[Any]:
    """Return the configs that a kernel's file lists for it; ValueError for an unknown kernel."""
    file, _, name = kernel.partition(".")
    try:
        if not file.isidentifier():
            raise ImportError
        listed = importlib.import_module(f"minids_kernels.{file}").CANDIDATES
    except (ImportError, AttributeError):
        listed = ()
    found = [config for config in listed if type(config).__name__ == name]
    if not found:
        raise ValueError(f"no kernel file lists candidates of {kernel!r}: name it as FILE.CLASS")
    return found


def read(path: Path) -> dict[tuple[str, str, Shape], Config]:
    """Return the table of a file by kernel, card and bucket; ValueError shows the row refused."""
    table = {}
    for row in json.loads(path.read_text(encoding="utf-8")):
        key = check(row)
        if key in table:
            raise _refusal(row, "is there twice: keep one of the two")
        table[key] = row["config"]
    return table


def check(row: dict[str, Any]) -> tuple[str, str, Shape]:
    """Return the key of a row that fits its kernel; else ValueError with the row's text."""
    if sorted(row) != sorted(FIELDS):
        raise _refusal(row, f"must have exactly the fields {', '.join(FIELDS)}")
    shape = tuple(row["shape"])
    if not shape or bucket(shape) != shape:
        raise _refusal(row, "must start its shape with a power of two")
    try:
        legal = [config._asdict() for config in candidates(row["kernel"])]
    except ValueError as error:
        raise _refusal(row, f"names no kernel: {error}") from None
    if unknown := sorted(row["config"].keys() - legal[0].keys()):
        raise _refusal(row, f"sets {', '.join(unknown)}, which {row['kernel']} does not have")
    if row["config"] not in legal:
        raise _refusal(row, f"is none of the candidates in the file of {row['kernel']}")
    return row["kernel"], row["card"], shape


def _refusal(row: dict[str, Any], rule: str) -> ValueError:
    return ValueError(f"{FILE.name}: a row {rule}; tune again or delete it: {json.dumps(row)}")


@cache
def _table() -> dict[tuple[str, str, Shape], Config]:
    return read(FILE)
