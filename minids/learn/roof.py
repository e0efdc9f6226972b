"""What chapter 12 puts under a roof: this CPU, cards by their datasheets, V3's products, results.

Nothing is measured on a GPU here: results are read from kernels/results, where there are any.
Machines, points and levels are the tuples that figures/kernels.py draws.
"""

from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

_COPIED, _SIDE, _TIMES = 2**24, 768, 5
_SHOWN = ("o", "kv_b")  # the product with the longest sum, and that with the shortest


def this_cpu() -> Any:
    """Measure a copy and a plain product in FP32, the best of five each: under a second."""
    from figures.kernels import Machine

    source, square = torch.rand(_COPIED), torch.rand(_SIDE, _SIDE)
    target = torch.empty_like(source)
    tb_s = 2 * source.nbytes / _best_s(lambda: target.copy_(source)) / 1e12  # read and written
    tflops = 2 * _SIDE**3 / _best_s(lambda: square @ square) / 1e12
    return Machine("this CPU, FP32", tb_s, tflops)


def cards() -> list[Any]:
    """Return the cards whose datasheets the benchmark knows, with their dense FP8 rates."""
    from minids_kernels.bench.floors import DATASHEETS

    from figures.kernels import Machine

    sheets = DATASHEETS.items()
    return [Machine(f"{name}, FP8", r.tb_s or 0, r.fp8_tflops or 0) for name, r in sheets]


def products(tokens: tuple[int, ...] = (16, 128, 4096)) -> list[Any]:
    """Return V3's products of so many tokens, in FP8, by operations for each byte moved."""
    from minids_kernels.bench.floors import product
    from minids_kernels.bench.shapes import WEIGHTS

    from figures.kernels import Point

    found = []
    for n_tokens in tokens:
        for weight in WEIGHTS:
            if weight.name in _SHOWN:
                work = product(n_tokens, weight.n, weight.k)
                name, family = f"{weight.name}, {n_tokens:,}", f"{n_tokens:,} tokens"
                at = work.operations / work.moved_bytes
                found.append(Point(name, at, family=family))
    return found


def measured(results: Path | None = None) -> list[Any]:
    """Return the same products as cards ran them; none where nothing was measured."""
    from figures.kernels import Point

    return [
        Point(name, row["operations"] / row["moved_bytes"], row["operations"] / us / 1e6, card)
        for card, rows in _latest(results).items()
        for (job, name), row in rows.items()
        if job in ("gemm", "decode") and name.partition(",")[0] in _SHOWN
        if (us := _us(row, "minids"))
    ]


def levels(results: Path | None = None) -> list[tuple[str, list[Any]]]:
    """Return each card's run with its eight levels: percent of the floor, and the peer's."""
    from minids_kernels.levels import LEVELS

    from figures.kernels import Level

    found = []
    for card, rows in _latest(results).items():
        of_job = [row for (job, _), row in rows.items() if job == "levels"]
        run, bars = "", []
        for level in LEVELS:
            name = f"{level.number} {level.name}"
            row = next((r for r in of_job if r["name"].startswith(f"{name},")), None)
            run = row["run"].partition("]")[0].strip("[") if row else run
            bars.append(Level(name, _percent(row, "minids"), _percent(row, "torch.matmul")))
        if run:
            found.append((f"{card}, kernels/results, {run}", bars))
    return found


def _best_s(run: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(_TIMES):
        start = perf_counter()
        run()
        seconds.append(perf_counter() - start)
    return min(seconds)


def _latest(results: Path | None) -> dict[str, Any]:
    from minids_kernels.bench.readme import RESULTS, latest_rows

    return latest_rows(results or RESULTS)


def _us(row: dict[str, Any] | None, side: str) -> float | None:
    """Return a side's time if it has one and its result is right."""
    found = row["sides"].get(side, {}) if row else {}
    return found.get("us") if found.get("right") else None


def _percent(row: dict[str, Any] | None, side: str) -> float | None:
    us = _us(row, side)
    return 100 * row["floor_us"] / us if row and us and row["floor_us"] else None
