"""Programs over tiles: who reads what, how near to the roof, eight levels, and a walker to step.

Data    minids.config by figures/walker.py; recorded accesses, machines and results are handed in.
Seen in book/12_kernels.ipynb
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from figures import style, walker
from figures.roofline import ALT_ROOFLINE, Machine, Point, draw_roofline
from minids.learn.kernels import Access
from minids.learn.widget import Explorable, explore

__all__ = [
    "ALT_LEVELS", "ALT_ROOFLINE", "ALT_TILES", "ALT_WIDGET", "Level", "Machine", "Point",
    "draw_levels", "draw_roofline", "draw_tiles", "widget",
]  # fmt: skip
WIDE = 6  # inches, at most: letters of 8 points stay readable on a phone
MISSING = "not yet measured"
ALT_TILES = (
    "A panel for each array, cut into the pieces that each program loads or stores; a piece "
    "carries its program's number, and is hatched where several programs read it."
)
ALT_LEVELS = "A bar a level of the same product: percent of its floor, beside the peer's mark."
ALT_WIDGET = (
    "Tile walker: programs walk over the tiles of a product, row by row or in stripes; change "
    "sizes, tiles, stripes and the L2 cache, and see what each step loads and from where."
)


class Level(NamedTuple):
    """A level of the product told in eight; None where it was not measured."""

    name: str
    percent: float | None = None  # of the floor
    peer: float | None = None  # of the same floor


Program = tuple[int, int, int]


def draw_tiles(records: Sequence[Access], shapes: Mapping[str, Sequence[int]]) -> Figure:
    """Draw which program loads and stores which elements, a panel for each array.

    Columns are the last axis, rows all others. A piece that several programs load is hatched, and
    has the colour of the first. A grid of several axes is written 0,1; a star is all of an axis.
    """
    used: dict[tuple[str, str], list[Access]] = {}
    for access in records:
        used.setdefault((access.name, access.kind), []).append(access)
    programs = sorted({access.program for access in records})
    sizes = {name: (math.prod(shape[:-1]), shape[-1]) for name, shape in shapes.items()}
    flat = all(sizes[name][0] <= 2 for name, _ in used)
    across = 1 if flat else min(3, len(used))
    down = -(-len(used) // across)
    with style.context():
        fig = Figure(figsize=(WIDE, down * (0.85 if flat else 2.3)), layout="constrained")
        axes = fig.subplots(down, across, squeeze=False).ravel()
        for ax, ((name, kind), accesses) in zip(axes, used.items(), strict=False):
            _draw_array(ax, name, sizes[name], accesses, programs)
            shape = " × ".join(str(n) for n in shapes[name] if n > 1)
            count = sum(len(access.offsets.ravel()) for access in accesses)
            ax.set_title(f"{name} [{shape}]: {count:,} {kind.rstrip('e')}ed", size=8)
        for ax in axes[len(used) :]:
            ax.axis("off")
    return fig


def _draw_array(
    ax: Axes,
    name: str,
    size: tuple[int, int],
    accesses: Sequence[Access],
    programs: Sequence[Program],
) -> None:
    rows, cols = size
    users: list[set[Program]] = [set() for _ in range(rows * cols)]
    for access in accesses:
        for offset in np.unique(access.offsets).tolist():
            if not 0 <= offset < rows * cols:
                raise ValueError(f"{name} must have {rows} x {cols} elements, got one at {offset}")
            users[offset].add(access.program)
    cells = [tuple(sorted(these)) for these in users]
    for (top, left, high, wide), these in _pieces([cells[r * cols :][:cols] for r in range(rows)]):
        colour = style.COLOURS[programs.index(these[0]) % 6]
        box = ((left, top), wide, high)
        ax.add_patch(Rectangle(*box, ec=colour, fc=(colour, 0.25), lw=0.8))
        if len(these) > 1:
            ax.add_patch(
                Rectangle(*box, ec=colour, fc="none", lw=0, hatch="//", hatch_linewidth=0.5)
            )
        ax.annotate(_label(these, programs), (left + wide / 2, top + high / 2), ha="center",
                    va="center", size=9, annotation_clip=False)  # fmt: skip
    ax.add_patch(Rectangle((0, 0), cols, rows, ec=style.INK, fc="none", lw=1))
    ax.set(xlim=(-0.02 * cols, 1.02 * cols), ylim=(1.02 * rows, -0.02 * rows))
    if rows > 2 and 0.3 < cols / rows < 3:
        ax.set_aspect("equal")
    ax.axis("off")


Programs = tuple[Program, ...]  # that use the same elements, in order


def _pieces(
    grid: Sequence[Sequence[Programs]],
) -> Iterator[tuple[tuple[int, int, int, int], Programs]]:
    """Cut a grid into rectangles of elements with the same programs; those of none are left out."""
    open_: dict[tuple[int, int, Programs], int] = {}  # runs that go on, and the row they began in
    for row, cells in enumerate([*grid, []]):
        runs: dict[tuple[int, int, Programs], int] = {}
        left = 0
        for col in range(1, len(cells) + 1):
            if col == len(cells) or cells[col] != cells[left]:
                if cells[left]:
                    run = (left, col, cells[left])
                    runs[run] = open_.pop(run, row)
                left = col
        for (first, end, these), top in open_.items():
            yield (top, first, row - top, end - first), these
        open_ = runs


def _label(these: Programs, programs: Sequence[Program]) -> str:
    axes = [a for a in range(3) if len({program[a] for program in programs}) > 1]
    parts = []
    for axis in axes or [0]:
        of_all, here = ({p[axis] for p in group} for group in (programs, these))
        if here == of_all and len(of_all) > 1:
            parts.append("*")
        elif len(here) > 2 and max(here) - min(here) == len(here) - 1:
            parts.append(f"{min(here)}–{max(here)}")
        else:
            parts.append("+".join(map(str, sorted(here))))
    return "all" if set(parts) == {"*"} else ",".join(parts)


def draw_levels(rows: Sequence[Level], peer: str = "torch", source: str = "") -> Figure:
    """Draw percent of the floor, a bar a level, with the peer's mark; `source` says whose numbers.

    A level without a number says that it is not yet measured.
    """
    with style.context():
        fig = Figure(figsize=(WIDE, 0.9 + 0.32 * len(rows)), layout="constrained")
        ax = fig.subplots()
        for number, level in enumerate(rows):
            if level.percent is None:
                ax.annotate(MISSING, (1, number), va="center", size=8, style="italic")
            else:
                ax.barh(number, level.percent, 0.62, color=style.COLOURS[0])
                ax.annotate(f"{level.percent:.3g} %", (level.percent, number), (3, 0), va="center",
                            textcoords="offset points", size=8)  # fmt: skip
            if level.peer is not None:
                ax.plot([level.peer] * 2, [number - 0.42, number + 0.42], color=style.COLOURS[1],
                        lw=2, label=peer)  # fmt: skip
        ax.set(xlim=(0, 112), ylim=(len(rows) - 0.4, -0.6), xlabel="% of the floor")
        ax.set_xticks(range(0, 101, 20))
        ax.set_yticks(range(len(rows)), [level.name for level in rows])
        ax.grid(axis="y", visible=False)
        if marks := ax.get_legend_handles_labels()[0][:1]:
            fig.legend(marks, [f"{peer}, the same floor"], loc="outside upper right", fontsize=8)
        fig.supxlabel(source, size=8)
    return fig


def widget() -> Explorable:
    """Return the tile walker."""
    return explore("kernels", walker.data(), ALT_WIDGET)
