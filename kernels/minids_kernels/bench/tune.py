"""Time every config that a kernel's file lists, and keep those that beat its rule of thumb.

Where two cases share a row of the table, the later one, which has more rows, decides.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minids_kernels import configs
from minids_kernels.bench.case import Case, Cases, Side
from minids_kernels.bench.report import replace
from minids_kernels.bench.run import ROUNDS, Bench, attempt, draw, start, summarise, time_once

RESULTS = "tune.json"


@dataclass
class Try:
    """One config of one case; without a config the kernel followed its rule of thumb."""

    case: str
    config: configs.Config | None
    side: Side = field(default_factory=Side)
    asked: list[configs.Shape] = field(default_factory=list)


@dataclass
class Tuning:
    """What was tried, and the table that came out of it."""

    stamp: dict[str, Any]
    rows: list[dict[str, Any]]  # of configs.json
    tries: list[dict[str, Any]] = field(default_factory=list)


def tune(cases: Iterable[Case], bench: Bench, tuning: Tuning) -> Iterator[None]:
    """Try case by case; yields after each one, whose row is then in the table or out of it.

    Raises ValueError where a case names a kernel that it does not launch.
    """
    end = bench.now() + bench.total_s
    for case in cases:
        if bench.now() >= end:
            tuning.tries.append({"case": case.name, "note": "dropped: the time was over"})
            yield
            continue
        bench.timer.warm()
        drawn = draw(case, bench)
        listed = [None, *(config._asdict() for config in configs.candidates(case.config))]
        tries = [try_config(case, bench, drawn, config) for config in listed]
        asked = {shape for each in tries for shape in each.asked}
        if len(asked) != 1:
            raise ValueError(f"{case.name} asks for {len(asked)} shapes of {case.config}, not one")
        shape = asked.pop()
        for each in tries:
            tuning.tries.append({"kernel": case.config, "case": case.name, "shape": shape,
                                 "config": each.config, **vars(each.side)})  # fmt: skip
        keep(tuning, case.config, configs.bucket(shape), tries)
        yield


def try_config(case: Case, bench: Bench, drawn: list[tuple], config: configs.Config | None) -> Try:
    """Check a config's result, then time it; a wrong one is not timed."""
    found, calls, rounds = Try(case.name, config), {}, []
    ours = next(iter(case.sides))
    with configs.trying(case.config, config) as trial:
        if attempt(found.side, lambda: start(case, ours, found.side, drawn, calls)):
            for _ in range(ROUNDS if found.side.right else 0):
                attempt(found.side, lambda: time_once(bench.timer, calls[ours], rounds))
    summarise(found.side, rounds)
    found.asked = trial.asked
    return found


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


def tunable(jobs: dict[str, Cases]) -> dict[str, list[Case]]:
    """Return the cases of each kernel that has a table."""
    found: dict[str, list[Case]] = {}
    for job in jobs.values():
        for case in job():
            if case.config:
                found.setdefault(case.config, []).append(case)
    return found


def _key(row: dict[str, Any]) -> tuple[str, str, configs.Shape]:
    return row["kernel"], row["card"], tuple(row["shape"])
