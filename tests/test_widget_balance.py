"""The balance cockpit, operated on the page, in JupyterLab and on a phone, against minids."""

from pathlib import Path

import nbformat
import pytest
import torch
from browser import drag, run_all, shot, swipe

from figures import balance as figures
from minids import preset
from minids.balance import expert_load, max_vio, update_bias
from minids.learn import log
from minids.learn.experiments import balance as experiment
from minids.router import Router

CHAPTER = "08_balance"


def halves(lean: float) -> list[torch.Tensor]:
    """Return the liking [128, 8] of the two halves of a step's tokens."""
    data = figures.router_data()
    prose, code = (torch.tensor(data[d], dtype=torch.float64) for d in ("prose", "code"))
    more = round(64 * (1 + lean))
    return [
        torch.cat([prose[:more], code[: 128 - more]]),
        torch.cat([prose[more:], code[128 - more :]]),
    ]


def steered(index: int, *, skew=1.0, lean=0.0, rule="sign", each=False, steps=figures.STEPS):
    """Steer minids' own router: a frame a step, (load, MaxVio, worse half's MaxVio, bias)."""
    cfg = preset("toy", dim=9, n_expert_groups=1, n_limited_groups=1)
    router = Router(cfg).double()
    favour = torch.tensor(figures.FAVOUR, dtype=torch.float64)
    router.centroids.data = torch.cat([torch.eye(8).double(), favour[:, None]], dim=1)
    speed, frames = figures.SPEEDS[index], []

    def move(load):
        if rule == "sign":
            update_bias(router.bias, load, speed)
        else:
            mean = load.double().mean()
            router.bias += speed * (mean - load) / mean

    for _ in range(steps):
        before, loads = router.bias.tolist(), []
        for liking in halves(lean):
            x = torch.cat([liking, torch.full((128, 1), skew).double()], dim=1)
            loads.append(expert_load(router(x)[1], 8))
            if each:
                move(loads[-1])
        load = loads[0] + loads[1]
        if not each:
            move(load)
        worse = max(max_vio(half).item() for half in loads)
        frames.append((load.tolist(), max_vio(load).item(), worse, before))
    return frames


def shown(page, name: str) -> str:
    return page.locator(f"[data-name={name}]").first.text_content()


def control(page, name: str):
    return page.locator(f"[data-name={name}]").first


def assert_shows(page, frames, step: int) -> None:
    load, vio, worse, bias = frames[step - 1]
    assert shown(page, "loads") == " ".join(map(str, load))
    assert float(shown(page, "max-vio")) == pytest.approx(vio, abs=6e-4)
    assert float(shown(page, "half-vio")) == pytest.approx(worse, abs=6e-4)
    assert [float(b) for b in shown(page, "biases").split()] == pytest.approx(bias, abs=6e-5)
    calm = next((n for n, frame in enumerate(frames, 1) if frame[1] <= 0.1), None)
    assert shown(page, "calm") == ("none" if calm is None else str(calm))
    late = sum(frame[1] for frame in frames[-50:]) / 50
    assert float(shown(page, "late-vio")) == pytest.approx(late, abs=6e-4)


@pytest.mark.parametrize("skew", [n / 10 for n in range(21)])
def test_no_token_is_undecided(skew):
    """Page and Python break ties differently: no third expert comes near the second."""
    logits = torch.cat(halves(0.0)) + skew * torch.tensor(figures.FAVOUR, dtype=torch.float64)
    best = logits.topk(3).values
    assert (best[:, 1] - best[:, 2]).min() > 1e-6


def test_the_lecture_card_s_numbers():
    """book/teach/balance.md says them: reacting after each half is worse than after the batch."""
    late = [
        sum(frame[1] for frame in steered(4, lean=1.0, each=each)[-50:]) / 50
        for each in (False, True)
    ]
    page = Path(figures.__file__).parents[1] / "book/teach/balance.md"
    if not page.exists():
        pytest.skip("NOT RUN: a students' copy has no lecture pages")
    card = page.read_text("utf-8")
    assert f"from {late[0]:.2f} to {late[1]:.2f}" in " ".join(card.split())


def test_router_by_mouse_keys_and_curve(open_chapter, surface):
    page = open_chapter(CHAPTER)
    assert_shows(page, steered(2), 1)
    control(page, "step").hover()
    drag(control(page, "step"), 1.0)
    assert_shows(page, steered(2), 400)
    control(page, "speed").press("ArrowRight")  # 0.001 -> 0.003
    assert_shows(page, steered(3), 400)
    curve = page.locator("[data-name=router-curve]").first
    curve.scroll_into_view_if_needed()
    box = curve.bounding_box()
    page.mouse.move(box["x"] + box["width"] * (34 + 79) / 360, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * (34 + 158) / 360, box["y"] + box["height"] / 2)
    page.mouse.up()
    step = int(control(page, "step").input_value())
    assert abs(step - 200) <= 3
    assert_shows(page, steered(3), step)
    shot(page, f"balance-router-{surface}")


