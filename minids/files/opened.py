"""A checkpoint before any value is read: its config, the model it describes, its files' headers.

Paper   none; the folder of the release.
Dims    none.
Book    book/14_train.ipynb             Kernel  none
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minids.files.folder import readable
from minids.files.hf import from_hf
from minids.files.shards import FP8, check_headers, member, open_shards, read_json
from minids.model import Transformer

CONFIG = "config.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": FP8}


class Opened(NamedTuple):
    """A model on the meta device, where each tensor of its files is, and their weights' dtype."""

    model: Transformer
    found: dict[str, tuple[Path, Any]]  # file and safetensors' handle, open as long as the stack
    stored: torch.dtype


def open_checkpoint(folder: str | Path, stack: ExitStack) -> Opened:
    """Check config and headers of a folder; ValueError or FileNotFoundError says what is wrong."""
    folder = readable(folder)
    config = member(folder, CONFIG)
    published = read_json(config)
    try:
        cfg = from_hf(published)
    except ValueError as error:
        raise ValueError(f"{config}: {error}") from None
    found = open_shards(folder, stack)
    size = sum(path.stat().st_size for path in {path for path, _ in found.values()})
    if cfg.n_layers + cfg.mtp_depth > len(found) or cfg.qk_rope_head_dim > size:
        raise ValueError(f"{config}: describes more than the {len(found)} tensors beside it")
    with torch.device("meta"):
        try:
            model = Transformer(cfg)
        except (RuntimeError, TypeError) as error:  # more elements than torch can count
            raise ValueError(f"{config}: impossible sizes: {error}") from None
    quantised = published.get("quantization_config") is not None
    return Opened(model, found, check_headers(model, folder, found, quantised))


def check_device(device: str | torch.device) -> None:
    """Raise ValueError unless values can be put on the device and taken back."""
    try:
        torch.empty(0, device=device).cpu()  # the meta device has nothing to give
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used: {error}") from None


def dtype_of(given: str | torch.dtype, *names: str) -> torch.dtype:
    """Return what one of `names` stands for; ValueError if `given` is none of them."""
    for name in names:
        if given in (name, DTYPES[name]):
            return DTYPES[name]
    also = "" if "fp8" in names else "; FP8 weights are read as one of them"
    raise ValueError(f"dtype must be {' or '.join(map(repr, names))}, got {given!r}{also}")
