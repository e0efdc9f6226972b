"""One look for every figure: colours that all eyes tell apart, on paper white and on night black.

Data    none.
Seen in every figure of the repository
"""

import base64
import html
import io
from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

# Okabe and Ito's colours, chosen for colour-blind eyes, darker where needed: each has a contrast of
# 3 or more to white and to the book's dark page (tests/test_style.py)
COLOURS = ["#0077bb", "#d55e00", "#00966d", "#c06a99", "#a87400", "#7a7a7a"]
INK = "#7a7a7a"  # of text and axes: readable on both, like the colours

_RC = {
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.prop_cycle": mpl.cycler(color=COLOURS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": "medium",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters everywhere
    "font.size": 10,
    "grid.alpha": 0.3,
    "grid.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.fonttype": "path",
    "svg.hashsalt": "minids",  # else ids in the file are drawn anew each time
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


class Picture:
    """A figure in a notebook: an SVG image with a text for those who do not see it."""

    def __init__(self, svg: bytes, alt: str):
        self.svg, self.alt = svg, alt

    def _repr_html_(self) -> str:
        data = base64.b64encode(self.svg).decode()
        return f'<img alt="{html.escape(self.alt)}" src="data:image/svg+xml;base64,{data}">'

    def __repr__(self) -> str:
        return f"Picture({self.alt!r})"


def context() -> AbstractContextManager[None]:
    """Return a context in which figures are made in this style; nothing changes outside of it."""
    return mpl.rc_context(_RC)


def render(fig: Figure) -> bytes:
    """Return a figure as SVG, the same bytes each time."""
    file = io.BytesIO()
    with context():
        fig.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def save(fig: Figure, path: str | Path) -> None:
    """Write a figure as an SVG file; ValueError for another suffix."""
    if Path(path).suffix != ".svg":
        raise ValueError(f"figures are saved as .svg, got {path}")
    Path(path).write_bytes(render(fig))


def show(fig: Figure, alt: str) -> Picture:
    """Return a figure for a notebook; `alt` says in a sentence what is to be seen."""
    if not alt.strip():
        raise ValueError("alt must say what the figure shows, got nothing")
    return Picture(render(fig), alt)
