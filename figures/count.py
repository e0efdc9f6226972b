"""Where 671 billion parameters are, which a token uses, what it costs and leaves in the cache.

Data    minids.count on presets and on V3's MHA, GQA and MQA twins. Typed in: the figures that were
        published (PUBLISHED, with their sources) and the ranges of sliders.
Seen in README.md, book/01_count.ipynb
"""

from collections.abc import Mapping
from dataclasses import asdict, fields

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from figures import style
from figures.treemap import cut
from minids.checks.config import CHOICES, MAY_BE_ZERO
from minids.config import Config, preset
from minids.count import MEASURED_TFLOPS, REPORTED_TOKENS, TRAINING_BYTES, Counts, count, short
from minids.learn.widget import Explorable, explore

ALT = (
    "Two bar charts of DeepSeek-V3. Left: routed experts hold 97 % of 671 billion parameters, of "
    "which a token uses 8 in 256. Right: bytes cached a token; latent attention needs 70 thousand, "
    "multi-head attention of the same shape 4 million."
)
GROUPS = {
    "routed experts": ("routed experts",),
    "attention": ("attention",),
    "shared experts": ("shared experts",),
    "dense FFN": ("dense FFN",),
    "embedding, head": ("embedding", "output head"),
    "gates, norms": ("gate matrices", "gate biases", "norms"),
}
PAPER = dict(fc="white", ec="none", alpha=0.75, boxstyle="round")  # below text on colours
HATCHES = ("", "/", "\\", "x", "-", "|")  # colours are not the only difference
# active parameters as published, in billions, and where
PUBLISHED = {
    "v3": {"37": "report, abstract", "36.7": "README_WEIGHTS", "36.6": "its copy on the hub"},
    "v2": {"21": "V2 report, 3.1.2"},
    "v2_lite": {"2.4": "V2 report, app. B"},
}  # fmt: skip
NAMES = {"v3": "DeepSeek-V3", "v2": "DeepSeek-V2", "v2_lite": "DeepSeek-V2-Lite"}
WIDE = 5  # inches; a phone shows 75 % of it, so that letters of 10 points stay readable
SIZER = (
    "Model sizer: number fields and sliders for every field of the config that decides a count. "
    "Two maps of rectangles show where the parameters are and which of them one token uses; below "
    "stand the exact counts, the cache, FLOPs, GPU-hours and money."
)


def grouped(counts: Counts, cfg: Config) -> dict[str, tuple[int, int]]:
    """Return, for each group of parts, how many parameters exist and how many a token uses."""
    used = counts.parts | {
        "routed experts": counts.parts["routed experts"]
        * cfg.n_activated_experts
        // cfg.n_routed_experts,
        "embedding": 0,  # a lookup
    }
    return {
        group: (sum(counts.parts[part] for part in parts), sum(used[part] for part in parts))
        for group, parts in GROUPS.items()
    }


def draw() -> Figure:
    """Draw parameters (all and used, logarithmic) beside the cache a token of four attentions."""
    cfg = preset("v3")
    with style.context():
        fig = Figure(figsize=(9, 3.4), layout="constrained")
        left, right = fig.subplots(1, 2, width_ratios=(3, 2))
        _draw_parameters(left, cfg)
        _draw_cache(right, cfg)
        for ax in (left, right):
            ax.grid(axis="y", visible=False)
            ax.set_axisbelow(True)
    return fig


def _draw_parameters(ax: Axes, cfg: Config) -> None:
    counts = count(cfg)
    groups = grouped(counts, cfg)
    rows = range(len(groups))
    everything, used = zip(*groups.values(), strict=True)
    ax.barh(rows, everything, color=style.COLOURS[0], alpha=0.35, label="stored")
    ax.barh(rows, used, height=0.4, color=style.COLOURS[0], label="used by one token")
    for row, (n, _) in zip(rows, groups.values(), strict=True):
        ax.annotate(short(n), (n, row), (3, 0), textcoords="offset points", va="center", size=8)
    ax.set_yticks(rows, list(groups))
    ax.invert_yaxis()
    ax.set(xscale="log", xlim=(5e7, 6e12), xlabel="parameters")
    ax.set_title(f"{short(counts.total)} stored, {short(counts.active['with head'])} used a token")
    ax.legend(loc="lower right", fontsize=8)


