"""What is really in a checkpoint's folder, from the headers of its files: seconds for 700 GB.

Paper   none; the files of the release: names, shapes and dtypes.
Dims    none: shapes are those of the model's own weights.
Book    book/01_count.ipynb             Kernel  none
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minids.config import Config
from minids.files.shards import (
    CODES,
    FP8,
    INDEX,
    SINGLE,
    member,
    read_json,
    tensor_names,
    weight_map,
)

_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_LAYOUTS = {FP8: "fp8", torch.bfloat16: "bf16", torch.float32: "fp32"}


class Header(NamedTuple):
    """What a file says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    n_bytes: int
    file: str


@dataclass
class Inventory:
    """What a folder holds, and how it differs from what its config.json describes."""

    layout: str  # "fp8", "bf16" or "fp32"
    expected: int  # tensors in files of this layout
    files: int = 0
    file_bytes: int = 0  # headers included
    dtypes: dict[str, dict[str, int]] = field(default_factory=dict)  # tensors, elements, bytes
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong: dict[str, str] = field(default_factory=dict)  # tensor: what is wrong with it
    missing_files: list[str] = field(default_factory=list)
    damaged_files: dict[str, str] = field(default_factory=dict)  # file: what is wrong with it

    @property
    def complete(self) -> bool:
        """Whether each tensor is there as `load` wants it; values are not looked at."""
        tensors = self.missing or self.unexpected or self.wrong
        return not (tensors or self.missing_files or self.damaged_files)

    def as_dict(self) -> dict[str, Any]:
        return {"complete": self.complete} | asdict(self)


def take_inventory(folder: Path, cfg: Config) -> Inventory | None:
    """Compare a folder's files with its config; None where it has neither weights nor an index.

    What is missing, cut off, wrong or too much is told and not raised. ValueError as in `load` for
    an index or config.json that cannot be read and for names that lead out of the folder.
    """
    places = weight_map(folder) if os.path.lexists(folder / INDEX) else {}
    names = sorted(set(places.values())) or sorted(p.name for p in folder.glob("*.safetensors"))
    if not names:
        return None
    held = Inventory("", 0)
    if not places and names != [SINGLE]:
        held.missing_files.append(INDEX)
    found = _read_files(folder, names, held)
    for name, header in found.items():
        if places and places.get(name) != header.file:
            held.wrong[name] = f"is in {header.file}, {INDEX} says {places.get(name, 'nothing')}"
    quantised = read_json(member(folder, "config.json")).get("quantization_config") is not None
    stored = FP8 if quantised else _most(found.values())
    expected = tensor_names(cfg, stored)
    held.layout, held.expected = _LAYOUTS[stored], len(expected)
    held.missing = [name for name in expected | places if name not in found]
    held.unexpected = [name for name in found if name not in expected]
    for name, (shape, dtype) in expected.items():
        if header := found.get(name):
            must_be, is_now = (CODES[dtype], list(shape)), (header.dtype, list(header.shape))
            if must_be != is_now or math.prod(shape) * dtype.itemsize != header.n_bytes:
                held.wrong[name] = f"must be {must_be}, is {is_now} in {header.file}"
    return held


def _read_files(folder: Path, names: list[str], held: Inventory) -> dict[str, Header]:
    """Return the tensors of the files that are there; count all of it in `held`."""
    found: dict[str, Header] = {}
    for name in names:
        try:
            path = member(folder, name)
        except FileNotFoundError:
            held.missing_files.append(name)
            continue
        headers, problem = read_headers(path)
        held.files += 1
        held.file_bytes += path.stat().st_size
        held.damaged_files |= {name: problem} if problem else {}
        for tensor, header in headers.items():
            if tensor in found:
                held.wrong[tensor] = f"is in {found[tensor].file} and in {name}"
            found[tensor] = header
            size = held.dtypes.setdefault(header.dtype, dict(tensors=0, elements=0, bytes=0))
            size["tensors"] += 1
            size["elements"] += math.prod(header.shape)
            size["bytes"] += header.n_bytes
    return found


def _most(headers: Iterable[Header]) -> torch.dtype:
    """Return FP32 where most bytes are in it, else BF16: what weights without FP8 are stored in."""
    n_bytes = dict(F32=0, BF16=0)
    for header in headers:
        n_bytes[header.dtype] = n_bytes.get(header.dtype, 0) + header.n_bytes
    return torch.float32 if n_bytes["F32"] > n_bytes["BF16"] else torch.bfloat16


def read_headers(path: Path) -> tuple[dict[str, Header], str]:
    """Return the tensors that a file holds to their last byte; what is wrong with it, or ""."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start == b"version ":
            return {}, "is a pointer of git-lfs: git lfs pull fetches the file"
        if length > min(size - 8, _MAX_HEADER_BYTES):
            return {}, f"ends inside its header, or is no safetensors file: {size:,} bytes"
        content = file.read(length)
    found, end = {}, 0
    try:
        described = json.loads(content)
        described.pop("__metadata__", None)
        for name, about in described.items():
            first, last = about["data_offsets"]
            end = max(end, last)
            if 8 + length + last <= size:
                shape = tuple(int(width) for width in about["shape"])
                found[name] = Header(str(about["dtype"]), shape, last - first, path.name)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}, "its header cannot be read: no safetensors file"
    if (whole := 8 + length + end) != size:
        return found, f"has {size:,} bytes, {whole:,} are the whole file: fetch it again"
    return found, ""
