"""Eight bits: which numbers there are, what a shared scale costs, what sums and training lose.

Data    minids.formats; the log minids/learn/experiments/fp8.json; errors of sums and a checkpoint's
        scales are handed in.
Seen in book/11_fp8.ipynb
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from figures import style
from figures.microscope import (
    FLOATS,
    INT8,
    LARGEST,
    SIZES,
    START,
    error_of_others,
    number_data,
    numbers,
    tile_data,
    worst,
)
from minids.formats.bits import E4M3, Format
from minids.formats.groups import TILE
from minids.learn.experiments.fp8 import ARMS, EVERY, gap
from minids.learn.widget import Explorable, explore

REPORTED_GAP = 0.25  # % of the loss: DeepSeek-V3 report, section 3.3 and Figure 10
MARKERS, DASHES = "osD^v*P", ("-", "--", "-.", ":")
WIDE = 6  # inches, at most: letters of 9 points stay readable on a phone
ALT = (
    "The worst relative error of a value over its size, where 1 is the largest of its group. E4M3 "
    "stays between 3 and 6 % down to 2 to the -15 and then climbs to 100 %, E5M2 is twice as "
    "coarse and reaches further down, INT8 is the best near 1 and climbs from there."
)
ALT_BITS = (
    "A row of boxes a format, one a bit: INT8, E4M3, E5M2, E5M6, BF16 and UE8M0 split into sign, "
    "exponent and mantissa, with the smallest and largest number of each."
)
ALT_OUTLIER = (
    "RMS error of 127 normal values that share a tile with an outlier, over its size. INT8 begins "
    "with the smallest error and passes 10 % from an outlier of 50 on, E4M3 begins at 2 to 3 % and "
    "passes 10 % from 100,000 on, E5M2 stays near 5 %."
)
ALT_ACCUMULATION = (
    "Relative error of a sum of K products over K, both logarithmic: it grows with K where all of "
    "them are added with few bits, and stays level where partial sums are promoted to FP32."
)
ALT_TRAINING = (
    "Training loss over the steps, mean of seeds, in FP32, FP8 and FP8 with gradients in blocks, a "
    "column a model; below, the difference to FP32 in percent beside a band of 0.25 %."
)
ALT_GAP = (
    "Loss of FP8 and of FP8 with gradients in blocks, relative to FP32, a panel a model: mean over "
    "seeds with 95 % intervals, beside a band of 0.25 %, the report's bound."
)
ALT_SCALES = "Scales of a checkpoint's 128 x 128 blocks, a panel a matrix, a square a block."
ALT_WIDGET = (
    "FP8 microscope: type a number, drag it or turn its bits and see what E4M3, E5M2, E5M6, BF16 "
    "and INT8 keep of it; then give a few tokens an outlier and see, for each way to share a "
    "scale, which values are flushed to zero."
)


def draw() -> Figure:
    """Draw the worst relative error of a value over its size relative to its group's largest."""
    lines = {
        name: [v / LARGEST[name] for v in _above_zero(name)] for name in ("E4M3", "E5M2", INT8)
    }
    with style.context():
        fig = Figure(figsize=(WIDE, 3.2), layout="constrained")
        ax = fig.subplots()
        for number, (name, values) in enumerate(lines.items()):
            ends, errors = worst(values)
            ax.step(ends, [100 * e for e in errors], where="post", lw=1.2)
            ax.annotate(name, (ends[1], 60), (3, 0), textcoords="offset points",
                        color=style.COLOURS[number])  # fmt: skip
        ax.set_xscale("log", base=2)
        ax.set(yscale="log", xlim=(2.0**-33, 1.5), ylim=(0.3, 130))
        ax.set(xlabel="size of a value; 1 is its group's largest", ylabel="worst relative error, %")
        ax.set_xticks([2.0**-e for e in (32, 24, 16, 8, 0)])
        ax.set_yticks([1, 10, 100], ["1", "10", "100"])
        ax.minorticks_off()
        normal = E4M3.min_normal / E4M3.max
        ax.axvline(normal, color=style.INK, lw=0.8, ls=":")
        ax.annotate("E4M3: subnormal", (normal, 0.4), (-4, 0), ha="right",
                    textcoords="offset points", size=8)  # fmt: skip
    return fig


