"""A state on disk: one safetensors file that is there whole or not at all, with a checksum.

Paper   none.
Dims    none.
Book    book/14_train.ipynb             Kernel  none
"""

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_state(path: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Put a JSON header and tensors under `path` by a rename: a kill leaves the old file whole.

    Raises OSError when the disk takes no more; the old file stays then, too.
    """
    values = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    text, unfinished = json.dumps(header), path.with_name(f"{path.name}.unfinished")
    try:
        save_file(values, unfinished, {"state": text, "crc32": str(_checksum(text, values))})
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(f"{path}: the state was not saved: {error}") from error


def read_state(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return header and tensors; ValueError for a file that is not what was written."""
    try:
        with safe_open(path, framework="pt") as file:
            notes, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
        if int(notes["crc32"]) != _checksum(notes["state"], tensors):
            raise ValueError("wrong checksum")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        advice = "delete it to go on from the state before"
        raise ValueError(f"{path} is damaged ({error}): {advice}") from None
    return json.loads(notes["state"]), tensors


def _checksum(header: str, tensors: Mapping[str, Tensor]) -> int:
    total = zlib.crc32(header.encode())
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].flatten().view(torch.uint8).numpy().data, total)
    return total
