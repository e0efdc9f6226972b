"""From 128 heads to 576 numbers: the two paths, how low the rank may be, and what training says.

Data    minids.config and minids.count; the log of minids.learn.experiments.mla.
Seen in book/04_mla.ipynb
"""

from collections.abc import Mapping
from math import gcd
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from figures import style
from minids.config import Config, preset
from minids.learn import explore, log
from minids.learn.experiments.mla import against_mla, candidates
from minids.learn.interval import interval
from minids.learn.widget import Explorable

ALT = (
    "Two diagrams of one layer of DeepSeek-V3, every width to scale. MHA makes queries, keys and "
    "values of 128 heads from a token's state and caches keys and values, 32,768 numbers. MLA "
    "first makes a latent of 512 and one rotary key of 64, caches these 576, and makes keys and "
    "values of 128 heads from them."
)
ALT_RANKS = (
    "Left: heat-maps of all heads' keys and values of 20 tokens, the same made from 8 numbers a "
    "token, and what is missing. Right: the share missed falls as more numbers are kept, fastest "
    "for a trained layer before rotation, slower after it, slowest for an untrained one."
)
ALT_RACE = (
    "Seven arms, five seeds each, with 95 % intervals. Left: held-out loss. Right: the difference "
    "to MLA, seed by seed, where an interval that crosses 0 is not told apart from it."
)
ALT_WIDGET = (
    "The dimension lab: sliders for heads and widths change what MLA, MHA, GQA and MQA cache and "
    "weigh and the two paths drawn to scale; a slider for the rank changes heat-maps of keys and "
    "values made from so few numbers."
)
LABELS = {"v3": "DeepSeek-V3", "v2": "DeepSeek-V2", "v2_lite": "V2-Lite", "small": "small",
          "nano": "nano", "toy": "toy"}  # fmt: skip
_FIELDS = ("dim", "n_layers", "n_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim",
           "qk_rope_head_dim", "v_head_dim")  # fmt: skip
_X = {"left": 0.0, "middle": 1.0, "right": 2.1}
_Y = {"q": 3.0, "k": 1.7, "r": 1.1, "v": 0.1}
_TALLEST = 0.62  # of a box, on the axes


def draw(cfg: Config | None = None) -> Figure:
    """Draw how MHA and MLA of one shape (`v3`) come from a token's state to q, k and v."""
    cfg = preset("v3") if cfg is None else cfg
    widest = max(cfg.dim, cfg.n_heads * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim),
                 cfg.n_heads * cfg.v_head_dim)  # fmt: skip
    with style.context():
        fig = Figure(figsize=(9, 3.6), layout="constrained")
        for ax, kind in zip(fig.subplots(1, 2), ("mha", "mla"), strict=True):
            _draw_path(ax, preset_as(cfg, kind), _TALLEST / widest)
    return fig


def preset_as(cfg: Config, attn: str) -> Config:
    """Return a config with another attention, all widths kept."""
    return Config(**{**vars(cfg), "attn": attn})


def _boxes(cfg: Config) -> list[tuple[str, str, int, str, bool]]:
    """List the boxes of a path: column, row, numbers, label, whether it is cached."""
    h, n, r, v = cfg.n_heads, cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
    mla, state = cfg.attn == "mla", ("left", "k", cfg.dim, f"h  {cfg.dim:,}", False)
    key = f"k  {h} × {n}" + (f" + {r}" if mla else "")  # the rotary key is one for all heads
    made = [
        ("right", "q", h * cfg.qk_head_dim, f"q  {h} × {cfg.qk_head_dim}", False),
        ("right", "k", h * n + mla * r, key, not mla),
        ("right", "v", h * v, f"v  {h} × {v}", not mla),
    ]
    if not mla:
        return [state, *made]
    latents = [
        ("middle", "k", cfg.kv_lora_rank, f"c$^{{KV}}$  {cfg.kv_lora_rank}", True),
        ("middle", "r", r, f"k$^R$  {r}", True),
    ]
    if cfg.q_lora_rank:
        latents.append(("middle", "q", cfg.q_lora_rank, f"c$^Q$  {cfg.q_lora_rank:,}", False))
    return [state, *latents, *made]


