"""`minids stream` and `minids make-checkpoint`: a checkpoint of any size, run or invented.

Paper   none.
Dims    none.
Book    book/11_fp8.ipynb               Kernel  none
"""

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tokenizers import Tokenizer
from tqdm import tqdm

from minids.checks.inputs import check_ids, check_options
from minids.cli.screen import Meter, Screen, Stopped, stoppable
from minids.cli.text import decode_stream
from minids.config import preset
from minids.files import synthetic
from minids.files.opened import CONFIG
from minids.files.shards import read_json
from minids.files.text_state import about, save_run, start_or_go_on
from minids.generate import Sampler
from minids.stream import Run, Streamed
from minids.tokenizer import load_tokenizer


def stream_command(
    folder: Annotated[Path, typer.Argument(help="Folder of a checkpoint, of any size.")],
    prompt: Annotated[str, typer.Option(help="Text to go on from.")] = "",
    ids: Annotated[str, typer.Option(help='Token ids instead, as "0 17 4".')] = "",
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many.")] = 16,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Mass of tokens to draw from.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Same seed and machine: same text.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="bf16 or fp32; as stored, FP8 as bf16.")] = None,
    state: Annotated[Path | None, typer.Option(help="Where to note how far it is.")] = None,
) -> None:
    """Run a checkpoint far larger than memory, a layer at a time; stopped, it can go on."""
    model = Streamed(folder, device, dtype)
    tokens, tokenizer, stops = _read_prompt(folder, prompt, ids)
    check_ids(torch.tensor([tokens], dtype=torch.int64), model.cfg.vocab_size)
    if len(tokens) >= (limit := model.cfg.max_seq_len):
        raise ValueError(f"the prompt has {len(tokens)} tokens, max_seq_len is {limit}")
    check_options(model.model, len(tokens), max_new_tokens, temperature, top_p, stops, None)
    said = about(model, tokens, temperature=temperature, top_p=top_p, seed=seed)
    path = state or _default_state(folder, said)
    if path.absolute().is_relative_to(folder.absolute()):
        raise ValueError(f"{path} lies in the checkpoint: give --state a file elsewhere")
    run = start_or_go_on(path, model, said, max_new_tokens)
    if run.layer or len(run.tokens) > len(tokens):
        typer.echo(f"[going on from {path}: {_where(model, run, len(tokens))}]", err=True)
    sampler = Sampler(temperature, top_p, run.generator)
    screen, meter = Screen(model.cfg.n_layers), Meter(model.files)
    save = _saver(path, said, run)
    with stoppable() as model.files.before_read:
        words = _words(model, run, sampler, len(tokens), max_new_tokens, stops, screen, meter, save)
        try:
            screen.text(ids if ids else prompt)
            for text in decode_stream(tokenizer, words) if tokenizer else _spelled(words):
                screen.text(text)
        except (KeyboardInterrupt, OSError, ValueError) as error:
            screen.close()
            save()
            where = f"stopped in {_where(model, run, len(tokens))}"
            if not isinstance(error, KeyboardInterrupt):
                raise type(error)(f"{error}; {where}; the same command goes on") from error
            typer.echo(f"[{meter.summary()}]", err=True)
            command = shlex.join(["minids", *sys.argv[1:]])
            typer.echo(f"minids: {error}: {where}; go on with: {command}", err=True)
            raise typer.Exit(error.code if isinstance(error, Stopped) else 130) from None
    screen.close()
    typer.echo(f"[{meter.summary()}]", err=True)


def _read_prompt(folder: Path, prompt: str, ids: str) -> tuple[list[int], Tokenizer | None, set]:
    """Return the prompt's ids, behind the token that starts a text; the tokenizer; stop tokens."""
    published = read_json(folder / CONFIG)
    stops = published.get("eos_token_id")
    stops = {stops} if isinstance(stops, int) else set(stops or ())
    if ids and prompt:
        raise ValueError("give --prompt or --ids, not both")
    has_tokenizer = (folder / "tokenizer.json").is_file()
    if not ids and not has_tokenizer:
        raise ValueError(f"{folder} has no tokenizer.json: put it there, or give --ids")
    tokenizer = load_tokenizer(folder) if has_tokenizer else None
    if tokenizer and not ids:
        start = published.get("bos_token_id")
        text = tokenizer.encode(prompt, add_special_tokens=False).ids
        return [start, *text] if isinstance(start, int) else text, tokenizer, stops
    try:
        return [int(word) for word in ids.split()], tokenizer, stops
    except ValueError:
        raise ValueError(f"--ids must be numbers with spaces between, got {ids!r:.60}") from None


