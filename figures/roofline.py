"""A roofline: what a machine's bytes and products allow, and where V3's products stand under it.

Data    machines and points are handed in.
Seen in book/12_kernels.ipynb
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures import style

WIDE = 6  # inches
MARKERS, DASHES = "osD^v*P", ("-", "--", "-.", ":")
LINE_POINTS = 11  # from one name to the next
APART = 15  # times as large: a name of 16 letters fits between
ALT_ROOFLINE = (
    "Roofline: attainable TFLOP/s over operations for each byte, both logarithmic, a roof for "
    "each machine. V3's products of a few tokens stand on the slope, where bytes decide, those of "
    "a long prompt at the flat part, where the rate of products does."
)


class Machine(NamedTuple):
    """What a machine can do in a second."""

    name: str
    tb_s: float
    tflops: float


class Point(NamedTuple):
    """A job on the roofline; one without a rate stands on the highest roof above it."""

    name: str
    intensity: float  # operations for each byte moved
    tflops: float | None = None  # measured
    family: str = ""  # those of one family share a marker


def draw_roofline(machines: Sequence[Machine], points: Sequence[Point]) -> Figure:
    """Draw each machine's roof, and the points under it with their names.

    A point with a measured rate is filled, one that only stands on the roof is hollow.
    """
    best = max(machines, key=lambda m: m.tflops)
    ends = [p.intensity for p in points]
    families = list(dict.fromkeys(p.family for p in points))
    with style.context():
        above = 0.1 + 0.18 * -(-(len(machines) + len(families)) // 2)  # inches of the legend
        fig = Figure(figsize=(WIDE, 4.4 + above))
        ax = fig.add_axes((0.12, 0.5 / (4.4 + above), 0.86, 3.9 / (4.4 + above)))
        left, right = min([0.1, *ends]), 12 * max([1e3, *ends])
        lowest = min([m.tflops for m in machines] + [p.tflops for p in points if p.tflops])
        ax.set(xscale="log", yscale="log", xlim=(left, right), ylim=(lowest / 30, 3 * best.tflops))
        ax.set(xlabel="operations for each byte moved", ylabel="TFLOP/s")
        for number, m in enumerate(machines):
            xs = [left, min(max(m.tflops / m.tb_s, left), right), right]
            ax.plot(xs, [_roof(m, x) for x in xs], DASHES[number % 4], lw=1.4,
                    label=f"{m.name}: {m.tb_s:.3g} TB/s, {_three(m.tflops)} TFLOP/s")  # fmt: skip
        for number, family in enumerate(families):
            for measured in (False, True):
                these = [
                    p for p in points if (p.family, p.tflops is not None) == (family, measured)
                ]
                if these:
                    label = f"{family}{', measured' if measured else ''}".strip(", ")
                    colour = style.COLOURS[(number + 3) % 6]
                    ax.plot([p.intensity for p in these], [_rate(machines, p) for p in these],
                            MARKERS[number % 7], ms=5, label=label or None, color=colour, zorder=3,
                            mfc=colour if measured else "none")  # fmt: skip
        steep = [p for p in points if p.tflops is None and p.intensity < best.tflops / best.tb_s]
        for these, up in ((steep, True), ([p for p in points if p not in steep], False)):
            for near in _neighbours(these):
                _write(ax, [(p.name, p.intensity, _rate(machines, p)) for p in near], up)
        low, high = (math.floor(math.log10(y)) for y in (ax.get_ylim()[0], 3 * best.tflops))
        ax.set_yticks([10.0**e for e in range(low + 1, high + 1)])
        ax.yaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
        fig.legend(loc="upper center", fontsize=8, ncols=2)
    return fig


def _three(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _roof(m: Machine, intensity: float) -> float:
    return min(m.tflops, m.tb_s * intensity)


def _rate(machines: Sequence[Machine], p: Point) -> float:
    return p.tflops or max(_roof(m, p.intensity) for m in machines)


def _neighbours(points: Sequence[Point]) -> Iterator[list[Point]]:
    """Yield points whose names would meet: those of the next ones begin too far to the right."""
    near: list[Point] = []
    for p in sorted(points, key=lambda p: p.intensity):
        if near and p.intensity > APART * near[-1].intensity:
            yield near
            near = []
        near.append(p)
    if near:
        yield near


def _write(ax: Axes, points: Sequence[tuple[str, float, float]], above: bool) -> None:
    """Write names beside points, each at the end of its own line, so that none covers another.

    Above the points names go to the left and rise from left to right, below it is the reverse.
    The axis grows where it is too short for them.
    """
    stair, side = sorted(points, key=lambda p: p[1], reverse=not above), 1 if above else -1
    first = (max if above else min)(y for _, _, y in stair)
    bottom, top = map(math.log10, ax.get_ylim())
    inches = ax.figure.get_figheight() * ax.get_position().height
    lines = (len(stair) + 1.5) * LINE_POINTS / 72
    beyond = math.log10(first) - bottom if not above else top - math.log10(first)
    rest = top - bottom - beyond
    whole = max(top - bottom, rest / (1 - lines / inches))
    ax.set_ylim(*(10**v for v in ((bottom, bottom + whole) if above else (top - whole, top))))
    step = whole * LINE_POINTS / 72 / inches
    for number, (name, x, y) in enumerate(stair):
        end = first * 10 ** (side * step * (number + 1.2))
        ax.plot([x, x], [end, y], lw=0.6, color=style.INK, zorder=1)
        ax.annotate(name, (x, end), (-3 * side, 0), textcoords="offset points", size=8, va="center",
                    ha="right" if above else "left")  # fmt: skip