@pytest.mark.parametrize(
    ("index", "changes"),
    [(6, {}), (0, {}), (5, {"lean": 1.0}), (5, {"lean": 1.0, "each": True}),
     (4, {"rule": "proportional"}), (4, {"skew": 2.0})],
)  # fmt: skip
def test_router_equals_minids_step_by_step(site_page, index, changes):
    page, frames = site_page(f"{CHAPTER}.html"), steered(index, **changes)
    control(page, "speed").fill(str(index))
    for name in ("skew", "lean"):
        if name in changes:
            control(page, name).fill(str(changes[name]))
    if "rule" in changes:
        control(page, "rule").select_option(changes["rule"])
    if changes.get("each"):
        control(page, "each").select_option("half")
    for step in (1, 2, 3, 17, 60, 399, 400):
        control(page, "step").fill(str(step))
        assert_shows(page, frames, step)


def test_play_moves_the_steps_and_stops(site_page):
    page = site_page(f"{CHAPTER}.html")
    control(page, "step").fill("390")
    control(page, "play").click()
    page.wait_for_function("() => document.querySelector('[data-name=step]').value === '400'")
    page.wait_for_function(
        "() => document.querySelector('[data-name=play]').textContent === 'Play'"
    )


def test_runs_are_the_log_s(open_chapter, surface):
    page = open_chapter(CHAPTER)
    results = log.read("balance")["results"]
    control(page, "run-step").scroll_into_view_if_needed()
    for arm in ("none", "bias 0.01"):
        run = experiment.by_arm(results)[arm][0]
        control(page, "arm").select_option(arm)
        for layer in (0, 1):
            control(page, "layer").select_option(str(layer))
            control(page, "run-step").hover()  # waits until nothing moves any more
            drag(control(page, "run-step"), 1.0)
            last = run["frames"][-1]["load"][layer]
            vio = max_vio(torch.tensor(last)).item()
            assert float(shown(page, "run-max-vio")) == pytest.approx(vio, abs=6e-4)
            assert float(shown(page, "run-loss")) == pytest.approx(run["loss"][-1], abs=6e-3)
            idle = sum(n < 0.1 * sum(last) / 8 for n in last)
            assert shown(page, "run-idle") == str(idle)
        want = run["heldout_loss"]["all"]
        assert float(shown(page, "run-heldout")) == pytest.approx(want, abs=6e-4)
    shot(page, f"balance-runs-{surface}")


def test_on_a_phone_by_touch(touch_page):
    page = touch_page(f"{CHAPTER}.html", color_scheme="dark")
    swipe(control(page, "step"), 0.5)
    step = int(control(page, "step").input_value())
    assert 150 < step < 250
    assert_shows(page, steered(2), step)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    control(page, "arm").scroll_into_view_if_needed()
    control(page, "arm").select_option("auxiliary 0.1")
    swipe(control(page, "run-step"), 0.7)
    assert int(control(page, "run-step").input_value()) > 15
    shot(page, "balance-phone", full_page=False)


@pytest.fixture
def live_router(lab):
    """Put the chapter's live router into a notebook of its own; return its name."""
    cells = ["from figures import balance as pictures", "pictures.cockpit()"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    notebook.metadata["kernelspec"] = dict(name="python3", display_name="Python 3")
    nbformat.write(notebook, lab.folder / "live_router.ipynb")
    yield "live_router.ipynb"
    (lab.folder / "live_router.ipynb").unlink()


def test_the_live_router_in_jupyterlab(live_router, lab_page):
    page = lab_page(live_router)
    run_all(page)
    screen = page.locator(".jp-OutputArea-output")
    screen.get_by_text("step 1,").wait_for()
    loads = screen.locator(".widget-html-content > div")
    first = loads.all_inner_texts()
    seen = experiment.SmallMoE().step().load
    assert [int(text.split()[2]) for text in first] == seen
    page.get_by_role("button", name="one step").click()
    screen.get_by_text("step 2,").wait_for()
    assert loads.all_inner_texts() != first
    gamma = screen.get_by_role("slider").first
    for _ in range(4):  # 0.01
        gamma.press("ArrowRight")
    screen.locator(".widget-play button").first.click()
    page.wait_for_function(  # until every expert is visited
        """() => [...document.querySelectorAll('.widget-html-content > div')]
            .every(row => Number(row.textContent.trim().split(/\\s+/)[2]) > 0)"""
    )
    screen.locator(".widget-play button").nth(1).click()
    shot(page, "balance-cockpit")
    page.get_by_role("button", name="start again").click()
    screen.get_by_text("step 1,").wait_for()
    assert loads.all_inner_texts() == first
