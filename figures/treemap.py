"""A treemap: numbers as areas of one rectangle.

Data    any positive numbers by name.
Seen in book/01_count.ipynb
"""

from collections.abc import Mapping
from typing import NamedTuple


class Box(NamedTuple):
    """A rectangle of a treemap."""

    name: str
    x: float
    y: float
    width: float
    height: float


def cut(values: Mapping[str, float], x: float, y: float, width: float, height: float) -> list[Box]:
    """Cut a rectangle into areas as the values are: the largest first, off the longer side."""
    left, boxes = sum(values.values()), list[Box]()
    for name, n in sorted(values.items(), key=lambda item: -item[1]):
        if width >= height:
            boxes.append(Box(name, x, y, width * n / left, height))
            x, width = x + boxes[-1].width, width - boxes[-1].width
        else:
            boxes.append(Box(name, x, y, width, height * n / left))
            y, height = y + boxes[-1].height, height - boxes[-1].height
        left = left - n or 1  # nothing is left to cut behind the last
    return boxes