def _above_zero(name: str) -> list[float]:
    if name == INT8:
        return [float(q) for q in range(1, 128)]
    return numbers({fmt.name: fmt for fmt in FLOATS}[name])


def draw_bits() -> Figure:
    """Draw the bits of each format, and its smallest and largest number."""
    rows = [(INT8, (1, 0, 7), "−127 … 127, equal steps: M are digits")]
    rows += [(fmt.name, (1, fmt.exponent_bits, fmt.mantissa_bits), _range(fmt)) for fmt in FLOATS]
    rows.append(("UE8M0", (0, 8, 0), "2$^{-127}$ … 2$^{127}$, powers of two"))
    with style.context():
        fig = Figure(figsize=(WIDE, 2.4), layout="constrained")
        ax = fig.subplots()
        for row, (name, widths, span) in enumerate(rows):
            ax.annotate(name, (-0.4, row), ha="right", va="center")
            at = 0
            for letter, colour, width in zip("SEM", (1, 0, 2), widths, strict=True):
                look = dict(ec=style.COLOURS[colour], fc=(style.COLOURS[colour], 0.2))
                if width:
                    ax.add_patch(Rectangle((at + 0.08, row - 0.38), width - 0.16, 0.76, **look))
                    label = letter if letter == "S" else f"{letter}{width}"
                    ax.annotate(label, (at + width / 2, row), ha="center", va="center", size=9)
                    bits = list(range(at + 1, at + width))  # a notch between one bit and the next
                    ax.vlines(bits, row + 0.18, row + 0.38, color=style.COLOURS[colour], lw=1)
                at += width
            ax.annotate(span, (at + 0.5, row), va="center", size=8)
        ax.set(xlim=(-3, 25), ylim=(len(rows) - 0.4, -0.6))
        ax.axis("off")
    return fig


def _range(fmt: Format) -> str:
    largest = f"{fmt.max:,.0f}" if fmt.max < 1e6 else f"{fmt.max:.3g}"
    return f"{fmt.min_subnormal:.3g} … {largest}"


def draw_outlier() -> Figure:
    """Draw what an outlier does to the error of all that share its tile."""
    tile = torch.tensor(tile_data()["data"][0]["values"][START["token"]])[: TILE[1]]
    others = torch.arange(TILE[1]) != START["channel"]
    with style.context():
        fig = Figure(figsize=(WIDE, 3), layout="constrained")
        ax = fig.subplots()
        for number, name in enumerate(("E4M3", "E5M2", INT8)):
            errors = [100 * error_of_others(tile, others, name, size) for size in SIZES]
            ax.plot(SIZES, errors, MARKERS[number] + "-", ms=4, markevery=2, label=name)
        ax.set(xscale="log", yscale="log", xlabel="size of the outlier", ylim=(0.4, 130))
        ax.set_ylabel("RMS error of the others, %")
        ax.set_yticks([1, 10, 100], ["1", "10", "100"])
        ax.minorticks_off()
        ax.legend(fontsize=8)
    return fig


def draw_accumulation(lengths: Sequence[int], errors: Mapping[str, Sequence[float]]) -> Figure:
    """Draw relative errors of sums over their lengths K, a line a way to add."""
    with style.context():
        fig = Figure(figsize=(WIDE, 3.2), layout="constrained")
        ax = fig.subplots()
        for number, (name, values) in enumerate(errors.items()):
            ax.plot(lengths, [100 * e for e in values], MARKERS[number % 7] + "-", ms=5, label=name)
        ax.set_xscale("log", base=2)
        ax.set(yscale="log", xlabel="products in the sum, K", ylabel="relative error, %")
        ax.set_xticks(lengths, [f"{k:,}" for k in lengths], rotation=45, size=8)
        ax.minorticks_off()
        ax.legend(fontsize=8)
    return fig


