"""The tensors of a checkpoint: their published names, and shards that are opened with distrust.

Paper   none; the files of the release: names, shapes and dtypes.
Dims    none: shapes are those of the model's own weights.
Book    book/14_train.ipynb             Kernel  none
Differs MTP modules behind the first (none is released) go on counting layers.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minids.config import Config
from minids.formats.groups import BLOCK, scale_shape
from minids.model import Transformer

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
FP8 = torch.float8_e4m3fn
CODES = {torch.float32: "F32", torch.bfloat16: "BF16", FP8: "F8_E4M3"}  # in a safetensors header
SCALE = "_scale_inv"  # behind the name of a FP8 weight: the name of its scales
_MAX_JSON_BYTES = 1 << 27  # the release's index has 9 MB
_TABLES = {"embed": "model.embed_tokens.weight", "head.weight": "lm_head.weight"}
_COPIES = {"embed": "embed_tokens.weight", "head.weight": "shared_head.head.weight"}  # a MTP module
# our name inside a layer or MTP module: the published one
_TENSORS = {
    "attn_norm.gain": "input_layernorm.weight", "ffn_norm.gain": "post_attention_layernorm.weight",
    "attn.w_dq.weight": "self_attn.q_a_proj.weight", "attn.w_o.weight": "self_attn.o_proj.weight",
    "attn.w_uq.weight": "self_attn.q_b_proj.weight", "attn.w_q.weight": "self_attn.q_proj.weight",
    "attn.w_dkv.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attn.w_ukv.weight": "self_attn.kv_b_proj.weight",
    "attn.q_norm.gain": "self_attn.q_a_layernorm.weight",
    "attn.kv_norm.gain": "self_attn.kv_a_layernorm.weight",
    "ffn.w_gate.weight": "mlp.gate_proj.weight", "ffn.w_up.weight": "mlp.up_proj.weight",
    "ffn.w_down.weight": "mlp.down_proj.weight", "ffn.router.centroids": "mlp.gate.weight",
    "ffn.router.bias": "mlp.gate.e_score_correction_bias",
    "ffn.shared.w_gate.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared.w_up.weight": "mlp.shared_experts.up_proj.weight",
    "ffn.shared.w_down.weight": "mlp.shared_experts.down_proj.weight",
    "embedding_norm.gain": "enorm.weight", "hidden_norm.gain": "hnorm.weight",
    "w_merge.weight": "eh_proj.weight", "norm.gain": "shared_head.norm.weight",
}  # fmt: skip


class Slot(NamedTuple):
    """One tensor of a checkpoint; `value` shares the model's memory."""

    name: str
    value: Tensor
    copy_of: str | None = None  # MTP modules carry copies of embedding and head

    def dtype(self, stored: torch.dtype) -> torch.dtype:
        """Return the dtype it has in a file of `stored` weights, as in the release."""
        if self.name.endswith("e_score_correction_bias"):
            return torch.float32
        in_fp8 = "self_attn." in self.name or "mlp." in self.name
        kept = self.value.ndim == 1 or self.name.endswith("mlp.gate.weight") or not in_fp8
        return torch.bfloat16 if stored == FP8 and kept else stored


def slots(model: Transformer) -> Iterator[Slot]:
    """Yield every tensor of a model's checkpoint, expert by expert; copies come last."""
    for name, value in model.state_dict().items():
        if not name.startswith(("layers.", "mtp.")):
            yield Slot(_TABLES.get(name, "model.norm.weight"), value)
            continue
        kind, number, rest = name.split(".", 2)
        rest = rest.removeprefix("block.")
        layer = int(number) + (model.cfg.n_layers if kind == "mtp" else 0)
        if rest in _TENSORS:
            yield Slot(layer_tensor(layer, rest), value)
            continue
        for e in range(len(value)):
            expert = value[e]
            parts = {"gate": expert[0], "up": expert[1]} if "gate_up" in rest else {"down": expert}
            for part, weight in parts.items():
                yield Slot(expert_tensor(layer, e, part), weight)
    for k in range(model.cfg.mtp_depth):
        for ours, copy in _COPIES.items():
            name = f"model.layers.{model.cfg.n_layers + k}.{copy}"
            yield Slot(name, model.state_dict()[ours], copy_of=_TABLES[ours])


def layer_tensor(layer: int, ours: str) -> str:
    """Return the published name of a tensor that is called `ours` in a Block."""
    return f"model.layers.{layer}.{_TENSORS[ours]}"


def expert_tensor(layer: int, expert: int, part: str) -> str:
    """Return the published name of one matrix of a routed expert: its gate, up or down."""
    return f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"


