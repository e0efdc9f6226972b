"""FP8 weights on disk: beside each weight, the numbers that multiply its blocks of 128 x 128.

Paper   README_WEIGHTS.md of the release: `weight_scale_inv` (in spite of its name a multiplier).
Dims    rows and cols of a weight, G and J blocks along them (the last ones may be ragged).
Book    book/11_fp8.ipynb               Kernel  none
Differs `scale_fmt` "ue8m0" says that scales are powers of two; others are read as they are: what
        they multiply to is as well defined.

What `save` wrote, read and saved in FP8 once more: FP32 scales through FP32 weights give the same
bytes, through BF16 weights the same codes and scales that differ by 2^-8 at most. Powers of two
give the same weights; a block whose largest code is 224 takes half the scale and codes twice as
large. A third time nothing changes.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minids.files.shards import FP8, SCALE, Slot
from minids.formats.groups import BLOCK, Scaled, dequantise, holds_nan, quantise, scale_shape

_AGAIN = "fetch this file again"


def written_bytes(slot: Slot, stored: torch.dtype) -> int:
    """Return the bytes that a tensor takes in a file of `stored` weights, its scales included."""
    dtype, shape = slot.dtype(stored), tuple(slot.value.shape)
    scales = math.prod(scale_shape(shape, BLOCK)) if dtype == FP8 else 0
    return slot.value.numel() * dtype.itemsize + scales * torch.float32.itemsize


def written(slot: Slot, stored: torch.dtype, scale_fmt: str | None) -> dict[str, Tensor]:
    """Return what a file of `stored` weights holds of a tensor: itself, in FP8 its scales too."""
    dtype = slot.dtype(stored)
    if dtype == FP8:
        scaled = quantise(slot.value.cpu(), BLOCK, scale_fmt)
        return {slot.name: scaled.values, slot.name + SCALE: scaled.scale}
    value = slot.value.to("cpu", dtype)  # in memory a second time only where this changes it
    return {slot.name: value.clone() if slot.copy_of else value.contiguous()}


def read_value(
    found: dict[str, tuple[Path, Any]],
    slot: Slot,
    stored: torch.dtype,
    allow_nonfinite: bool = False,
) -> Tensor:
    """Return one tensor in its slot's dtype; ValueError if a value is not finite."""
    path, file = found[slot.name]
    if slot.dtype(stored) == FP8:
        value = dequantise(read_scaled(found, slot.name, allow_nonfinite), slot.value.dtype)
    else:
        value = file.get_tensor(slot.name).to(slot.value.dtype)
    if not allow_nonfinite and not value.isfinite().all():
        raise ValueError(f"{path}: {slot.name} is not finite (allow_nonfinite=True reads it)")
    return value


def read_scaled(
    found: dict[str, tuple[Path, Any]], name: str, allow_nonfinite: bool = False
) -> Scaled:
    """Return an FP8 weight with its scales; ValueError names a code or scale that cannot be.

    `found` comes from `open_shards` and is checked by `check_headers`. The codes 0x7F and 0xFF are
    NaN. Scales must be above 0, and finite unless `allow_nonfinite`.
    """
    path, file = found[name]
    values = file.get_tensor(name)
    scale_path, scale_file = found[name + SCALE]
    scale = scale_file.get_tensor(name + SCALE)
    good = (scale > 0) & scale.isfinite()
    if allow_nonfinite:
        good |= scale.isnan() | (scale == torch.inf)
    if not good.all():
        at = _first(~good)
        raise ValueError(
            f"{scale_path}: {name}{SCALE} must be finite and above 0, "
            f"got {scale[tuple(at)].item()} for block {at}: {_AGAIN}"
        )
    if not allow_nonfinite and holds_nan(values):
        codes = values.view(torch.uint8)
        at = _first((codes & 0x7F) == 0x7F)
        raise ValueError(
            f"{path}: {name} is not finite, code 0x{codes[tuple(at)]:02X} at {at} is NaN: {_AGAIN} "
            "(allow_nonfinite=True reads it)"
        )
    return Scaled(values, scale, BLOCK)


def _first(where: Tensor) -> list[int]:
    return where.nonzero()[0].tolist()
