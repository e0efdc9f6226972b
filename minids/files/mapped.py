"""Tensors that stay on disk: each is mapped by itself where it is used, and unmapped after.

Paper   none.
Dims    rows of a matrix.
Book    book/11_fp8.ipynb               Kernel  none
Differs safetensors maps whole files; of them every page that was touched counts as resident. The
        system keeps what was read in its page cache as long as nobody else needs the memory.
"""

import json
import math
import mmap
import os
import sys
from collections.abc import Iterable, Sequence
from errno import EFAULT
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minids.files.scaled import read_scaled
from minids.files.shards import CODES, SCALE
from minids.formats.groups import Scaled, dequantise

_DTYPES = {code: dtype for dtype, code in CODES.items()}
_ALIGNED = 64  # bytes: torch's own tensors
_POPULATE_READ = 22  # Linux 5.14: read at once, and say so if the disk cannot


class Place(NamedTuple):
    """Where a tensor lies."""

    path: Path
    version: tuple[int, int]  # size and time of change of the file when its header was read
    start: int  # bytes
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Mapped:
    """The tensors of checked safetensors files, read one at a time to a device, in a dtype."""

    def __init__(self, paths: Iterable[Path], device: str | torch.device, dtype: torch.dtype):
        self.device, self.dtype = torch.device(device), dtype
        self.places: dict[str, Place] = {}
        for path in sorted(paths):
            self.places |= _places(path)
        self.found: dict[str, tuple[Path, Any]] = {
            name: (place.path, self) for name, place in self.places.items()
        }
        self.rooms = [torch.empty(0, dtype=dtype) for _ in range(2)]
        self.bytes_read, self.seconds_waited = 0, 0.0
        self.before_read = lambda: None  # may raise, where a run may stop

    def weight(self, *names: str) -> Tensor:
        """Return a weight, FP8 multiplied by its scales; several of one shape as one stack.

        The memory of an FP8 weight is used again: it holds until the next but one is asked for.

        Raises ValueError for a NaN code or a bad scale, OSError where a file cannot be read any
        more; both name it.
        """
        if names[0] + SCALE not in self.places:
            values = [self.get_tensor(name) for name in names]
            exact = names[0].endswith("e_score_correction_bias")  # FP32 in every model
            value = values[0] if len(names) == 1 else torch.stack(values)
            return self._placed(value, torch.float32 if exact else self.dtype)
        parts = [read_scaled(self.found, name) for name in names]
        values, scale = parts[0][:2]
        if len(names) > 1:
            values = torch.stack([part.values for part in parts])
            scale = torch.stack([part.scale for part in parts])
        scaled = Scaled(values.to(self.device), scale.to(self.device), parts[0].group)
        return dequantise(scaled, self.dtype, self._room(values.shape))

    def _room(self, shape: torch.Size) -> Tensor | None:
        """Return memory of that shape, of two pieces in turns: an expert's matrices live together.

        The system clears fresh memory page by page, which took as long as all the rest.
        """
        if self.device.type != "cpu":
            return None
        self.rooms.reverse()
        if self.rooms[0].numel() < shape.numel():
            self.rooms[0] = torch.empty(shape.numel(), dtype=self.dtype)
        return self.rooms[0][: shape.numel()].unflatten(0, shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return some rows of an unscaled table."""
        return self._placed(self.get_tensor(name, start, stop), self.dtype)

    def _placed(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        # the last digits of a product depend on how memory is aligned, in files it is not
        value = value.clone() if value.data_ptr() % _ALIGNED else value
        return value.to(self.device, dtype)

    def get_tensor(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return a tensor as stored, or some rows of it; its memory is the file's own."""
        self.before_read()
        place = self.places[name]
        if stop is not None:
            row_bytes = place.nbytes // place.shape[0]
            shape = (min(stop, place.shape[0]) - start, *place.shape[1:])
            place = place._replace(start=place.start + start * row_bytes, shape=shape)
        began = perf_counter()
        lead, pages = _map(place, name)
        self.seconds_waited += perf_counter() - began
        self.bytes_read += place.nbytes
        count = math.prod(place.shape)
        flat = torch.frombuffer(pages, dtype=place.dtype, count=count, offset=lead)
        return flat.unflatten(0, place.shape)

    def prefetch(self, names: Sequence[str]) -> None:
        """Ask the system to read what will be used soon; it does so while we compute."""
        if sys.platform != "linux":
            return
        for name in names:
            for place in (self.places[name], self.places.get(name + SCALE)):
                if place is not None and place.path.exists():
                    with open(place.path, "rb") as file:
                        advice = os.POSIX_FADV_WILLNEED
                        os.posix_fadvise(file.fileno(), place.start, place.nbytes, advice)


def _places(path: Path) -> dict[str, Place]:
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header, version = json.loads(file.read(size)), _version(file.fileno())
    header.pop("__metadata__", None)
    return {
        name: Place(
            path,
            version,
            8 + size + entry["data_offsets"][0],
            tuple(entry["shape"]),
            _DTYPES[entry["dtype"]],
        )
        for name, entry in header.items()
    }


def _version(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


def _map(place: Place, name: str) -> tuple[int, mmap.mmap]:
    """Map the pages of a tensor; return how far in them it starts, and the map."""
    lead = place.start % mmap.ALLOCATIONGRANULARITY
    try:
        with open(place.path, "rb") as file:
            if _version(file.fileno()) != place.version:
                raise ValueError(f"{place.path}: changed while it was read, at {name}")
            length, at = lead + place.nbytes, place.start - lead
            # a copy on write that nobody writes: torch wants memory it could write to
            pages = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=at)
        if sys.platform == "linux":
            _populate(pages)
    except OSError as error:
        why = error.strerror or error
        raise OSError(f"{place.path}: cannot be read any more, at {name}: {why}") from error
    return lead, pages


def _populate(pages: mmap.mmap) -> None:
    """Read all pages now: a disk that fails then is an error, and later would end the process."""
    try:
        pages.madvise(_POPULATE_READ)
    except OSError as error:
        if error.errno == EFAULT:
            raise OSError(error.errno, "the disk cannot give it") from error
        # an older Linux reads each page where it is touched