def tensor_names(
    cfg: Config, stored: torch.dtype = torch.bfloat16
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of every tensor in files of `stored` weights; FP8 has block scales."""
    with torch.device("meta"):
        model = Transformer(cfg)
    parts = (part for slot in slots(model) for part in _stored(slot, stored))
    return {name: (shape, dtype) for name, shape, dtype in parts}


def _stored(slot: Slot, stored: torch.dtype) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """Yield what a file of `stored` weights holds of a slot: it, and in FP8 its scales."""
    shape, dtype = tuple(slot.value.shape), slot.dtype(stored)
    yield slot.name, shape, dtype
    if dtype == FP8:
        yield slot.name + SCALE, scale_shape(shape, BLOCK), torch.float32


def deal(items: Sequence[Any], sizes: Sequence[int], max_bytes: int) -> list[list[Any]]:
    """Deal items in order to shards of `max_bytes` (one that is larger has its own)."""
    shards: list[list[Any]] = [[]]
    filled = 0
    for item, size in zip(items, sizes, strict=True):
        if filled and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += size
    return shards


def member(folder: Path, name: str) -> Path:
    """Return a file of the folder; ValueError if its name leads out, by `..`, a root or a link."""
    try:
        path, roots = folder / name, [folder.resolve()]
        real, is_file = path.resolve(), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder}: cannot hold a file {name!r:.80}: {error}") from None
    if roots[0].parent.name == "snapshots":  # the hub's cache: a snapshot links into its blobs
        roots.append(roots[0].parents[1] / "blobs")
    if not any(real.is_relative_to(root) for root in roots):
        raise ValueError(f"{folder}: {name!r:.80} points outside the folder, to {real}")
    if not is_file:
        raise FileNotFoundError(f"{path}: no such file")
    return path


def read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"larger than {_MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must be a JSON object, got {value!r:.80}")
    return value


def _open(path: Path, stack: ExitStack) -> Any:
    """Return safetensors' handle (untyped); it compares its header with the file's size."""
    try:
        return stack.enter_context(safe_open(path, "pt"))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file, fetch it again: {error}") from None


def weight_map(folder: Path) -> dict[str, str]:
    """Return the file of every tensor, as the index has it."""
    index = member(folder, INDEX)
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise ValueError(f"{index}: weight_map must map tensors to files, got {places!r:.80}")
    return places


def open_shards(folder: Path, stack: ExitStack) -> dict[str, tuple[Path, Any]]:
    """Return file and handle of every tensor; it must be where the index says, and only there."""
    if not os.path.lexists(folder / INDEX):
        path = member(folder, SINGLE)
        file = _open(path, stack)
        return {name: (path, file) for name in file.keys()}
    places, found = weight_map(folder), {}
    for shard in sorted(set(places.values())):
        path = member(folder, shard)
        file = _open(path, stack)
        for name in file.keys():
            if name in found:
                raise ValueError(f"{path}: {name} is in {found[name][0].name} too")
            if places.get(name) != shard:
                raise ValueError(f"{path}: unexpected tensor {name}, {INDEX} does not put it here")
            found[name] = path, file
    if absent := sorted(places.keys() - found.keys()):
        path = folder / places[absent[0]]
        raise ValueError(f"{path}: tensor {absent[0]} is missing (minids count lists all)")
    return found


def check_headers(
    model: Transformer, folder: Path, found: dict[str, tuple[Path, Any]], quantised: bool = False
) -> torch.dtype:
    """Return the dtype of the stored weights; ValueError if a name, shape or dtype is wrong.

    `quantised` says that config.json has a quantization_config: FP8 is read then, and only then.
    """
    stored, names = FP8 if quantised else torch.float32, set()
    for slot in slots(model):
        for name, shape, dtype in _stored(slot, stored):
            if name not in found:
                raise ValueError(f"{folder}: tensor {name} is missing (minids count lists all)")
            path, file = found[name]
            header = file.get_slice(name)
            is_now = header.get_dtype(), header.get_shape()
            if not (names or quantised) and is_now[0] == "BF16":
                stored = dtype = torch.bfloat16  # the first tensor decides for all
            must_be = CODES[dtype], list(shape)
            if is_now != must_be:
                advice = _advice(name, is_now[0], must_be[0], quantised)
                raise ValueError(f"{path}: {name} must be {must_be}, got {is_now}{advice}")
            names.add(name)
    if extra := sorted(found.keys() - names):
        bare = extra[0].removesuffix(SCALE)
        why = f", {bare} is not in FP8 and has no scales" if bare in names else ""
        raise ValueError(f"{found[extra[0]][0]}: unexpected tensor {extra[0]}{why}")
    return stored


def _advice(name: str, is_now: str, must_be: str, quantised: bool) -> str:
    """Say what to do about a tensor of a wrong dtype or shape, where FP8 is in question."""
    if is_now == CODES[FP8] and not quantised:
        return ": FP8 needs its scales and the quantization_config of the release in config.json"
    if must_be == CODES[FP8] and is_now in CODES.values() and is_now != must_be:
        return ": other weights than FP8 need a config.json without quantization_config"
    return ": a FP32 scale a block of 128 x 128" if name.endswith(SCALE) else ""
