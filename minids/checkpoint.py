"""A model on disk in Hugging Face's layout: config.json, safetensors shards, index, tokenizer.

Paper   none; the folder of the release.
Dims    none.
Book    book/14_train.ipynb             Kernel  none
Differs from the release: BF16 or FP32, no FP8 yet; deeper MTP modules go on counting layers.
"""

import json
import os
import re
import shutil
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn

from minids.files.hf import from_hf, to_hf
from minids.files.shards import (
    CODES,
    INDEX,
    Slot,
    check_headers,
    member,
    open_shards,
    read_json,
    slots,
)
from minids.model import Transformer
from minids.rope import frequencies
from minids.tokenizer import save_tokenizer

_CONFIG = "config.json"
_WRITTEN = re.compile(r"config\.json|model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_KEPT = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
         "generation_config.json", "chat_template.jinja")  # fmt: skip


def save(
    model: Transformer,
    folder: str | Path,
    dtype: str | torch.dtype | None = None,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a folder that `load` and transformers read, as "fp32" or "bf16" (None: as it is).

    An older checkpoint there stays whole until the new one is on disk beside it, `.NAME.new`; then
    both are renamed. Killed between the renames, the older one is `.NAME.old`: `load` finds it.
    Without a `tokenizer` the folder keeps its own. ValueError for what cannot be written or
    replaced, OSError when writing fails.
    """
    stored = _dtype(dtype, model.embed.dtype)
    if model.embed.is_meta:
        raise ValueError("the model has no values to save: it is on the meta device")
    if tokenizer is not None and (words := tokenizer.get_vocab_size()) > model.cfg.vocab_size:
        raise ValueError(f"the tokenizer has {words} tokens, vocab_size is {model.cfg.vocab_size}")
    config = to_hf(model.cfg, "fp32" if stored == torch.float32 else "bf16")
    folder = _replaceable(folder)
    new = _beside(folder, "new")
    try:
        shutil.rmtree(new, ignore_errors=True)  # of a save that was killed
        new.mkdir(parents=True)
        _write_shards(model, new, stored, max_shard_bytes)
        (new / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        for name in _KEPT:
            if (folder / name).is_file():
                shutil.copy2(folder / name, new)
        if tokenizer is not None:
            save_tokenizer(tokenizer, new)
        _swap(new, folder)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{folder} was not saved, what it held is untouched: {error}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _write_shards(model: Transformer, folder: Path, stored: torch.dtype, max_bytes: int):
    """Deal the tensors in order to shards of `max_bytes` (one that is larger has its own)."""
    shards: list[list[Slot]] = [[]]
    filled = total = 0
    for slot in slots(model):
        size = slot.value.numel() * slot.dtype(stored).itemsize
        if filled and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(slot)
        filled, total = filled + size, total + size
    places = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        values = {}
        for slot in shard:  # in memory a second time only where dtype or device change
            value = slot.value.to("cpu", slot.dtype(stored))
            values[slot.name] = value.clone() if slot.copy_of else value.contiguous()
        save_file(values, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(values, name)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.{what}")


def _replaceable(folder: str | Path) -> Path:
    """Return the absolute folder; ValueError if replacing it would lose more than a checkpoint."""
    folder = Path(folder).resolve()
    if not folder.exists() and _beside(folder, "old").is_dir():
        os.rename(_beside(folder, "old"), folder)  # finish what a killed save left
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, choose a folder")
    if Path.cwd().is_relative_to(folder):
        raise ValueError(f"{folder} is or holds the current folder, choose another one")
    for path in folder.iterdir() if folder.exists() else ():
        if not (path.is_file() and (path.name in _KEPT or _WRITTEN.fullmatch(path.name))):
            raise ValueError(f"{path} is no part of a checkpoint and would be lost: move it away")
    return folder


def _swap(new: Path, folder: Path) -> None:
    """Flush `new` to disk and put it in the place of `folder`."""
    _flush(*new.iterdir(), new)
    old = _beside(folder, "old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    try:
        os.rename(new, folder)
    except BaseException:
        if old.exists():
            os.rename(old, folder)
        raise
    _flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush(*paths: Path) -> None:
    for path in paths:
        if path.is_file() or os.name == "posix":  # Windows opens no folder
            descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def load(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    allow_nonfinite: bool = False,
) -> Transformer:
    """Return the model of a folder in `dtype` (None: as stored; the router's bias is always FP32).

    Config and headers are checked before memory is taken, values as each tensor is read. Raises
    ValueError or FileNotFoundError with the file and what is wrong in it. Nothing is unpickled.
    """
    wanted = None if dtype is None else _dtype(dtype, torch.float32)
    try:
        torch.empty(0, device=device).cpu()  # the meta device has nothing to give
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used: {error}") from None
    folder = _readable(folder)
    config = member(folder, _CONFIG)
    published = read_json(config)
    try:
        cfg = from_hf(published)
    except ValueError as error:
        raise ValueError(f"{config}: {error}") from None
    with ExitStack() as stack:
        found = open_shards(folder, stack)
        size = sum(path.stat().st_size for path in {path for path, _ in found.values()})
        if cfg.n_layers + cfg.mtp_depth > len(found) or cfg.qk_rope_head_dim > size:
            raise ValueError(f"{config}: describes more than the {len(found)} tensors beside it")
        with torch.device("meta"):
            try:
                model = Transformer(cfg)
            except (RuntimeError, TypeError) as error:  # more elements than torch can count
                raise ValueError(f"{config}: impossible sizes: {error}") from None
        stored = check_headers(model, folder, found)
        _allocate(model, wanted or stored, device)
        _read_values(model, found, allow_nonfinite)
    return model


def _dtype(given: str | torch.dtype | None, default: torch.dtype) -> torch.dtype:
    if given in ("fp8", torch.float8_e4m3fn):
        raise ValueError("checkpoints in fp8 are not available yet, choose 'bf16' or 'fp32'")
    named = {None: default, "fp32": torch.float32, "bf16": torch.bfloat16}
    dtype = named.get(given, given) if isinstance(given, str | None) else given
    if not isinstance(dtype, torch.dtype) or dtype not in CODES:
        raise ValueError(f"dtype of a checkpoint must be 'fp32' or 'bf16', got {dtype!r}")
    return dtype


def _readable(folder: str | Path) -> Path:
    """Return the folder, or the older one that a save killed between its renames left beside it."""
    folder = Path(folder).absolute()
    if not folder.exists() and _beside(folder, "old").is_dir():
        warnings.warn(f"{folder}: its last save was killed, reading the one before", stacklevel=3)
        folder = _beside(folder, "old")
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    return folder


def _allocate(model: Transformer, dtype: torch.dtype, device: str | torch.device) -> None:
    """Give a model of the meta device memory for its values, and its rotary frequencies."""
    model.to(dtype).to_empty(device=device)
    model.freq = nn.Buffer(frequencies(model.cfg).to(device), persistent=False)
    for router in model.routers:
        if router.bias is not None:
            router.bias = nn.Buffer(torch.empty_like(router.bias, dtype=torch.float32))


def _read_values(
    model: Transformer, found: dict[str, tuple[Path, Any]], allow_nonfinite: bool
) -> None:
    for slot in slots(model):
        path, file = found[slot.name]
        value = file.get_tensor(slot.name).to(slot.value.dtype)
        if not allow_nonfinite and not value.isfinite().all():
            raise ValueError(f"{path}: {slot.name} is not finite (allow_nonfinite=True reads it)")
        if slot.copy_of is None:
            slot.value.copy_(value)
        elif not torch.allclose(value, slot.value.cpu(), rtol=0, atol=0, equal_nan=True):
            raise ValueError(f"{path}: {slot.name} is not the copy of {slot.copy_of} it must be")
