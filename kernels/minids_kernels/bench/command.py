"""The command: time kernels, tune them, write the page that lists them.

python -m minids_kernels.bench [JOB ...] --out FOLDER
python -m minids_kernels.bench layer [MODEL ...] --out FOLDER
python -m minids_kernels.bench tune [KERNEL ...] --out FOLDER
python -m minids_kernels.bench readme
"""

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from tqdm import tqdm
from typer.core import TyperGroup

from minids_kernels import configs
from minids_kernels.bench import ceilings, layer, readme, report, stamp, tune
from minids_kernels.bench.clock import CudaTimer
from minids_kernels.bench.floors import DATASHEETS, Rates
from minids_kernels.bench.jobs import JOBS
from minids_kernels.bench.run import Bench, Report, run

NO_GPU = "this measures kernels on an NVIDIA GPU, and torch sees none here: nothing was measured"


class _JobsByDefault(TyperGroup):
    """Let names of jobs, or nothing, stand where a verb would."""

    def parse_args(self, ctx, args):
        verbs = {*self.commands, "--help"}
        return super().parse_args(ctx, args if args and args[0] in verbs else ["run", *args])


_HELP = "Time kernels (the verb run may be left out), tune them, write the page that lists them."
app = typer.Typer(cls=_JobsByDefault, help=_HELP, add_completion=False,
                  rich_markup_mode=None, pretty_exceptions_enable=False)  # fmt: skip

Out = Annotated[Path, typer.Option(help="Folder for the results; made if it is not there.")]


@app.command("run")
def measure(
    out: Out,
    jobs: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(JOBS)}; all.")] = None,
    seconds: Annotated[float, typer.Option(help="In all; what it did not reach is named.")] = 450,
) -> None:
    """Time kernels beside their floors, ceilings and peers; writes bench.json and bench.md."""
    chosen = {name: JOBS[name] for name in [ceilings.JOB, *known(jobs or list(JOBS), JOBS)]}
    bench = on_this_gpu(seconds)
    found = Report(stamp.stamp(command_line()))
    cases = {name: list(job()) for name, job in chosen.items()}
    code = follow(cases, bench, found, out)
    typer.echo(report.terminal(found))
    typer.echo(f"\n{out / report.MARKDOWN} and {report.JSON} beside it hold all of it")
    raise typer.Exit(code)


def follow(cases: dict, bench: Bench, found: Report, out: Path) -> int:
    """Run, saving after each case; return the exit code: 1 for a wrong result, 130 if stopped."""
    total = sum(map(len, cases.values()))
    try:
        for _ in tqdm(run(cases, bench, found), total=total, unit="case", file=sys.stderr):
            report.save(found, out)
    except KeyboardInterrupt:
        found.stopped = "interrupted by the user"
    except RuntimeError as error:  # a GPU that answers nothing any more
        found.stopped = f"the GPU stopped: {str(error).partition(chr(10))[0]}"
    report.save(found, out)
    if found.stopped:
        typer.echo(f"{found.stopped}; what was measured until then is kept", err=True)
        return 130 if "interrupted" in found.stopped else 1
    for line in found.wrong:
        typer.echo(f"WRONG: {line}", err=True)
    return 1 if found.wrong else 0


def on_this_gpu(total_s: float) -> Bench:
    """Return the bench for the card at hand; one sentence and exit code 1 where there is none."""
    if not torch.cuda.is_available():
        typer.echo(NO_GPU, err=True)
        raise typer.Exit(1)
    properties = torch.cuda.get_device_properties()
    sheet = DATASHEETS.get(properties.name, Rates())
    if sheet == Rates():
        typer.echo(f"no datasheet of {properties.name} is listed: its rows have no floor", err=True)
    return Bench("cuda", CudaTimer(), properties.L2_cache_size, sheet, total_s)


def known(names: list[str], choices: dict) -> list[str]:
    """Return the names; one sentence and exit code 2 if one is not among the choices."""
    for name in names:
        if name not in choices:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(choices)}")
    return names


def command_line() -> str:
    """Return how this program was called."""
    return shlex.join(["python", "-m", "minids_kernels.bench", *sys.argv[1:]])


@app.command("layer")
def measure_layers(
    models: Annotated[list[str] | None, typer.Argument(help="v3, v2_lite; both.")] = None,
    out: Out = Path("runs/layer"),
    seconds: Annotated[float, typer.Option(help="In all; what it did not reach is named.")] = 540,
) -> None:
    """Run a whole V3 layer in FP8, and all of V2-Lite: prompts, a batch, forward and backward."""
    names = tuple(known(models or list(layer.MODELS), dict.fromkeys(layer.MODELS)))
    bench = replace(on_this_gpu(seconds), job_s=seconds)
    found = Report(stamp.stamp(command_line()))
    cases = {ceilings.JOB: list(ceilings.cases()), layer.JOB: list(layer.cases(names))}
    code = follow(cases, bench, found, out)
    typer.echo(report.terminal(found))
    typer.echo("\n" + report.job_table([row for row in found.rows if row.job == layer.JOB]))
    typer.echo(f"\n{out / report.MARKDOWN} and {report.JSON} beside it hold all of it")
    raise typer.Exit(code)


@app.command("tune")
def tune_kernels(
    out: Out,
    kernels: Annotated[list[str] | None, typer.Argument(help="As fp8_matmul.Prefill; all.")] = None,
    seconds: Annotated[float, typer.Option(help="In all; what it did not reach is named.")] = 540,
) -> None:
    """Try every config at V3's shapes; writes configs.json where one beats the rule of thumb."""
    try:
        for name in kernels or ():
            configs.candidates(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    bench = on_this_gpu(seconds)
    cases = [case for name, job in JOBS.items() if name != ceilings.JOB for case in job()]
    rows = json.loads(configs.FILE.read_text(encoding="utf-8"))
    tuning = tune.Tuning(stamp.stamp(command_line()), rows)
    try:
        steps = tune.tune(cases, bench, tuning, kernels or ())
        for _ in tqdm(steps, total=len(cases), unit="case", file=sys.stderr):
            tune.save(tuning, configs.FILE, out)
    except KeyboardInterrupt:
        typer.echo("interrupted; the cases that were done are kept", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"{len(tuning.rows)} rows in {configs.FILE}; all tries in {out / tune.RESULTS}")


@app.command("readme")
def write_readme() -> None:
    """Write kernels/README.md from kernels/results."""
    readme.write()
    typer.echo(f"wrote {readme.README}")
