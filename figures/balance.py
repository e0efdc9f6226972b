"""Balance against loss, who reads what, and a router to steer: the pictures of chapter 08.

Data    minids/learn/experiments/balance.json, a log; tokens for the router to steer are drawn here.
Seen in book/08_balance.ipynb
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures import style
from minids.balance import max_vio
from minids.learn import log
from minids.learn.experiments.balance import SmallMoE, by_arm
from minids.learn.interval import interval
from minids.learn.widget import Explorable, Live, explore, live

LABELS = {
    "none": "nothing",
    "auxiliary 0.001": "auxiliary, α = 0.001",
    "auxiliary 0.01": "auxiliary, α = 0.01",
    "auxiliary 0.1": "auxiliary, α = 0.1",
    "sequence 0.01": "sequence, α = 0.01",
    "bias 0.001": "bias, γ = 0.001",
    "bias 0.01": "bias, γ = 0.01",
}
ALT = (
    "MaxVio on held-out text across, held-out loss minus that of no balancing upwards: one point "
    "with 95 % intervals for each of seven ways to balance a small model."
)
ALT_DOMAINS = (
    "Share of prose and of code that each expert of the last layer receives, without balancing, "
    "with an auxiliary loss and with the bias; bars of the two domains stand side by side."
)
ALT_WIDGET = (
    "Balance cockpit: steer a router's bias speed, skew and batches, and step through recorded "
    "training runs; bars show each expert's load and bias, a curve MaxVio over the steps."
)
SPEEDS = [0, 0.0001, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3]  # gamma, to choose from
STEPS, TOP_K = 400, 2
FAVOUR = [0.4, -0.7, 1.0, -0.3, 0.7, -1.0, 0.1, -0.2]  # the taste that all tokens share
MARKERS = "osD^v*P"
FAMILY = {"none": 5, "auxiliary": 1, "sequence": 3, "bias": 0}  # arms of one kind share a colour


def frontier(results: Mapping[str, Any]) -> dict[str, tuple[tuple[float, float], ...]]:
    """Return, for each arm, MaxVio and loss minus the loss without balancing: mean, half width.

    Both on held-out text; MaxVio is the mean over layers, losses are paired by seed.
    """
    runs = by_arm(dict(results))
    points = {}
    for arm, these in runs.items():
        vio = [sum(run["heldout_max_vio"]) / len(run["heldout_max_vio"]) for run in these]
        loss = [
            run["heldout_loss"]["all"] - none["heldout_loss"]["all"]
            for run, none in zip(these, runs["none"], strict=True)
        ]
        points[arm] = interval(vio), interval(loss)
    return points


def distance(domain_load: Mapping[str, Sequence[Sequence[int]]], layer: int = -1) -> float:
    """Return how differently prose and code use a layer's experts: 0 the same, 1 disjoint."""
    share = [
        torch.tensor(domain_load[domain][layer]).double() / sum(domain_load[domain][layer])
        for domain in ("prose", "code")
    ]
    return (share[0] - share[1]).abs().sum().item() / 2  # total variation


