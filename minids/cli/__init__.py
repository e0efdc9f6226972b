"""The command `minids`: each verb reads its arguments, calls one function, prints what it returns.

Paper   none.
Dims    none.
Book    book/00_start.ipynb             Kernel  none
"""

import json
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from typer.core import TyperGroup

from minids.checkpoint import load
from minids.cli.report import contents, table
from minids.cli.stream import make_command, stream_command
from minids.cli.text import decode_stream
from minids.cli.training import train_from_corpus
from minids.config import PRESETS, Config, preset
from minids.count import MEASURED_TFLOPS, REPORTED_TOKENS, count, count_files
from minids.evaluate import evaluate
from minids.files.corpus import load_corpus
from minids.files.hf import from_hf
from minids.files.inventory import take_inventory
from minids.generate import Stats, stream
from minids.learn import doctor as machine
from minids.tokenizer import BOS, EOS, load_tokenizer


class _Errors(TyperGroup):
    """Turn what the library raises for bad input into one line on stderr and an exit code."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # who reads our output has gone, as in `minids count v3 | head`
            raise
        except (ValueError, OSError, FloatingPointError) as error:
            line, code = str(error), 2
        except ImportError as error:
            line, code = f"{error} (minids doctor says what is missing)", 1
        except KeyboardInterrupt:
            line, code = "stopped; train and tour go on from their last saved state", 130
        typer.echo(f"minids: {' '.join(line.split())}", err=True)
        raise typer.Exit(code)


app = typer.Typer(
    cls=_Errors,
    help="DeepSeek-V3 from nothing: count it, train it, let it write.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[Path, typer.Argument(help="Folder of a saved model.")]
Named = Annotated[str, typer.Argument(help="A preset, or a config.json or the folder of one.")]
Corpus = Annotated[str, typer.Option(help="stdlib, a text file or folder, or hf:NAME.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...")]
Impl = Annotated[str, typer.Option(help="torch, or triton: kernels, on a GPU.")]
Seed = Annotated[int, typer.Option(help="Same seed and machine: same numbers.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version")] = False) -> None:
    if version:
        typer.echo(f"minids {machine.minids_version()}")


def read_config(name: str) -> Config:
    """Return a preset, or what a config.json (or its folder) says; ValueError names the file."""
    if name in PRESETS:
        return preset(name)
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if Path(name).is_dir() and not path.is_file():
        raise ValueError(f"{path}: no such file, it says what the weights are: fetch it too")
    if not path.is_file():
        raise ValueError(f"{name!r} is neither a file nor a preset: {', '.join(PRESETS)}")
    try:
        published = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(published, dict):
            raise ValueError(f"must be a JSON object, got {published!r:.40}")
        return from_hf(published)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


@app.command("doctor")
def _doctor() -> None:
    """Check this machine: versions, cores, memory, GPU, what is missing and how to get it."""
    if not machine.doctor(typer.echo):
        raise typer.Exit(1)


@app.command("tour")
def _tour(
    folder: Annotated[Path, typer.Option(help="Where all of it goes.")] = Path("runs/tour"),
    seed: Seed = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 2,
) -> None:
    """Train a small but complete DeepSeek-V3 on real text, then let it write: 2 to 3 minutes."""
    from minids.learn.tour import tour

    tour(folder, seed=seed, threads=threads)


@app.command("count")
def _count(
    name: Named,
    as_json: AsJson = False,
    seq_len: Annotated[int | None, typer.Option(help="Context of the FLOPs, in tokens.")] = None,
    tokens: Annotated[float, typer.Option(help="Tokens to train on.")] = REPORTED_TOKENS,
    tflops: Annotated[float, typer.Option(help="Sustained 10^12 FLOP/s a GPU.")] = MEASURED_TFLOPS,
    usd: Annotated[float, typer.Option(help="Price of a GPU-hour.")] = 2.0,
) -> None:
    """Count parameters, cache, FLOPs, memory, GPU-hours and money; in a folder its files too."""
    counts = count(cfg := read_config(name), seq_len)
    files = count_files(cfg) if cfg.attn == "mla" else {}
    held = take_inventory(Path(name), cfg) if Path(name).is_dir() and name not in PRESETS else None
    if as_json:
        found = {"found": held.as_dict()} if held else {}
        typer.echo(json.dumps(counts.as_dict() | {"files": files} | found, indent=2))
    else:
        text = table(cfg, counts, tokens, tflops, usd, files)
        typer.echo(f"{text}\n{contents(held)}" if held else text)


@app.command("train")
def _train(
    folder: Annotated[Path, typer.Argument(help="Where log, state, model and plot go.")],
    name: Annotated[str, typer.Option("--config", help="A preset or a config.json.")] = "nano",
    corpus: Corpus = "stdlib",
    steps: Annotated[int, typer.Option(help="Full batches.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Rows a step.")] = 16,
    seq_len: Annotated[int, typer.Option(help="Tokens a row.")] = 128,
    peak_lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 4e-3,
    micro_batches: Annotated[int, typer.Option(help="Parts that a batch is done in.")] = 1,
    fim_rate: Annotated[float, typer.Option(help="Share of code with its middle last.")] = 0.1,
    seed: Seed = 0,
    device: Device = "cpu",
    save_every: Annotated[int, typer.Option(help="Steps between saved states.")] = 100,
    recompute: Annotated[bool, typer.Option(help="Less memory, more time.")] = False,
    impl: Impl = "torch",
) -> None:
    """Train a new model; stopped at any moment, the same command goes on from its last state."""
    from minids.learn.tour import save_plot

    run = train_from_corpus(
        read_config(name), load_corpus(corpus), folder, steps=steps, batch_size=batch_size,
        seq_len=seq_len, peak_lr=peak_lr, micro_batches=micro_batches, fim_rate=fim_rate,
        seed=seed, device=device, save_every=save_every, recompute=recompute,
        impl=impl,
    )  # fmt: skip
    typer.echo(f"model: {folder / 'model'}, plot: {folder / 'loss.svg'}")
    save_plot(run.log, folder / "loss.svg")


@app.command("evaluate")
def _evaluate(
    folder: Model,
    corpus: Corpus = "stdlib",
    window: Annotated[int, typer.Option(help="Tokens read at once.")] = 128,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Score a model on held-out text, by domain: nats a character, bits a byte."""
    model, tokenizer = load(folder, device), load_tokenizer(folder)
    scores = evaluate(model, tokenizer, load_corpus(corpus).heldout, window=window)
    rates = ("nats_per_char", "bits_per_byte", "accuracy")
    rows = {domain: {rate: getattr(s, rate) for rate in rates} for domain, s in scores.items()}
    line = "{:6} {nats_per_char:.4f} nats/char  {bits_per_byte:.4f} bits/byte  {accuracy:.1%} exact"
    text = "\n".join(line.format(domain, **row) for domain, row in rows.items())
    typer.echo(json.dumps(rows, indent=2) if as_json else text)