def _links(cfg: Config) -> list[tuple[tuple[str, str], tuple[str, str], str]]:
    """List the arrows of a path with the matrix on each."""
    state, q, k, v = ("left", "k"), ("right", "q"), ("right", "k"), ("right", "v")
    if cfg.attn != "mla":
        return [(state, q, "$W^Q$"), (state, k, "$W^K$"), (state, v, "$W^V$")]
    c, r, c_q = ("middle", "k"), ("middle", "r"), ("middle", "q")
    queries = [(state, c_q, "$W^{DQ}$"), (c_q, q, "$W^{UQ}, W^{QR}$")]
    return [
        *(queries if cfg.q_lora_rank else [(state, q, "$W^Q$")]),
        (state, c, "$W^{DKV}$"), (state, r, "$W^{KR}$"),
        (c, k, "$W^{UK}$"), (r, k, ""), (c, v, "$W^{UV}$"),
    ]  # fmt: skip


def _draw_path(ax: Axes, cfg: Config, scale: float) -> None:
    for (x, y), (to_x, to_y), name in _links(cfg):
        ends = (_X[x] + 0.08, _X[to_x] - 0.08), (_Y[y], _Y[to_y])
        ax.plot(*ends, color=style.INK, linewidth=0.8)
        middle, climb = (sum(ends[0]) / 2, sum(ends[1]) / 2), _Y[to_y] - _Y[y]
        side = "center" if not climb else "right"  # beside a slope, above a level line
        ax.annotate(name, middle, ha=side, va="top" if climb < 0 else "bottom", size=8)
    for x, y, numbers, label, cached in _boxes(cfg):
        tall = max(0.015, numbers * scale)  # never thinner than a line
        corner = (_X[x] - 0.045, _Y[y] - tall / 2)
        ax.add_patch(Rectangle(corner, 0.09, tall, color=style.COLOURS[1 if cached else 0]))
        if cached:
            frame = (corner[0] - 0.03, corner[1] - 0.06)
            ax.add_patch(Rectangle(frame, 0.15, tall + 0.12, fill=False, linestyle="--",
                                   edgecolor=style.COLOURS[1]))  # fmt: skip
        below = y == "r"  # the latent's own label is above
        at = _Y[y] + (-1 if below else 1) * (tall / 2 + 0.1)
        edge, side = (0.05, "right") if x == "left" else (-0.07, "left")
        vertical = "top" if below else "bottom"
        ax.annotate(label, (_X[x] + edge, at), size=9, ha=side, va=vertical)
    ax.set_title(f"{cfg.attn.upper()}: {cfg.cache_dim:,} numbers cached (framed)")
    ax.set(xlim=(-0.35, 2.75), ylim=(-0.5, 3.8))
    ax.axis("off")


def draw_ranks(low: Mapping[str, Any], rank: int = 8) -> Figure:
    """Draw keys and values of a trained MHA layer, made from `rank` numbers, and what is missed."""
    sample = torch.tensor(low["sample"], dtype=torch.float64)
    u, s, v = factors(low["sample"])
    close = u[:, :rank] * s[:rank] @ v[:rank]
    pictures = {"all heads' keys, then values": sample, f"made from {rank} numbers a token": close,
                "what is missing": sample - close}  # fmt: skip
    with style.context():
        fig = Figure(figsize=(9, 3.8), layout="constrained")
        left, right = fig.subfigures(1, 2, width_ratios=(1, 1.1))
        for ax, (title, matrix) in zip(left.subplots(3, 1), pictures.items(), strict=True):
            colours = _tinted(matrix, sample.abs().max()).numpy()
            ax.imshow(colours, aspect="auto", interpolation="none")
            ax.set(xticks=[], yticks=[], ylabel="tokens")
            ax.set_title(title, size=9)
            ax.grid(False)
        _draw_left_over(right.subplots(), low)
    return fig