def draw() -> Figure:
    """Draw MaxVio against loss, a point with its 95 % intervals an arm."""
    with style.context():
        fig = Figure(figsize=(8, 3.8), layout="constrained")
        ax = fig.subplots()
        points = frontier(log.read("balance")["results"])
        for number, (arm, (vio, loss)) in enumerate(points.items()):
            colour = style.COLOURS[FAMILY[arm.split()[0]]]
            ax.errorbar(vio[0], loss[0], xerr=vio[1], yerr=loss[1], marker=MARKERS[number], ms=7,
                        color=colour, capsize=3, label=LABELS[arm])  # fmt: skip
        ax.axhline(0, color=style.INK, lw=1, ls="--")
        ax.set(xlabel="MaxVio on held-out text, mean of layers (0 is balance)", xlim=(0, None))
        ax.set_ylabel("held-out loss minus that of nothing,\nnats a token (below 0 is better)")
        ax.set_title("balance against loss: mean of seeds, 95 % intervals")
        fig.legend(*ax.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return fig


def draw_domains(arms: Sequence[str] = ("none", "auxiliary 0.1", "bias 0.01")) -> Figure:
    """Draw, for the first seed, the last layer's visits by domain; the distance is of all seeds."""
    runs = by_arm(log.read("balance")["results"])
    with style.context():
        fig = Figure(figsize=(10, 3.2), layout="constrained")
        axes = fig.subplots(1, len(arms), sharey=True)
        for ax, arm in zip(axes, arms, strict=True):
            middle, half = interval([distance(run["domain_load"]) for run in runs[arm]])
            _draw_shares(ax, runs[arm][0]["domain_load"])
            ax.set_title(f"{LABELS[arm]}\ndistance {middle:.2f} ± {half:.2f}")
        axes[0].set_ylabel("% of its domain's visits")
        axes[0].legend(fontsize=8)
    return fig


def _draw_shares(ax: Axes, domain_load: Mapping[str, Sequence[Sequence[int]]]) -> None:
    for number, domain in enumerate(("prose", "code")):
        visits = domain_load[domain][-1]
        at = [expert + 0.4 * number - 0.2 for expert in range(len(visits))]
        share = [100 * n / sum(visits) for n in visits]
        ax.bar(at, share, 0.4, label=domain, hatch=("", "///")[number], edgecolor=style.INK, lw=0.3)
    ax.axhline(100 / len(domain_load["prose"][-1]), color=style.INK, ls="--", lw=1)
    ax.set(xlabel="expert of the last layer", xticks=range(len(domain_load["prose"][-1])))
    ax.grid(axis="x", visible=False)


def draw_curves(curves: Mapping[str, Sequence[float]], ylabel: str = "MaxVio") -> Figure:
    """Draw values over steps, a line a name; long curves by about a hundred of their points."""
    with style.context():
        fig = Figure(figsize=(7.5, 3), layout="constrained")
        ax = fig.subplots()
        for number, (name, values) in enumerate(curves.items()):
            every = len(values) // 125 | 1  # odd: a curve that swings each step still swings
            ax.plot(range(1, 1 + len(values), every), values[::every], label=name, ms=4, lw=1.2,
                    marker=MARKERS[number % 7], markevery=0.12)  # fmt: skip
        ax.set(xlabel="step", ylabel=ylabel, ylim=(0, None))
        fig.legend(*ax.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return fig


def router_data() -> dict[str, Any]:
    """Return 128 tokens of prose, 128 of code: how much each likes each of eight experts."""
    random = torch.Generator().manual_seed(20)
    taste = torch.randn(256, 8, generator=random, dtype=torch.float64)
    taste[:128, :4] += 0.8  # prose leans to experts 0-3, code to 4-7
    taste[128:, 4:] += 0.8
    # four digits and this seed: experts that tie are told apart differently in page and Python
    rounded = [[round(z, 4) for z in row] for row in taste.tolist()]
    return dict(prose=rounded[:128], code=rounded[128:], favour=FAVOUR, top_k=TOP_K, steps=STEPS,
                speeds=SPEEDS, start=dict(speed=2, skew=1.0))  # fmt: skip


def run_data() -> list[dict[str, Any]]:
    """Return the first seed's frames and losses of each arm; a bias of zeros is left out."""
    kept = []
    for arm, runs in by_arm(log.read("balance")["results"]).items():
        first = runs[0]
        frames = [f if any(map(any, f["bias"])) else f | {"bias": None} for f in first["frames"]]
        kept.append(dict(arm=arm, label=LABELS[arm], frames=frames, loss=first["loss"],
                         heldout=first["heldout_loss"]["all"]))  # fmt: skip
    return kept


def widget(parts: Sequence[str] = ("router", "runs")) -> Explorable:
    """Return the cockpit: the router to steer, the recorded runs, or both."""
    make = {"router": router_data, "runs": run_data}
    return explore("balance", {part: make[part]() for part in parts}, ALT_WIDGET)


def cockpit() -> Live:
    """Return a router that learns while you steer it; it needs a running notebook."""
    import ipywidgets as widgets

    speed = widgets.SelectionSlider(options=SPEEDS, value=0, description="γ, bias")
    alphas = [0, 0.001, 0.01, 0.1, 1.0]
    alpha = widgets.SelectionSlider(options=alphas, value=0, description="α, loss")
    skew = widgets.FloatSlider(value=1.0, min=0, max=2, step=0.1, description="skew")
    play = widgets.Play(max=10_000, interval=150, show_repeat=False)
    once, again = widgets.Button(description="one step"), widgets.Button(description="start again")
    screen, state = widgets.HTML(), {"moe": SmallMoE(), "steps": 0}

    def step(_change: Any = None) -> None:
        seen = state["moe"].step(skew=skew.value, speed=speed.value, alpha=alpha.value)
        state["steps"] += 1
        screen.value = bars(seen.load, state["steps"], seen.error)

    def restart(_button: Any) -> None:
        state.update(moe=SmallMoE(), steps=0)
        step()

    once.on_click(step)
    again.on_click(restart)
    play.observe(lambda change: change.new and step(), "value")  # 0: the stop button
    step()
    rows = [speed, alpha, skew], [widgets.Label("learn"), play, once, again]
    wrap = {"flex_flow": "row wrap"}  # on a phone
    box = widgets.VBox([*(widgets.HBox(row, layout=wrap) for row in rows), screen])
    return live(box, alt="Live router: it learns while you move γ, α and skew; bars show loads.")


def bars(load: Sequence[int], step: int, error: float) -> str:
    """Return loads as bars of HTML, ▲ above the fair share, and a line of numbers."""
    fair, vio = sum(load) / len(load), max_vio(torch.tensor(load)).item()
    rows = "".join(
        f"<div style='white-space:nowrap'>expert {e} "
        f"<span style='display:inline-block;height:.8em;width:{4 * n / fair:.2f}em;"
        f"background:{style.COLOURS[int(n > fair)]}'></span> {n}{' ▲' if n > fair else ''}</div>"
        for e, n in enumerate(load)
    )
    return f"{rows}<b>step {step}, MaxVio {vio:.2f}, error {error:.3f}</b>, fair share {fair:.0f}"