def _draw_cache(ax: Axes, cfg: Config) -> None:
    twins = {
        f"MHA, {cfg.n_heads} heads": preset("v3", attn="mha"),
        "GQA, 8 heads": preset("v3", attn="gqa", n_kv_heads=8),
        "MLA": cfg,
        "MQA, 1 head": preset("v3", attn="mqa"),
    }
    sizes = [count(twin).cache_bytes for twin in twins.values()]
    colours = [style.COLOURS[1 if twin is cfg else 0] for twin in twins.values()]
    ax.barh(range(len(twins)), sizes, color=colours)
    for row, size in enumerate(sizes):
        ax.annotate(
            f"{size:,}", (size, row), (3, 0), textcoords="offset points", va="center", size=8
        )
    ax.set_yticks(range(len(twins)), list(twins))
    ax.invert_yaxis()
    ax.set(xscale="log", xlim=(1e4, 1e8), xlabel="bytes cached a token, BF16")
    ax.set_title("what a token leaves behind")


def draw_treemap() -> Figure:
    """Draw V3's parameters as areas: all that are stored, and those that one token uses."""
    cfg = preset("v3")
    counts = count(cfg)
    groups = grouped(counts, cfg)
    active = counts.active["with head"]
    with style.context():
        fig = Figure(figsize=(WIDE, 5.6), layout="constrained")
        top, foot = fig.subplots(2, 1)
        stored = {name: everything for name, (everything, _) in groups.items()}
        _draw_map(top, stored, cfg.n_activated_experts / cfg.n_routed_experts)
        top.set_title(f"stored: {short(counts.total)}")
        _draw_map(foot, {name: used for name, (_, used) in groups.items()}, 1)
        larger = f"{counts.total / active:.0f} times enlarged"
        foot.set_title(f"one token uses: {short(active)}, {larger}")
        handles = [
            Rectangle((0, 0), 1, 1, fc=colour, ec=style.INK, hatch=hatch, label=name)
            for name, colour, hatch in zip(groups, style.COLOURS, HATCHES, strict=True)
        ]
        fig.legend(handles=handles, loc="outside lower center", ncols=2)
    return fig


def _draw_map(ax: Axes, values: Mapping[str, int], share: float) -> None:
    """Draw one treemap; `share` of the routed experts is drawn stronger, at their foot."""
    looks = dict(zip(values, zip(style.COLOURS, HATCHES, strict=True), strict=True))
    for box in cut(values, 0, 0, 2, 1):
        colour, hatch = looks[box.name]
        strong = box.height * (share if box.name == "routed experts" else 1)
        edge = dict(ec=style.INK, lw=0.6)
        ax.add_patch(Rectangle((box.x, box.y), box.width, box.height, fc=colour, alpha=0.3, **edge))
        ax.add_patch(
            Rectangle((box.x, box.y), box.width, strong, fc=colour, alpha=0.7, hatch=hatch, **edge)
        )
        if box.width > 0.35 and box.height > 0.2:
            text = f"{box.name}\n{short(values[box.name])}"
            text += f"\nused: {share:.1%}" if share < 1 else ""
            at = box.x + box.width / 2, box.y + box.height / 2
            ax.text(*at, text, ha="center", va="center", color="black", bbox=PAPER)
    ax.set(xlim=(0, 2), ylim=(0, 1))
    ax.axis("off")


def rounds_to(figure: str) -> tuple[float, float]:
    """Return the interval of numbers that a figure as published, such as "36.7", can stand for."""
    half = 0.5 * 10 ** -len(figure.partition(".")[2])
    return float(figure) - half, float(figure) + half