def factors(sample: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the singular value decomposition u, s, v, the same four digits on every machine.

    Its signs are free, and libraries choose them differently: here each row of v begins above zero.
    """
    u, s, v = torch.linalg.svd(torch.tensor(sample, dtype=torch.float64), full_matrices=False)
    signs = v[:, 0].sign()
    return tuple(part.round(decimals=4) for part in (u * signs, s, signs[:, None] * v))


def _tinted(matrix: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Return colours: blue below zero, orange above, stronger for larger values; else clear."""
    below, above = (
        torch.tensor(to_rgb(colour), dtype=torch.float64) for colour in style.COLOURS[:2]
    )
    colours = torch.where(matrix[..., None] < 0, below, above)
    strength = (matrix.abs() / largest).clamp(max=1) ** 0.6  # small values show too
    return torch.cat([colours, strength[..., None]], dim=-1)


def _draw_left_over(ax: Axes, low: Mapping[str, Any]) -> None:
    lines = {"untrained": ("untrained", ":"), "turned": ("trained, keys rotated", "--"),
             "plain": ("trained, before rotation", "-")}  # fmt: skip
    for name, (label, dashes) in lines.items():
        shares = [max(share, 1e-5) for share in low[name]]
        ax.plot(range(1, len(shares) + 1), shares, dashes, label=label)
    ax.set(yscale="log", ylim=(1e-4, 1.2), xlim=(0, len(low["turned"])),
           xlabel="numbers kept a token (rank C)", ylabel="share of squares missed")  # fmt: skip
    ax.legend(fontsize=8)


def draw_race(results: Mapping[str, Any]) -> Figure:
    """Draw each arm's held-out loss, seed by seed, and its difference to MLA."""
    arms, differences = results["arms"], dict(against_mla(results["arms"]))
    names = list(candidates())  # JSON keeps no order
    with style.context():
        fig = Figure(figsize=(9, 3.4), layout="constrained")
        left, right = fig.subplots(1, 2, sharey=True)
        for row, name in enumerate(names):
            colour = style.COLOURS[1 if name == "MLA" else 0 if "same cache" in name else 2]
            nats = [run["nats"] for run in arms[name]["runs"]]
            mean, half = interval(nats)
            left.plot(nats, [row + 0.25] * len(nats), ".", color=colour, alpha=0.6)
            left.errorbar(mean, row, xerr=half, marker="o", color=colour, capsize=3)
            mean, half = differences.get(name, (0.0, 0.0))
            right.errorbar(mean, row, xerr=half, marker="o", color=colour, capsize=3)
        labels = [f"{name}: {arms[name]['cached']}" for name in names]
        left.set_yticks(range(len(names)), labels)
        left.invert_yaxis()
        right.axvline(0, color=style.INK, linewidth=0.8)
        left.set(xlabel="held-out nats a character (dots: seeds)")
        right.set(xlabel="the same minus MLA's (right of 0: MLA is better)")
    return fig


def lab_data() -> dict[str, Any]:
    """Return what the dimension lab starts from: presets, and a trained layer's keys and values."""
    presets: dict[str, dict[str, Any]] = {}
    for name, label in LABELS.items():
        cfg = preset(name)
        groups = gcd(cfg.n_heads, 8) if cfg.n_heads > 8 else max(1, cfg.n_heads // 2)
        presets[name] = {field: getattr(cfg, field) for field in _FIELDS}
        presets[name] |= {"label": label, "n_kv_heads": groups}
    results = log.read("mla")["results"]
    arm, sample = results["arms"]["MHA, same heads"], results["ranks"]["sample"]
    u, s, v = (part.tolist() for part in factors(sample))
    rank = dict(u=u, s=s, v=v, heads=arm["n_heads"], width=arm["width"])
    return dict(presets=presets, order=list(LABELS), rank=rank)


def widget() -> Explorable:
    """Return the dimension lab."""
    return explore("mla", lab_data(), alt=ALT_WIDGET)