@app.command("generate")
def _generate(
    folder: Model,
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Mass of tokens to draw from.")] = 1.0,
    draft: Annotated[bool | None, typer.Option(help="Let MTP guess ahead, if it can.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    impl: Impl = "torch",
) -> None:
    """Write text as it is made, then say how fast and how many guesses were right."""
    model, tokenizer = load(folder, device, impl=impl), load_tokenizer(folder)
    guess = "mtp" if draft or (draft is None and model.cfg.mtp_depth) else None
    ids = torch.tensor(
        [[BOS, *tokenizer.encode(prompt, add_special_tokens=False).ids]], device=device
    )
    stats = Stats()
    words = stream(model, ids, max_new_tokens, temperature, top_p, (EOS,), guess, None, seed, stats)
    typer.echo(prompt, nl=False)
    for text in decode_stream(tokenizer, words):
        typer.echo(text, nl=False)
    speed = f"{stats.new_tokens} tokens, {stats.tokens_per_second:.0f} a second"
    drafts = "".join(f", {kept:.0%} of guesses right" for kept in stats.acceptance)
    typer.echo(f"\n[{speed}{drafts}]", err=True)


app.command("stream")(stream_command)
app.command("make-checkpoint")(make_command)


@app.command("bench")
def _bench(
    what: Annotated[Literal["cpu"], typer.Argument(help="What to measure.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write it here.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 2,
) -> None:
    """Compare with transformers: training, decoding, absorbed attention; about 4 minutes."""
    from minids.bench import cpu

    cpu.main(json_file=json_file, threads=threads)