def _default_state(folder: Path, said: dict[str, Any]) -> Path:
    digest = sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]
    return Path("runs/stream") / f"{folder.absolute().name}-{digest}.safetensors"


def _where(model: Streamed, run: Run, prompt: int) -> str:
    new = len(run.tokens) - prompt
    token = f"new token {new + 1}" if new else f"the {prompt} tokens of the prompt"
    return f"{token}, layer {run.layer} of {model.cfg.n_layers}"


def _saver(path: Path, said: dict[str, Any], run: Run) -> Callable[[], None]:
    """Return what saves the run; a disk that is full is told once, and does not stop the text."""
    failed: list[OSError] = []

    def save() -> None:
        try:
            save_run(path, said, run)
            failed.clear()
        except OSError as error:
            if not failed:
                tqdm.write(f"minids: {error}; the text goes on", file=sys.stderr)
            failed.append(error)

    return save


def _words(
    model: Streamed,
    run: Run,
    sampler: Sampler,
    prompt: int,
    most: int,
    stops: set[int],
    screen: Screen,
    meter: Meter,
    save: Callable[[], None],
) -> Iterator[list[list[int]]]:
    """Yield the words that the run has, then each new one once it is saved."""
    yield [run.tokens[prompt : prompt + most]]
    while len(run.tokens) < prompt + most and run.tokens[-1] not in stops:
        meter.start(is_prompt=len(run.tokens) == prompt, whole=run.x is None)

        def tell(layer: int) -> None:
            meter.layer("dense" if layer < model.cfg.n_dense_layers else "MoE")
            screen.layer(layer + 1, meter.line())

        word = model.next_word(run, sampler, tell)
        meter.stop()
        save()
        yield [[word]]


def _spelled(words: Iterator[list[list[int]]]) -> Iterator[str]:
    for (new,) in words:
        yield "".join(f" {word}" for word in new)


def make_command(
    folder: Annotated[Path, typer.Argument(help="Where it goes: a new folder.")],
    name: Annotated[str, typer.Option("--preset", help="Sizes of which model.")] = "v3",
    layers: Annotated[int | None, typer.Option(help="So many of its layers.", min=1)] = None,
    fill: Annotated[str, typer.Option(help="random, or sparse: zeros, no disk.")] = "random",
    mtp: Annotated[bool, typer.Option(help="With the MTP modules.")] = True,
    scale_fmt: Annotated[str | None, typer.Option(help="ue8m0: powers of two, as V3.1.")] = None,
    max_shard_bytes: Annotated[int, typer.Option(help="A file.")] = synthetic.RELEASED_SHARD_BYTES,
    seed: Annotated[int, typer.Option(help="Same seed: same files.")] = 0,
) -> None:
    """Write a checkpoint of invented weights in the release's layout, to try `minids stream` on."""
    cfg = preset(name, precision="fp8", scale_fmt=scale_fmt)
    count = layers or cfg.n_layers
    cfg = replace(cfg, n_layers=count, n_dense_layers=min(count, cfg.n_dense_layers))
    cfg = cfg if mtp else replace(cfg, mtp_depth=0)
    with stoppable() as check, tqdm(unit="B", unit_scale=True, disable=None) as bar:

        def tell(nbytes: int) -> None:
            bar.update(nbytes)
            check()

        try:
            synthetic.make_checkpoint(folder, cfg, fill, max_shard_bytes, seed, tell)
        except Stopped as error:
            typer.echo(f"minids: {error}: {folder} was not written, nothing is left", err=True)
            raise typer.Exit(error.code) from None
    status = [path.stat() for path in folder.iterdir()]
    held = sum(512 * s.st_blocks for s in status) if sys.platform != "win32" else 0
    typer.echo(
        f"{folder}: {len(status)} files, {sum(s.st_size for s in status):,} bytes, "
        f"{held:,} of them on disk"
    )
