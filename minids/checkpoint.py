"""A model on disk in Hugging Face's layout: config.json, safetensors shards, index, tokenizer.

Paper   none; the folder of the release.
Dims    none.
Book    book/14_train.ipynb             Kernel  none
Differs from the release: BF16 and FP32 too; deeper MTP modules go on counting layers.
"""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from minids.files.folder import replaced
from minids.files.hf import to_hf
from minids.files.opened import CONFIG, DTYPES, check_device, dtype_of, open_checkpoint
from minids.files.scaled import read_value, written, written_bytes
from minids.files.shards import FP8, INDEX, deal, slots
from minids.impl import use
from minids.model import Transformer
from minids.rope import frequencies
from minids.tokenizer import save_tokenizer


def save(
    model: Transformer,
    folder: str | Path,
    dtype: str | torch.dtype | None = None,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a folder that `load` and transformers read: "fp32", "bf16" or "fp8" (None: as it is).

    "fp8" is the layout of the release: E4M3 with a scale a block, of `cfg.scale_fmt`; embedding,
    head, norms and routers in BF16. An older checkpoint there stays whole until the new one is on
    disk beside it, `.NAME.new`; then both are renamed. Killed between the renames, the older one
    is `.NAME.old`: `load` finds it. Without a `tokenizer` the folder keeps its own. ValueError for
    what cannot be written or replaced, OSError when writing fails.
    """
    stored = dtype_of(model.embed.dtype if dtype is None else dtype, *DTYPES)
    if model.embed.is_meta:
        raise ValueError("the model has no values to save: it is on the meta device")
    if tokenizer is not None and (words := tokenizer.get_vocab_size()) > model.cfg.vocab_size:
        raise ValueError(f"the tokenizer has {words} tokens, vocab_size is {model.cfg.vocab_size}")
    config = to_hf(model.cfg, next(name for name, kind in DTYPES.items() if kind == stored))
    with replaced(folder) as new:
        _write_shards(model, new, stored, max_shard_bytes)
        (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        if tokenizer is not None:
            save_tokenizer(tokenizer, new)


def _write_shards(model: Transformer, folder: Path, stored: torch.dtype, max_bytes: int):
    parts = list(slots(model))
    sizes = [written_bytes(slot, stored) for slot in parts]
    shards = deal(parts, sizes, max_bytes)
    places = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        values: dict[str, Tensor] = {}
        for slot in shard:
            values |= written(slot, stored, model.cfg.scale_fmt)
        save_file(values, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(values, name)
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def load(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    allow_nonfinite: bool = False,
    impl: str = "torch",
) -> Transformer:
    """Return the model of a folder, in eval mode and in `dtype` (None: as stored, FP8 as BF16).

    FP8 weights are multiplied by their scales in FP32 and rounded once, to `dtype`; the router's
    bias is always FP32. Config and headers are checked before memory is taken, values as each
    tensor is read. Raises ValueError or FileNotFoundError with the file and what is wrong in it.
    Nothing is unpickled. Call `.train()` to go on training. `impl` as of Transformer.
    """
    wanted = None if dtype is None else dtype_of(dtype, "fp32", "bf16")
    check_device(device)
    with ExitStack() as stack:
        model, found, stored = open_checkpoint(folder, stack)
        use(model, impl)
        _allocate(model, wanted or (torch.bfloat16 if stored == FP8 else stored), device)
        _read_values(model, found, stored, allow_nonfinite)
    return model.eval()


def _allocate(model: Transformer, dtype: torch.dtype, device: str | torch.device) -> None:
    """Give a model of the meta device memory for its values, and its rotary frequencies."""
    model.to(dtype).to_empty(device=device)
    model.freq = nn.Buffer(frequencies(model.cfg).to(device), persistent=False)
    for router in model.routers:
        if router.bias is not None:
            router.bias = nn.Buffer(torch.empty_like(router.bias, dtype=torch.float32))


def _read_values(
    model: Transformer,
    found: dict[str, tuple[Path, Any]],
    stored: torch.dtype,
    allow_nonfinite: bool,
) -> None:
    for slot in slots(model):
        value = read_value(found, slot, stored, allow_nonfinite)
        if slot.copy_of is None:
            slot.value.copy_(value)
        elif not torch.allclose(value, slot.value.cpu(), rtol=0, atol=0, equal_nan=True):
            path = found[slot.name][0]
            raise ValueError(f"{path}: {slot.name} is not the copy of {slot.copy_of} it must be")
        del value  # before the next one is read
