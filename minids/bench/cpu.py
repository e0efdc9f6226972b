"""minids against transformers on this machine's CPU: training, decoding, absorbed attention.

Paper   none.
Dims    times in seconds, memory in bytes.
Book    none                            Kernel  none
"""

import json
import subprocess
import sys
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from tqdm import tqdm

from minids.bench.cases import DEFAULT_EXPERTS, OURS, SIZES, Call, Case, make_cases
from minids.bench.machine import machine


def race(case: Case) -> dict[str, list[float]]:
    """Return each side's seconds a call, taken in turns: what disturbs one disturbs all.

    RuntimeError when the sides disagree on the result; that is looked at before any time is taken.
    """
    calls = {side: case.start(side) for side in case.sides}
    _check_equal(case, calls)
    seconds: dict[str, list[float]] = {side: [] for side in case.sides}
    for _ in range(case.rounds):
        for side, call in calls.items():
            start = perf_counter()
            call()
            seconds[side].append(perf_counter() - start)
    return seconds


def _check_equal(case: Case, calls: dict[str, Call]) -> None:
    """Run each side twice (so that a training step's update counts) and compare the results."""
    results: dict[str, Tensor] = {}
    for side, call in calls.items():
        call()
        results[side] = call().double()
    ours = results[OURS]
    for side, theirs in results.items():
        error = ((ours - theirs).norm() / theirs.norm()).item()
        if not error <= case.tolerance:
            raise RuntimeError(f"{case.name}: {side} differs from {OURS} by {error:.1e}")


def probe(key: str, side: str, size: str, threads: int) -> int:
    """Run one side of one race in this process; return the process's peak resident bytes."""
    torch.set_num_threads(threads)
    call = make_cases(SIZES[size])[key].start(side)
    for _ in range(2):
        call()
    if sys.platform == "linux":  # getrusage would count the parent's memory too
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024  # in KiB
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts in bytes


def peak_memory(key: str, side: str, size: str, threads: int) -> int | None:
    """Return the peak resident bytes of one side in a fresh process; None where it is not known."""
    if sys.platform == "win32":
        return None
    code = (
        f"from minids.bench.cpu import probe; print(probe({key!r}, {side!r}, {size!r}, {threads}))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def summarise(case: Case, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Return the row of a race: minids against the fastest of the others, by medians."""
    rival = min(case.sides[1:], key=lambda side: median(seconds[side]))
    row: dict[str, Any] = {"name": case.name, "goal": case.goal, "rival": rival}
    for key, side in (("ours", OURS), ("theirs", rival)):
        low, middle, high = quantiles(seconds[side], n=4, method="inclusive")
        row[key] = {
            "seconds": middle,
            "spread_seconds": high - low,  # between the quartiles
            "tokens_per_second": case.tokens / middle,
        }
    row["ratio"] = row["theirs"]["seconds"] / row["ours"]["seconds"]
    row["medians"] = {side: median(times) for side, times in seconds.items()}
    return row


def run(threads: int = 2, size: str = "full") -> dict[str, Any]:
    """Run every race with `threads` threads; return the report that `format_table` prints.

    ValueError for fewer threads than one, ImportError where transformers is missing, RuntimeError
    where the sides disagree. Torch's number of threads is put back.
    """
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rows = {}
    try:
        bar = tqdm(make_cases(SIZES[size]).items(), unit=" races")
        for key, case in bar:
            bar.set_description(case.name)
            rows[key] = row = summarise(case, race(case))
            for name, side in (("ours", OURS), ("theirs", row["rival"])):
                row[name]["peak_bytes"] = peak_memory(key, side, size, threads)
    finally:
        torch.set_num_threads(before)
    return {"machine": machine(threads, ("torch", "transformers")), "rows": rows}


def format_table(report: dict[str, Any]) -> str:
    """Return the report as Markdown; times are medians, the spread is between the quartiles."""
    head = ["race", "ratio", "goal", "side", "time", "spread", "tokens/s", "peak memory"]
    lines = ["| " + " | ".join(head) + " |", "|---|--:|--:|---|--:|--:|--:|--:|"]
    for row in report["rows"].values():
        goal = f"{row['goal']:g}x" if row["goal"] else ""
        for key, side in (("ours", OURS), ("theirs", row["rival"])):
            first = [row["name"], f"{row['ratio']:.2f}x", goal] if key == "ours" else ["", "", ""]
            lines.append("| " + " | ".join([*first, side, *_measured(row[key])]) + " |")
    machine = report["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "python"))
    notes = [
        f"{machine['date']}, {machine['cpu']}, {machine['threads']} threads, {versions}, FP32.",
        f"transformers: SDPA attention; of its ways to run experts ({DEFAULT_EXPERTS} is its",
        "default) the fastest in this run. Both sides took turns in one process, on the same",
        "weights and tokens, after their results were found equal; memory is the peak of a fresh",
        "process with Python and the libraries in it.",
    ]
    return "\n".join([*lines, "", *notes])


def _measured(side: dict[str, Any]) -> list[str]:
    memory = "unknown" if side["peak_bytes"] is None else f"{side['peak_bytes'] / 2**20:,.0f} MiB"
    return [
        f"{side['seconds'] * 1e3:,.1f} ms",
        f"{side['spread_seconds'] * 1e3:,.1f} ms",
        f"{side['tokens_per_second']:,.0f}",
        memory,
    ]


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write it here.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 2,
) -> None:
    """Run the benchmark and print its table; with `json_file` also write every number there."""
    report = run(threads)
    print(format_table(report))
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
