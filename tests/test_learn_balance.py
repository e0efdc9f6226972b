"""Chapter 08's experiment, its log and its pictures: numbers that a reader is shown."""

import json

import pytest
import torch

from figures import balance as figures
from figures import style
from minids import preset
from minids.balance import max_vio
from minids.learn import log
from minids.learn.experiments import balance as experiment
from minids.learn.interval import interval

RUNS = {
    "none": [(2.0, 3.0), (2.2, 1.0)],
    "bias 0.01": [(1.9, 0.2), (2.0, 0.4)],
}  # held-out loss and MaxVio of two seeds


def results() -> dict:
    runs = [
        dict(arm=arm, seed=seed, heldout_loss={"all": loss}, heldout_max_vio=[vio, vio + 1])
        for arm in experiment.ARMS
        for seed, (loss, vio) in enumerate(RUNS.get(arm, RUNS["none"]))
    ]
    return {"runs": runs}


def test_losses_are_compared_in_pairs():
    points = figures.frontier(results())
    vio, loss = points["bias 0.01"]
    assert vio[0] == pytest.approx((0.7 + 0.9) / 2)  # means of two layers
    assert loss == pytest.approx(interval([-0.1, -0.2]))
    assert points["none"][1] == (0.0, 0.0)


@pytest.mark.parametrize(
    ("prose", "code", "want"),
    [([5, 5, 0, 0], [0, 0, 1, 1], 1.0), ([2, 2, 4], [1, 1, 2], 0.0), ([3, 1], [1, 3], 0.5)],
)
def test_distance_by_hand(prose, code, want):
    loads = {"prose": [[9], prose], "code": [[9], code]}
    assert figures.distance(loads) == pytest.approx(want)


def test_arms_differ_in_their_balance_alone():
    none = experiment.config("none")
    assert (none.bias_speed, none.seq_loss_alpha, none.aux_loss_alpha) == (0, 0, 0)
    for arm, changes in experiment.ARMS.items():
        assert experiment.config(arm) == preset("nano", **(_fields(none) | changes))
        assert len(changes) == (arm != "none")


def _fields(cfg) -> dict:
    return {name: getattr(cfg, name) for name in cfg.__dataclass_fields__}


def test_a_short_run_is_the_start_of_a_long_one():
    cfg, step = experiment.config("none"), experiment.BATCH * experiment.SEQ_LEN
    short, long = experiment.schedule(40), experiment.schedule(experiment.STEPS)
    assert short.tokens == 40 * step
    assert long.tokens == experiment.STEPS * step
    for at in (0, 7, 39):
        assert short.rates(cfg, at, at * step) == long.rates(cfg, at, at * step)
    last = experiment.STEPS - 1
    assert long.rates(cfg, last, last * step).lr < 0.5 * long.peak_lr


@pytest.mark.slow
def test_a_run_says_what_happened():
    text = experiment.read_text()
    run = experiment.run("bias 0.01", 0, text, steps=12)
    assert [frame["step"] for frame in run["frames"]] == [1, 10]
    first, second = run["frames"]
    visits = experiment.BATCH * experiment.SEQ_LEN * 2
    assert [sum(load) for load in first["load"] + second["load"]] == [visits] * 4
    assert not any(map(any, first["bias"]))  # the bias before the first step
    moved = [abs(b) for layer in second["bias"] for b in layer]
    assert 0.01 <= max(moved) <= 0.09 + 1e-6  # nine moves of 0.01
    assert len(run["loss"]) == len(run["max_vio"]) == 2
    assert json.loads(json.dumps(run)) == run
    assert experiment.run("bias 0.01", 0, text, steps=12) == run
    none = experiment.run("none", 0, text, steps=12)
    assert none["frames"][0] == first
    assert not any(map(any, none["frames"][1]["bias"]))


def test_the_log_holds_every_arm_and_seed():
    stored = log.read("balance")
    runs = stored["results"]["runs"]
    wanted = [(arm, seed) for arm in experiment.ARMS for seed in experiment.SEEDS]
    assert [(run["arm"], run["seed"]) for run in runs] == wanted
    assert stored["command"] == "python -m minids.learn.experiments.balance"
    visits = experiment.BATCH * experiment.SEQ_LEN * 2
    for run in runs:
        assert run["steps"] == experiment.STEPS
        loads = torch.tensor([run["domain_load"]["prose"], run["domain_load"]["code"]]).sum(0)
        assert run["heldout_max_vio"] == pytest.approx(max_vio(loads).tolist(), abs=1e-4)
        assert ("frames" in run) == (run["seed"] == experiment.SEEDS[0])
        for frame in run.get("frames", []):
            assert [sum(load) for load in frame["load"]] == [visits, visits]


def test_who_is_not_visited_learns_nothing():
    small = experiment.SmallMoE(seed=0)
    before = small.moe.experts.w_down.detach().clone()
    seen = small.step()
    moved = (small.moe.experts.w_down != before).flatten(1).any(dim=-1).tolist()
    assert moved == [n > 0 for n in seen.load]
    assert 0 in seen.load


def test_the_small_layer_repeats_itself_and_the_bias_spreads_its_load():
    def late(**how) -> list[float]:
        small = experiment.SmallMoE(seed=0)
        return [small.step(**how).max_vio for _ in range(80)][-10:]

    nothing = late()
    assert late() == nothing
    assert min(nothing) > 1.5
    assert max(late(speed=0.01)) < 0.6
    assert max(late(alpha=1.0)) < 0.6


@pytest.mark.parametrize("draw", [figures.draw, figures.draw_domains])
def test_pictures_are_the_same_bytes_twice(draw):
    assert style.render(draw()) == style.render(draw())


def test_the_frontier_stands_where_its_numbers_are():
    points = figures.frontier(log.read("balance")["results"])
    drawn = figures.draw().axes[0].containers
    for (vio, loss), container in zip(points.values(), drawn, strict=True):
        ((x, y),) = container.lines[0].get_xydata()
        assert (x, y) == pytest.approx((vio[0], loss[0]))


def test_bars_mark_the_overloaded():
    html = figures.bars([6, 1, 1, 0], step=3, error=0.5)
    assert "MaxVio 2.00" in html
    assert html.count("▲") == 1
    assert "6 ▲" in html


def test_the_live_cockpit_learns_and_starts_again():
    import ipywidgets as widgets

    box = figures.cockpit().widget
    sliders, buttons, screen = box.children
    speed, _, _ = sliders.children
    _, play, once, again = buttons.children
    assert isinstance(screen, widgets.HTML)
    assert "step 1," in screen.value
    first = screen.value
    speed.value = 0.1
    once.click()
    assert "step 2," in screen.value
    play.value = 1
    assert "step 3," in screen.value
    play.value = 0  # what the stop button sets
    assert "step 3," in screen.value
    again.click()
    assert screen.value == first
