"""A checkpoint of invented weights: real names, shapes, dtypes and shards, to try what reads them.

Paper   none; the files of the release (README_WEIGHTS.md), shard by shard.
Dims    none.
Book    book/11_fp8.ipynb               Kernel  none
Differs values are drawn, not trained: what it writes means nothing. Large tensors repeat a pool of
        random numbers from a place of their own, so that they are written as fast as the disk is.
"""

import json
import math
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minids.config import Config
from minids.files.folder import replaced
from minids.files.hf import to_hf
from minids.files.opened import CONFIG
from minids.files.shards import CODES, FP8, INDEX, SCALE, deal, tensor_names
from minids.formats.groups import next_power_of_two
from minids.tokenizer import SPECIAL_TOKENS, save_tokenizer, train_tokenizer

FILLS = ("random", "sparse")
RELEASED_SHARD_BYTES = 4_250_000_000  # deals V3 into as many files as the release has
_POOL = 33_554_393  # numbers; a prime, so that no row of a matrix is another one
_CODE_STD = 112.0  # of the FP8 numbers: the largest of a block is then about 4 times that, 448
_WORDS = 256 + len(SPECIAL_TOKENS)  # rows of the tables that the tokenizer knows
_PAGE = 4096  # bytes


class Tensors(NamedTuple):
    """One tensor to write."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_table(self) -> bool:
        return self.name.endswith(("embed_tokens.weight", "head.weight"))

    def written(self, fill: str) -> int:
        """Return how many bytes from its start on are written; the rest is a hole, zeros."""
        if fill == "random":
            return self.nbytes
        if self.is_table:
            return min(_WORDS, self.shape[0]) * self.nbytes // self.shape[0]
        return 0 if self.dtype == FP8 or self.name.endswith("eh_proj.weight") else self.nbytes


def make_checkpoint(
    folder: str | Path,
    cfg: Config,
    fill: str = "random",
    max_shard_bytes: int = RELEASED_SHARD_BYTES,
    seed: int = 0,
    tell: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Write an FP8 checkpoint: "random" weights, or "sparse" ones, zeros that take no disk.

    Scales, norms, routers and the rows of the tables that its tokenizer knows are drawn in either
    case. `tell` hears of bytes as they are done. Raises ValueError for a folder that exists, and
    OSError for a disk without the room, before anything is written; a run that stops on the way
    leaves nothing.
    """
    folder = Path(folder)
    if fill not in FILLS:
        raise ValueError(f"fill must be one of {', '.join(FILLS)}, got {fill!r}")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be at least 1, got {max_shard_bytes}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists: choose a new folder, or delete it")
    tensors = [Tensors(name, *rest) for name, rest in tensor_names(cfg, FP8).items()]
    check_room(folder, sum(tensor.written(fill) + _PAGE for tensor in tensors))
    shards = deal(tensors, [tensor.nbytes for tensor in tensors], max_shard_bytes)
    draw = _Draws(cfg, fill, seed)
    places = {}
    with replaced(folder) as new:
        for number, shard in enumerate(shards, start=1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            _write_shard(new / name, shard, draw, tell)
            places |= {tensor.name: name for tensor in shard}
        total = {"total_size": sum(tensor.nbytes for tensor in tensors)}
        index = {"metadata": total, "weight_map": places}
        (new / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        (new / CONFIG).write_text(json.dumps(to_hf(cfg, "fp8"), indent=2) + "\n")
        if cfg.vocab_size >= _WORDS:
            save_tokenizer(train_tokenizer([], _WORDS), new)


def check_room(folder: Path, need: int) -> None:
    """Raise OSError unless the disk of a folder to be has `need` bytes free."""
    there = next(path for path in folder.absolute().parents if path.exists())
    if (free := shutil.disk_usage(there).free) < need:
        room = f"{need / 1e9:,.1f} GB are needed, {free / 1e9:,.1f} GB are free"
        raise OSError(f"{folder}: {room}; fewer layers or --fill sparse need less")


def _write_shard(
    path: Path, shard: list[Tensors], draw: "_Draws", tell: Callable[[int], None]
) -> None:
    """Write a file as safetensors does: wide dtypes first, so that every tensor is aligned."""
    shard = sorted(shard, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, dtype in shard:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entry = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [start, end]}
        entries[name] = entry
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in shard:
            behind = file.tell() + tensor.nbytes
            draw.write(file, tensor)
            file.seek(behind)
            tell(tensor.nbytes)
        file.truncate()  # as long as it says, though it may end in a hole


class _Draws:
    """What tensors hold: each draws from its name and the seed, so that copies are copies."""

    def __init__(self, cfg: Config, fill: str, seed: int):
        self.cfg, self.fill, self.seed = cfg, fill, seed
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(_POOL if fill == "random" else _POOL // 64, generator=generator)
        self.pools = {
            FP8: _bytes((_CODE_STD * normal).clamp(-448, 448).to(FP8)),
            torch.bfloat16: _bytes((cfg.init_std * normal).bfloat16()),
        }
        self.faint = _bytes((2**-10 * cfg.init_std * normal).bfloat16())

    def write(self, file: BinaryIO, tensor: Tensors) -> None:
        name = tensor.name.split(".")[-2]  # of a copy as of its table
        key = "head" if name in ("head", "lm_head") else name if tensor.is_table else tensor.name
        rng = np.random.default_rng([self.seed, zlib.crc32(key.encode())])
        length = tensor.written(self.fill)
        if len(tensor.shape) == 1 or tensor.name.endswith(SCALE):
            file.write(_bytes(self._small(tensor, rng)))
        elif key == "head":  # words that the tokenizer cannot spell are unlikely
            spelled = min(length, _WORDS * tensor.nbytes // tensor.shape[0])
            _repeat(file, self.pools[tensor.dtype], spelled, rng)
            _repeat(file, self.faint, length - spelled, rng)
        else:
            _repeat(file, self.pools[tensor.dtype], length, rng)

    def _small(self, tensor: Tensors, rng: np.random.Generator) -> Tensor:
        """Draw scales (of weights with the config's init_std), gains about 1, biases about 0."""
        if tensor.name.endswith(SCALE):
            spread = torch.from_numpy(rng.uniform(0.5, 2.0, tensor.shape))
            scale = (self.cfg.init_std / _CODE_STD * spread).float()
            return next_power_of_two(scale) if self.cfg.scale_fmt == "ue8m0" else scale
        normal = torch.from_numpy(rng.standard_normal(tensor.shape))
        is_bias = tensor.name.endswith("bias")
        return (0.01 * normal if is_bias else 1 + 0.05 * normal).to(tensor.dtype)


def _bytes(values: Tensor) -> memoryview:
    return values.flatten().view(torch.uint8).numpy().data


def _repeat(file: BinaryIO, pool: memoryview, length: int, rng: np.random.Generator) -> None:
    """Write `length` bytes of the pool, from a random place on, from its start again at its end."""
    start = int(rng.integers(len(pool) // 8)) * 8
    for piece in _pieces(pool, start, length):
        file.write(piece)


def _pieces(pool: memoryview, start: int, length: int) -> Iterator[memoryview]:
    while length:
        piece = pool[start : start + length]
        yield piece
        start, length = 0, length - len(piece)
