"""Stop at any moment, even by a kill, and go on to the very same numbers.

Paper   none: DeepSeek-V3 (arXiv:2412.19437) does not describe its training checkpoints.
Dims    none.
Book    book/14_train.ipynb             Kernel  none
Differs the state is one safetensors file with a checksum, counters as JSON in its header: a rename
        makes all of it appear at once, and nothing is ever unpickled.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from minids.files.state import read_state, write_state

_KEPT = 2  # states in a folder: the newest, and the one before in case a disk damages it


class Position(NamedTuple):
    """How far a run is."""

    step: int = 0  # optimiser steps done
    rows: int = 0
    tokens: int = 0


def append_line(folder: Path, line: Mapping[str, Any]) -> None:
    """Write one step's line to the log."""
    with open(folder / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def save_state(
    folder: Path, model: nn.Module, optimizer: Optimizer, at: Position, about: Mapping[str, Any]
) -> None:
    """Write weights, router biases, moments, position and settings: all of it, or nothing."""
    (states := folder / "state").mkdir(parents=True, exist_ok=True)
    with open(folder / "log.jsonl", "ab") as log:
        os.fsync(log.fileno())  # what the state says is logged must be there after a power cut too
        header = {"position": at, "log_bytes": log.tell(), "about": about}
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in moments.items()}
    write_state(states / f"step_{at.step:09}.safetensors", header, tensors)
    for old in sorted(states.glob("step_*.safetensors"))[:-_KEPT]:
        old.unlink()


def load_state(
    folder: Path, model: nn.Module, optimizer: Optimizer, about: Mapping[str, Any]
) -> tuple[Position, list[dict[str, Any]]]:
    """Put the newest state into model and optimiser; return its position and log.

    Without one: the start, and no log. Log lines behind the state are cut off. Raises ValueError
    for a damaged file, and for a folder whose run is not the one asked for.
    """
    log = folder / "log.jsonl"
    if not (states := sorted((folder / "state").glob("step_*.safetensors"))):
        if log.is_file() and log.stat().st_size:
            raise ValueError(f"{folder} has a log but no state: use a new folder, or delete {log}")
        return Position(), []
    header, tensors = read_state(states[-1])
    for key, given in json.loads(json.dumps(about)).items():
        if (there := header["about"].get(key)) != given:
            raise ValueError(
                f"{folder} has a run with {key} {there}, not {given}: use a new folder"
            )
    weights = {name[6:]: value for name, value in tensors.items() if name.startswith("model.")}
    moments: dict[int, dict[str, Tensor]] = {}
    for name in sorted(tensors.keys() - {f"model.{key}" for key in weights}):
        _, index, key = name.split(".")
        moments.setdefault(int(index), {})[key] = tensors[name]
    if not log.is_file() or log.stat().st_size < header["log_bytes"]:
        raise ValueError(f"{log} is shorter than at step {header['position'][0]}: put it back")
    os.truncate(log, header["log_bytes"])
    model.load_state_dict(weights)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    lines = log.read_text(encoding="utf-8").splitlines()
    return Position(*header["position"]), [json.loads(line) for line in lines]
