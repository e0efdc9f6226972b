"""A text that is being written, on disk: tokens, cache, and where in a token it was stopped.

Paper   none.
Dims    L layers, S slots, W numbers a token a layer.
Book    book/11_fp8.ipynb               Kernel  none
"""

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from minids.files.opened import CONFIG
from minids.files.state import read_state, write_state
from minids.stream import Run, Streamed

_TAIL_BYTES = 4096  # of a shard, in its fingerprint


def about(model: Streamed, prompt: list[int], **options: Any) -> dict[str, Any]:
    """Return what a text depends on: checkpoint, prompt, options, dtype and kind of device."""
    digest = sha256()
    paths = sorted({place.path for place in model.files.places.values()})
    for path in [paths[0].parent / CONFIG, *paths]:
        size = path.stat().st_size
        with open(path, "rb") as file:
            file.seek(max(0, size - _TAIL_BYTES))
            digest.update(f"{path.name} {size} ".encode() + file.read())
    dtype, device = str(model.files.dtype).removeprefix("torch."), model.device.type
    said = {"checkpoint": digest.hexdigest()[:16], "prompt": prompt, **options}
    return said | {"dtype": dtype, "device": device}


def start_or_go_on(
    path: Path, model: Streamed, about: Mapping[str, Any], max_new_tokens: int
) -> Run:
    """Return the run that a state holds, else a new one, with room for the tokens to come.

    ValueError for a damaged state, and for one of another run. How many tokens are asked for is no
    part of a run: more of them go on from the same state.
    """
    prompt = list(about["prompt"])
    generator = torch.Generator(model.device).manual_seed(about["seed"])
    run = Run(prompt, model.new_cache(1, len(prompt) + max_new_tokens), generator)
    if not path.exists():
        return run
    header, tensors = read_state(path)
    for key, given in about.items():
        if (there := header["about"].get(key)) != given:
            raise ValueError(
                f"{path} is of another run: its {key} is {there!r:.60}, not {given!r:.60}; "
                "name another --state, or delete it"
            )
    held = tensors["cache"]
    if held.shape[2] > run.cache.capacity:
        run.cache = model.new_cache(1, held.shape[2])
    run.cache.store[:, :, : held.shape[2]] = held.to(model.device)
    run.cache.lengths = [header["held"]]
    run.generator.set_state(tensors["generator"])
    run.tokens, run.layer = header["tokens"], header["layer"]
    run.x = tensors["x"].to(model.device) if "x" in tensors else None
    return run


def save_run(path: Path, about: Mapping[str, Any], run: Run) -> None:
    """Write a run, stopped behind a token or behind a layer within one; OSError if it cannot."""
    held = run.cache.lengths[0]
    end = held + (0 if run.x is None else run.x.shape[1])
    tensors = {"cache": run.cache.store[:, :, :end], "generator": run.generator.get_state()}
    if run.x is not None:
        tensors["x"] = run.x
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"about": about, "tokens": run.tokens, "held": held, "layer": run.layer}
    write_state(path, header, tensors)