def draw_active() -> Figure:
    """Draw active parameters under three conventions beside what was published, by model."""
    with style.context():
        fig = Figure(figsize=(WIDE, 4), layout="constrained")
        axes = fig.subplots(3, 1, height_ratios=[len(row) + 1 for row in PUBLISHED.values()])
        for ax, (name, figures) in zip(axes, PUBLISHED.items(), strict=True):
            for row, figure in enumerate(figures):
                low, high = rounds_to(figure)
                ax.barh(row, high - low, left=low, height=0.5, color=style.COLOURS[5], alpha=0.5)
            counted = count(preset(name)).active.items()
            for (convention, n), colour, mark in zip(counted, style.COLOURS, "os^", strict=False):
                ax.axvline(n / 1e9, color=colour, lw=1)
                ax.plot(n / 1e9, -0.8, mark, clip_on=False, color=colour, label=convention)
            ax.set_yticks(range(len(figures)), [f"{n}: {text}" for n, text in figures.items()])
            ax.set(ylim=(-0.8, len(figures) - 0.3), title=NAMES[name])
            ax.margins(x=0.12)
            ax.locator_params(axis="x", nbins=5)
        axes[-1].set_xlabel("active parameters, billions")
        fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return fig


def draw_flops() -> Figure:
    """Draw what training on one token costs as its context grows: matrices, then attention."""
    powers = range(9, 18)
    lengths = [round(2 ** (step / 16)) for step in range(16 * 9, 16 * 17 + 1)]  # smooth curves
    with style.context():
        fig = Figure(figsize=(WIDE, 3.4), layout="constrained")
        ax = fig.subplots()
        costs = [count(preset("v3"), n).flops_training / 1e9 for n in lengths]
        matrices = 6 * count(preset("v3")).active["with head"] / 1e9
        ax.fill_between(lengths, matrices, color=style.COLOURS[0], alpha=0.4)
        ax.fill_between(lengths, matrices, costs, color=style.COLOURS[1], alpha=0.4)
        for x, y, text in ((2**10.2, 0.5, "matrices, 6ND"), (2**16.1, 1.5, "attention")):
            on = dict(ha="center", va="center", color="black", bbox=PAPER)
            ax.text(x, y * matrices, text, **on)
        for n in (4096, 32_768, 131_072):
            cost = count(preset("v3"), n).flops_training / 1e9
            text = f"{n // 1024}K: {cost:,.0f}, attention {1 - matrices / cost:.0%}"
            ax.plot(n, cost, "o", color=style.INK)
            side = "center" if n == 4096 else "right"
            ax.annotate(text, (n, cost), (-6, 8), textcoords="offset points", ha=side)
        ax.set_xscale("log", base=2)
        ax.set(xlabel="context, tokens (K: 1,024)", ylabel="GFLOP a token, training")
        ax.set(xlim=(2**9, 2**17), ylim=(0, 1400))
        ax.set_xticks([2**power for power in powers], [f"{2**power / 1024:g}K" for power in powers])
    return fig


def widget() -> Explorable:
    """Return the model sizer: figures/count.js over the presets and the rules of Config."""
    # what decides a count, or whether there is one to be had
    words, lengths = ("attn", "score_func"), ("original_seq_len", "max_seq_len")
    whole = [field.name for field in fields(Config) if field.type is int or field.name in words]
    deciding = [name for name in whole if name not in lengths]
    presets = {name: asdict(preset(name)) for name in ("v3", "v2", "v2_lite", "small", "nano")}
    data = {
        "config": [{"name": name, "least": 0 if name in MAY_BE_ZERO else 1} for name in deciding],
        "choices": {name: CHOICES[name] for name in words},
        "presets": {
            name: {field: cfg[field] for field in deciding} | {"seq_len": cfg["original_seq_len"]}
            for name, cfg in presets.items()
        },
        "parts": list(GROUPS.items()),
        "training": {"tokens": REPORTED_TOKENS / 1e12, "tflops": MEASURED_TFLOPS},
        "bytes_to_train": sum(TRAINING_BYTES["fp8"]),
    }
    return explore("count", data, alt=SIZER)


if __name__ == "__main__":
    style.save(draw(), "figures/count.svg")
