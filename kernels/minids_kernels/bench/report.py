"""Write what was measured: bench.json for programs, bench.md for people, a table for a terminal."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from minids_kernels.bench import ceilings
from minids_kernels.bench.case import Row, Side
from minids_kernels.bench.run import Report

FORMAT = 1  # of bench.json
JSON, MARKDOWN = "bench.json", "bench.md"
NOTHING = "–"
# of a peer that counts: BF16 products round their operands too, to 2.9e-3; or ours and a bit more
PEER_ERROR, AS_OURS = 1e-2, 1.1
HOW_TO_READ = """\
Times are medians, ± the 80th less the 20th percentile of all repeats, each side timed twice, on
random numbers, caches cold, clocks warm. The floor is the least time by the card's datasheet; the
ceiling is the least time by the copy and the plain product (FP8, or BF16 for attention) measured in
this run. A ratio is a peer's time over ours: above 1 we are faster. Errors are relative norms
against FP64 on the same inputs, of FP8 codes against torch's; rounding to BF16 alone gives 1.7e-3.
"bit-equal" is with the reference. What a peer wants laid out otherwise (keys beside their rotary
part, latents out of their pages) is laid out once and not timed."""


def save(report: Report, folder: Path) -> None:
    """Write both files, each in one step: who reads them never finds a half."""
    folder.mkdir(parents=True, exist_ok=True)
    replace(folder / JSON, json.dumps(as_json(report), indent=1) + "\n")
    replace(folder / MARKDOWN, markdown(report))


def replace(path: Path, text: str) -> None:
    """Write a file in one step."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def as_json(report: Report) -> dict[str, Any]:
    """Return the report as JSON has it, computed columns too."""
    return {
        "format": FORMAT,
        "stamp": report.stamp,
        "ceilings": ceilings.reached(report.rows)._asdict(),
        "stopped": report.stopped,
        "dropped": report.dropped,
        "rows": [row.as_json() for row in report.rows],
    }


def markdown(report: Report) -> str:
    """Return the whole report: what it was measured on, one table a job, what is missing."""
    stamp = report.stamp
    parts = [f"# Kernels on {stamp['gpu']}, {stamp['date'][:10]}"]
    if report.stopped:
        parts.append(f"**Not complete: {report.stopped}.**")
    parts.append(table(["what", "value"], [[k, _flat(v)] for k, v in stamp.items()]))
    parts.append(HOW_TO_READ)
    for job in dict.fromkeys(row.job for row in report.rows):
        rows = [row for row in report.rows if row.job == job]
        parts += [f"## {job}", job_table(rows)]
    if missing := missing_lines(report):
        parts += ["## Not measured", "\n".join(f"- {line}" for line in missing)]
    return "\n\n".join(parts) + "\n"


def job_table(rows: list[Row]) -> str:
    """Return one job's rows; peers are columns."""
    peers = list(dict.fromkeys(name for row in rows for name in row.peers))
    measured = "torch µs" if rows[0].job == ceilings.JOB else "minids µs"
    head = ["case", measured, "floor µs", "bound", "% of floor", "% of ceiling", "TFLOP/s", "TB/s",
            "check", "goals", *(f"{name} µs (ratio, error)" for name in peers)]  # fmt: skip
    cells = [_cells(row, peers) for row in rows]
    if any(row.tokens for row in rows):  # what a model does, not a kernel
        head += ["tokens/s", "all layers"]
        cells = [[*line, *_of_model(row)] for line, row in zip(cells, rows, strict=True)]
    return table(head, cells)


def _of_model(row: Row) -> list[str]:
    """Return tokens a second of what was measured, and what the whole model would take of it."""
    if row.model_us is None or row.tokens_per_s is None:
        return [number(row.tokens_per_s), NOTHING]
    whole = f"{row.layers} x: {row.model_us / 1000:,.1f} ms"
    return [number(row.tokens_per_s), f"{whole}, {number(row.tokens_per_s / row.layers)} tokens/s"]


