"""Time every config that a kernel's file lists, and keep those that beat its rule of thumb.

Where two cases share a row of the table, the later one, which has more to do, decides.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minids_kernels import configs
from minids_kernels.bench.case import Call, Case, Prepare, Side
from minids_kernels.bench.report import replace
from minids_kernels.bench.run import ROUNDS, Bench, attempt, draw, start, summarise, time_once

RESULTS = "tune.json"


@dataclass
class Try:
    """One config of a kernel in one case; without a config it followed its rule of thumb."""

    config: configs.Config | None
    side: Side


@dataclass
class Tuning:
    """What was tried, and the table that came out of it."""

    stamp: dict[str, Any]
    rows: list[dict[str, Any]]  # of configs.json
    tries: list[dict[str, Any]] = field(default_factory=list)


def tune(
    cases: Iterable[Case], bench: Bench, tuning: Tuning, chosen: Sequence[str] = ()
) -> Iterator[None]:
    """Tune the chosen kernels, or all, that each case launches; yields after each case."""
    end = bench.now() + bench.total_s
    for case in cases:
        if bench.now() >= end:
            tuning.tries.append({"case": case.name, "note": "dropped: the time was over"})
            yield
            continue
        bench.timer.warm()
        drawn = draw(case, bench)
        for kernel, shape in launched(case, drawn):
            if not chosen or kernel in chosen:
                configs_of = [config._asdict() for config in configs.candidates(kernel)]
                tries = [try_config(case, bench, drawn, kernel, c) for c in [None, *configs_of]]
                about = {"kernel": kernel, "case": case.name, "shape": shape}
                tuning.tries += [about | {"config": t.config} | vars(t.side) for t in tries]
                keep(tuning, kernel, configs.bucket(shape), tries)
        yield


def launched(case: Case, drawn: list[tuple]) -> list[tuple[str, configs.Shape]]:
    """Return the kernels that ask for a config when our side of a case runs, and their shapes."""
    with configs.trying("", None) as trial:
        attempt(Side(), lambda: ours(case)(*drawn[0])())
    return list(dict.fromkeys(trial.asked))


def ours(case: Case) -> Prepare:
    """Return the side of a case that is measured."""
    return next(iter(case.sides.values()))


def try_config(
    case: Case, bench: Bench, drawn: list[tuple], kernel: str, config: configs.Config | None
) -> Try:
    """Check a config's result, then time it; a wrong one is not timed."""
    side, rounds = Side(), []
    calls: dict[str, list[Call]] = {}
    name = next(iter(case.sides))
    with configs.trying(kernel, config):
        if attempt(side, lambda: start(case, name, side, drawn, calls)):
            for _ in range(ROUNDS if side.right else 0):
                attempt(side, lambda: time_once(bench.timer, calls[name], rounds))
    summarise(side, rounds)
    return Try(config, side)


def keep(tuning: Tuning, kernel: str, shape: configs.Shape, tries: list[Try]) -> None:
    """Put the fastest config into the table if it beats the rule by more than the spread."""
    rule, *others = tries
    card = tuning.stamp["gpu"]
    key = kernel, card, shape
    tuning.rows = [row for row in tuning.rows if _key(row) != key]
    timed = [(each.side.us, n) for n, each in enumerate(others) if each.side.us is not None]
    if not timed or rule.side.us is None:
        return
    us, n = min(timed)
    noise = max(rule.side.spread_us or 0.0, others[n].side.spread_us or 0.0)
    if rule.side.us - us > noise:
        row = {"kernel": kernel, "card": card, "shape": list(shape), "config": others[n].config,
               "us": us, "rule_us": rule.side.us,
               "date": tuning.stamp["date"], "commit": tuning.stamp["commit"]}  # fmt: skip
        configs.check(row)
        tuning.rows.append(row)


def save(tuning: Tuning, table: Path, folder: Path) -> None:
    """Write the table, one row a line, and beside the other results what was tried."""
    lines = ",\n".join(json.dumps(row) for row in sorted(tuning.rows, key=_key))
    replace(table, f"[\n{lines}\n]\n" if lines else "[]\n")
    folder.mkdir(parents=True, exist_ok=True)
    tried = {"stamp": tuning.stamp, "tries": tuning.tries}
    replace(folder / RESULTS, json.dumps(tried, indent=1) + "\n")


def _key(row: dict[str, Any]) -> tuple[str, str, configs.Shape]:
    return row["kernel"], row["card"], tuple(row["shape"])
