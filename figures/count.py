"""Where 671 billion parameters are, which a token uses, and what it leaves in the cache.

Data    minids.count on the preset `v3` and on its MHA, GQA and MQA twins; nothing is typed in.
Seen in README.md, book/01_count.ipynb
"""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures import style
from minids.config import Config, preset
from minids.count import Counts, count, short

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


if __name__ == "__main__":
    style.save(draw(), "figures/count.svg")
