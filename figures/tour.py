"""A training run seen from above: the loss, how evenly experts are used, and who uses which.

Data    the log of minids.train and the expert loads of minids.evaluate; nothing is typed in.
Seen in README.md, book/00_start.ipynb, and wherever `minids tour` and `minids train` write
"""

import json
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures import style

ALT = (
    "Up to three charts of one training run, over the tokens read: the loss of the main model and "
    "of its MTP module; MaxVio, the overload of the busiest expert, in each layer; and, as bars, "
    "the share of prose and of code that each expert of the last layer receives."
)
BLOCKS = 100  # points of a curve: each is the mean of its share of the steps
TOKENS = "tokens read"
MARKERS = "osD^"  # colours are not the only difference


def draw(
    log: Sequence[Mapping[str, Any]], usage: Mapping[str, Sequence[Sequence[int]]] | None = None
) -> Figure:
    """Draw a log; with `usage` (domain -> layer -> visits of each expert) expert use beside it.

    Raises ValueError for an empty log.
    """
    if not log:
        raise ValueError("a log must have at least one step, got none")
    with style.context():
        fig = Figure(figsize=(11 if usage else 7.5, 3.2), layout="constrained")
        axes = fig.subplots(1, 3 if usage else 2)
        _draw_loss(axes[0], log)
        _draw_max_vio(axes[1], log)
        if usage:
            _draw_usage(axes[2], usage)
    return fig


def means(values: Sequence[float]) -> list[float]:
    """Return the means of BLOCKS blocks of nearly equal length; fewer values stay as they are."""
    cuts = [len(values) * i // BLOCKS for i in range(BLOCKS + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts) if b > a]


def _draw_loss(ax: Axes, log: Sequence[Mapping[str, Any]]) -> None:
    tokens = means([line["tokens"] for line in log])
    curves = {"next token": [line["loss"] for line in log]}
    for depth in range(len(log[0]["mtp"])):
        curves[f"{depth + 2} tokens ahead (MTP)"] = [line["mtp"][depth] for line in log]
    for number, (name, values) in enumerate(curves.items()):
        ax.plot(tokens, means(values), label=name, ls=("-", "--", ":")[number % 3])
    ax.set(xlabel=TOKENS, ylabel="nats a token", ylim=(0, None))
    ax.xaxis.set_major_formatter(_short)
    ax.set_title("loss")
    _name(ax)


def _draw_max_vio(ax: Axes, log: Sequence[Mapping[str, Any]]) -> None:
    tokens, layers = means([line["tokens"] for line in log]), len(log[0]["max_vio"])
    for layer in range(layers):
        of_mtp = layer >= layers - len(log[0]["mtp"])
        name = "MTP module" if of_mtp else f"MoE layer {layer + 1}"
        values = means([line["max_vio"][layer] for line in log])
        ax.plot(tokens, values, label=name, marker=MARKERS[layer % 4], markevery=0.15, ms=4)
    ax.set(xlabel=TOKENS, ylabel="busiest expert's overload", ylim=(0, None))
    ax.xaxis.set_major_formatter(_short)
    ax.set_title("MaxVio: 0 is perfect balance")
    _name(ax)


def _draw_usage(ax: Axes, usage: Mapping[str, Sequence[Sequence[int]]]) -> None:
    """Draw the last layer's shares: deeper layers specialise more."""
    width = 0.8 / len(usage)
    experts = range(len(next(iter(usage.values()))[-1]))
    for number, (domain, layers) in enumerate(usage.items()):
        share = [100 * visits / sum(layers[-1]) for visits in layers[-1]]
        at = [expert + (number - (len(usage) - 1) / 2) * width for expert in experts]
        ax.bar(at, share, width, label=domain, hatch=("", "///", "..")[number % 3],
               edgecolor=style.INK, linewidth=0.3)  # fmt: skip
    ax.set_ylim(0, 1.25 * ax.get_ylim()[1])  # room for the legend
    ax.axhline(100 / len(experts), color=style.INK, ls="--", lw=1)
    ax.set(xlabel="expert of the last MoE layer", ylabel="% of its domain's visits")
    ax.set_xticks(experts)
    ax.grid(axis="x", visible=False)
    ax.set_title("who uses which expert (held-out text)")
    _name(ax)


def _name(ax: Axes) -> None:
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=8)


def _short(value: float, _position: int) -> str:
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k"


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/tour")
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    style.save(draw([json.loads(line) for line in lines]), folder / "loss.svg")
