"""What the FP8 microscope is shown: formats with their numbers, and values that share a scale.

Data    minids.formats; a tensor for the reader to put an outlier into is drawn here.
Seen in book/11_fp8.ipynb
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minids.formats.bits import E4M3, E5M2, E5M6, Format, round_to
from minids.formats.groups import BLOCK, TILE, next_power_of_two

BF16 = Format("BF16", 8, 7)
INT8 = "INT8"
FLOATS = (E4M3, E5M2, E5M6, BF16)
LARGEST = {INT8: 127.0, "E4M3": E4M3.max, "E5M2": E5M2.max}  # where a group's max-abs lands
TOKENS, CHANNELS = 8, 256
GROUPS = {
    "tile": ("1 × 128 tile", TILE),
    "block": ("128 × 128 block", BLOCK),
    "row": ("one token", (1, CHANNELS)),
    "tensor": ("whole tensor", (TOKENS, CHANNELS)),
}
SIZES = [digit * 10**power for power in range(6) for digit in (1, 2, 5)] + [10**6]
START = dict(token=2, channel=40)  # where the outlier is at first


class Stored(NamedTuple):
    """A group that went through eight bits: its values after it, and the scale they shared."""

    values: Tensor
    scale: Tensor


def stored(group: Tensor, name: str, power_of_two: bool = False) -> Stored:
    """Return FP32 values that share a scale as E4M3, E5M2 or symmetric INT8 keeps them."""
    scale = group.abs().max() / LARGEST[name]
    scale = next_power_of_two(scale) if power_of_two else scale
    kept = (group / scale).clamp(-LARGEST[name], LARGEST[name])
    kept = kept.round() if name == INT8 else round_to(kept, {f.name: f for f in FLOATS}[name])
    return Stored(kept * scale, scale)


def numbers(fmt: Format) -> list[float]:
    """Return all finite numbers of a format above zero, in order."""
    steps = 2**fmt.mantissa_bits
    small = [fmt.min_subnormal * k for k in range(1, steps)]
    octaves = range(1 - fmt.bias, 2 + fmt.bias)  # E4M3 has numbers in its top exponent
    large = [2.0**e * (1 + k / steps) for e in octaves for k in range(steps)]
    return small + [value for value in large if value <= fmt.max]


def worst(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return where the steps from number to number begin, and the worst relative error in each.

    The first step leads from half of the smallest number, below which all becomes zero.
    """
    errors = [1.0] + [(b - a) / (b + a) for a, b in pairwise(values)]
    return [values[0] / 2, *values], [*errors, errors[-1]]


def error_of_others(tile: Tensor, others: Tensor, name: str, size: float) -> float:
    """Return the RMS error of the values beside an outlier, relative to their own RMS."""
    x = torch.where(others, tile, torch.tensor(float(size)))
    back, x = stored(x, name).values[others].double(), x[others].double()
    return ((back - x).norm() / x.norm()).item()


def number_data() -> dict[str, Any]:
    """Return the formats as the widget reads them, and numbers worth a look."""
    formats: list[dict[str, Any]] = []
    for fmt in FLOATS:
        formats.append(fmt._asdict() | dict(bits=fmt.bits, max=fmt.max))
    formats[-1]["overflows"] = True  # BF16 overflows to infinity, eight bits saturate
    step = E4M3.max / LARGEST[INT8]
    formats.append(dict(name=INT8, bits=8, step=step, max=E4M3.max))
    examples = [
        ["0.1", 0.1],
        ["17: halfway between 16 and 18", 17.0],
        ["19: halfway between 18 and 20", 19.0],
        ["E4M3's largest", E4M3.max],
        ["too large for E4M3", 1000.0],
        ["too large for E5M2", 60000.0],
        ["E4M3's smallest normal", E4M3.min_normal],
        ["a subnormal of E4M3", 0.005],
        ["E4M3's smallest", E4M3.min_subnormal],
        ["half of it: a tie with zero", E4M3.min_subnormal / 2],
        ["zero", 0.0],
        ["not a number", None],
    ]
    return dict(formats=formats, examples=examples, start=0.1)


def tile_data() -> dict[str, Any]:
    """Return values to quantise: normal ones, and log-normal ones of sigma 3 with either sign."""
    random = torch.Generator().manual_seed(11)
    normal, exponent, sign = torch.randn(3, TOKENS, CHANNELS, generator=random, dtype=torch.float64)
    drawn = {
        "normal": ("normal", normal),
        "spread": ("log-normal, σ = 3", sign.sign() * (3 * exponent).exp()),
    }
    data = [
        # four digits: small in the page, and the same on every machine
        dict(name=name, label=label, values=[[float(f"{v:.4g}") for v in row] for row in rows])
        for name, (label, rows) in drawn.items()
    ]
    groups = [dict(name=n, label=label, shape=list(shape)) for n, (label, shape) in GROUPS.items()]
    formats = [f for f in number_data()["formats"] if f["name"] in LARGEST]
    # here a scale is measured in INT8's own units
    formats = [f if f["name"] != INT8 else f | dict(step=1, max=LARGEST[INT8]) for f in formats]
    return dict(data=data, groups=groups, formats=formats, sizes=SIZES, start=START)