def _cells(row: Row, peers: list[str]) -> list[str]:
    ours = row.ours
    return [
        row.name, time(ours), number(row.floor_us), row.bound or NOTHING,
        number(row.percent_of_floor), number(row.percent_of_ceiling),
        number(row.tflops), number(row.tb_s, 2), checked(ours),
        "; ".join(goal_text(goal.judge(row)) for goal in row.goals) or NOTHING,
        *(_peer(row, name) for name in peers),
    ]  # fmt: skip


def _peer(row: Row, name: str) -> str:
    side = row.sides.get(name, Side())
    if side.us is None:
        return NOTHING
    about = [number(row.ratio(name), 2), *([] if side.error is None else [f"{side.error:.1e}"])]
    found = f"{time(side)} ({', '.join(about)})"
    return found if side.right or side.error is not None else f"{found}, {side.note}"


def missing_lines(report: Report) -> list[str]:
    """Say what has no time and why: cases without time left, sides that did not run."""
    lines = [f"{name}: dropped, the job's time was over" for name in report.dropped]
    notes: Counter[str] = Counter()
    for row in report.rows:
        for name, side in row.sides.items():
            if side.us is None:
                notes[f"{row.job}: {name}: {side.note}"] += 1
            elif not side.right and side is row.ours:
                notes[f"{row.job}: {row.name}: {side.note}"] += 1
    return lines + [f"{note} ({n} of its cases)" if n > 1 else note for note, n in notes.items()]


def goal_text(judged: dict[str, Any]) -> str:
    """Return a goal, what was reached, and whether that is enough."""
    if judged["reached"] is None:
        return f"{judged['goal']}: not measured"
    digits = 2 if judged["goal"].partition(" ")[2].startswith(("x", "TB/s")) else 0
    answer = "reached" if judged["reached"] else "NOT reached"
    return f"{judged['goal']}: {judged['value']:.{digits}f}, {answer}"


def terminal(report: Report) -> str:
    """Return a summary that fits into 100 columns."""
    form = "{:<34} {:>8} {:>6} {:>6} {:>6} {:>9}  {}".format
    lines = []
    for job in dict.fromkeys(row.job for row in report.rows):
        lines += ["", form(job, "µs", "±", "%floor", "%ceil", "check", "best peer; goals")]
        for row in (row for row in report.rows if row.job == job):
            ours, (peer, ratio) = row.ours, best_peer(row)
            us, spread = number(ours.us), number(ours.spread_us)
            goals = [goal.judge(row)["reached"] for goal in row.goals]
            marks = "".join({True: "+", False: "-", None: "?"}[reached] for reached in goals)
            rival = f"{peer[:15]} {number(ratio, 2)}" if peer else NOTHING
            lines.append(form(
                row.name[:34], us, spread, number(row.percent_of_floor),
                number(row.percent_of_ceiling), checked(ours)[:9], f"{rival} {marks}",
            ))  # fmt: skip
    lines += ["", "ratio: the peer's time over ours; goals: + reached, - not, ? not measured"]
    lines += [line[:100] for line in missing_lines(report)]
    return "\n".join(lines)


def best_peer(row: Row) -> tuple[str, float | None]:
    """Return the fastest peer whose result is near the right one, and its time over ours."""
    most = peer_error(row.ours.error)
    sides = {name: side for name, side in row.peers.items() if (side.error or 0.0) <= most}
    timed = [(side.us, name) for name, side in sides.items() if side.us is not None]
    if not timed:
        return "", None
    _, name = min(timed)
    return name, row.ratio(name)


def peer_error(ours: float | None) -> float:
    """Return the error up to which a peer counts, beside one of ours."""
    return max(PEER_ERROR, AS_OURS * (ours or 0.0))


def checked(side: Side) -> str:
    """Return how a result compares: its error, or what its check says."""
    if side.us is None:
        return "FAILED" if side.note else NOTHING
    if not side.right:
        return f"WRONG: {side.note}"
    if side.error is None:
        return side.note or NOTHING
    return f"{side.error:.1e}"


def time(side: Side) -> str:
    """Return a median with its spread."""
    return NOTHING if side.us is None else f"{number(side.us)} ± {number(side.spread_us)}"


def number(value: float | None, digits: int = 1) -> str:
    """Return a number in few digits; a dash for one that is not known."""
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if value >= 1000 else f"{value:.{digits}f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _flat(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{key} {part}" for key, part in value.items())