def draw_training(results: Mapping[str, Any]) -> Figure:
    """Draw the loss over the steps, mean of seeds, and its gap to FP32; a column a model."""
    models = sorted({run["model"] for run in results["runs"]}, reverse=True)
    with style.context():
        fig = Figure(figsize=(WIDE, 4.4), layout="constrained")
        axes = fig.subplots(2, len(models), squeeze=False, sharex="col", sharey="row")
        for (upper, lower), model in zip(axes.T, models, strict=True):
            curves = mean_curves(results, model)
            for arm, mean in curves.items():
                steps = [EVERY * (point + 1) for point in range(len(mean))]
                number = ARMS.index(arm)
                look = dict(color=style.COLOURS[number], ls=DASHES[number], lw=1.3)
                upper.plot(steps, mean.tolist(), label=_label(arm), **look)
                lower.plot(steps, (100 * (mean / curves["fp32"] - 1)).tolist(), **look)
            lower.axhspan(-REPORTED_GAP, REPORTED_GAP, color=style.INK, alpha=0.2, lw=0)
            upper.set_title(model)
            lower.set_xlabel("step")
        axes[0, 0].set_ylabel("loss, nats a token")
        axes[1, 0].set_ylabel("minus FP32's, %\n(grey: ± 0.25)")
        axes[0, 0].legend(fontsize=8)
    return fig


def mean_curves(results: Mapping[str, Any], model: str) -> dict[str, Tensor]:
    """Return each arm's training loss, a point every few steps, mean of seeds."""
    curves = {
        arm: [run["curve"] for run in results["runs"] if (run["model"], run["arm"]) == (model, arm)]
        for arm in ARMS
    }
    return {arm: torch.tensor(these, dtype=torch.float64).mean(0) for arm, these in curves.items()}


def _label(arm: str) -> str:
    return arm.replace("fp", "FP")


def draw_gap(results: Mapping[str, Any], what: str = "heldout") -> Figure:
    """Draw how far FP8's losses are from FP32's, with 95 % intervals, beside the report's bound.

    `what` is "heldout", the loss on held-out rows, or "last", that of the last steps of training.
    """
    models = sorted({run["model"] for run in results["runs"]}, reverse=True)
    with style.context():
        fig = Figure(figsize=(WIDE, 1.8), layout="constrained")
        axes = fig.subplots(1, len(models), squeeze=False, sharey=True)[0]
        for ax, model in zip(axes, models, strict=True):
            for number, arm in enumerate(ARMS[1:], start=1):
                mean, half = gap(dict(results), model, arm, what)
                ax.errorbar(100 * mean, number, xerr=100 * half, marker=MARKERS[number], capsize=3,
                            color=style.COLOURS[number])  # fmt: skip
            ax.axvspan(-REPORTED_GAP, REPORTED_GAP, color=style.INK, alpha=0.2, lw=0)
            ax.axvline(0, color=style.INK, lw=0.8)
            ax.set(title=model, yticks=range(1, len(ARMS)), ylim=(len(ARMS) - 0.5, 0.5))
            ax.set_yticklabels([_label(arm) for arm in ARMS[1:]], size=8)
        fig.supxlabel("loss minus FP32's, % of it (95 % intervals; grey: ± 0.25)", size=9)
    return fig


def draw_scales(scales: Mapping[str, Tensor]) -> Figure:
    """Draw the scales of each matrix's blocks, all on one logarithmic ladder of colours."""
    logs = {name: scale.double().log2() for name, scale in scales.items()}
    low = min(log.min().item() for log in logs.values())
    high = max(log.max().item() for log in logs.values())
    with style.context():
        fig = Figure(figsize=(WIDE, 0.8 + 1.5 * len(logs)), layout="constrained")
        axes = fig.subplots(len(logs), 1, squeeze=False)[:, 0]
        for ax, (name, log) in zip(axes, logs.items(), strict=True):
            image = ax.imshow(log.numpy(), cmap="cividis", vmin=low, vmax=high, aspect="auto",
                              interpolation="none")  # fmt: skip
            ax.set_title(f"{name}: {log.shape[0]} × {log.shape[1]} scales", size=9)
            ax.set(ylabel="block row")
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.yaxis.get_major_locator().set_params(integer=True)
            ax.grid(False)
        axes[-1].set(xlabel="block column")
        fig.colorbar(image, ax=list(axes), label="log$_2$ of the scale", shrink=0.9)
    return fig


def widget(parts: Sequence[str] = ("number", "tile")) -> Explorable:
    """Return the microscope: a number in five formats, values that share scales, or both."""
    make = {"number": number_data, "tile": tile_data}
    return explore("fp8", {part: make[part]() for part in parts}, ALT_WIDGET)
