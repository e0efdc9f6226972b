"""The tile walker on the page, in JupyterLab, on a phone: against Python and the kernels' order."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import drag, shot, swipe

from figures import kernels as figures
from figures import roofline, style, walker
from figures.walker import Problem, walk
from minids.count import binary
from minids.learn.kernels import Access

CHAPTER = "12_kernels"
TENTH = 0.05 + 1e-9  # percents and intensities are shown with one digit
GROUPS = (1, 2, 4, 8, 16, 32, 64)  # whose bytes are drawn side by side
SMALL = walker.SMALL
RAGGED = Problem(1000, 900, 700, 128, 64, 128, group_m=3, at_once=10, l2_mib=0.5)


def kernels():
    """Return the modules that the walker repeats, or skip where there is no Triton."""
    pytest.importorskip("triton")
    from minids_kernels import tiles
    from minids_kernels.bench import floors, shapes

    return tiles, floors, shapes


def some_problems(count: int) -> list[Problem]:
    """Draw problems that are walked, ragged ones and those of one wave or one tile among them."""
    draw, found = random.Random(12), []
    while len(found) < count:
        p = Problem(
            *(draw.choice((1, 16, 63, 200, draw.randint(1, 900))) for _ in range(3)),
            draw.choice((64, 128)), draw.choice((16, 32, 64, 128)), draw.choice((16, 64, 128)),
            group_m=draw.choice((1, 2, 3, 7, 64)), at_once=draw.choice((1, 2, 5, 12, 132)),
            l2_mib=draw.choice(walker.L2_MIB[:7]), number_bytes=draw.choice((1, 2)),
            start=draw.randint(0, 8), persistent=draw.random() < 0.5, swapped=draw.random() < 0.5,
        )  # fmt: skip
        if not walker.refusal(p):
            found.append(p)
    return found


# Python, without a browser


@pytest.mark.parametrize("group_m", [1, 2, 3, 5, 8, 64])
def test_tiles_are_walked_in_the_kernels_order(group_m):
    tiles, _, _ = kernels()
    for tiles_m in (1, 2, 7, 16):
        for tiles_n in (1, 3, 9):
            for tile in range(tiles_m * tiles_n):
                want = tiles.place.fn(tile, tiles_m, tiles_n, group_m)
                assert walker.place(tile, tiles_m, tiles_n, group_m) == want


def test_products_and_rates_are_the_benchmark_s():
    _, floors, shapes = kernels()
    weights = {w.name: (w.n, w.k) for w in shapes.WEIGHTS}
    assert walker.products() == weights
    assert shapes.TOKENS == walker.TOKENS
    rates = floors.DATASHEETS["NVIDIA H100 80GB HBM3"]
    assert walker.H100["tb_s"] == rates.tb_s
    assert walker.H100["tflops"] == {"1": rates.fp8_tflops, "2": rates.bf16_tflops}


def test_a_walk_by_hand():
    """Four tiles one after the other, room for two: A's rows are found again, B's never."""
    tile = 64 * 64
    p = Problem(128, 128, 64, 64, 64, 64, group_m=1, at_once=1, l2_mib=2 * tile / 2**20)
    w = walk(p)
    assert [s.dram_bytes // tile for s in w.steps] == [2, 1, 2, 1]
    assert [s.asked_bytes // tile for s in w.steps] == [2] * 4
    assert [s.kept_bytes // tile for s in w.steps] == [2] * 4
    assert (w.tiles, w.waves, w.dram_bytes, w.least_bytes) == (4, 4, 6 * tile, 4 * tile)
    assert w.operations == 2 * 128 * 128 * 64
    assert w.intensity == w.operations / (6 * tile + 2 * 128 * 128)
    assert w.masked == w.tail == 0
    assert w.idle == 1 - 4 / 7  # three steps until the first tiles are there


def test_a_start_is_paid_once_or_for_each_tile():
    p = Problem(128, 128, 128, 64, 64, 64, at_once=2, start=1)  # two waves of two steps
    assert walk(p).idle == pytest.approx(1 - 4 / 5)
    assert walk(p._replace(persistent=False)).idle == pytest.approx(1 - 4 / 6)
    assert walk(p._replace(at_once=3)).idle == pytest.approx(1 - 8 / 15)
    assert walk(p._replace(at_once=3)).tail == pytest.approx(2 / 3)
    assert walk(p._replace(at_once=8, start=0)).tail == pytest.approx(0.5)


def test_sides_that_are_swapped_waste_no_rows():
    few, swapped = (walk(p) for name, p in walker.problems().items() if "16 tokens" in name)
    assert few.masked == 0.75
    assert swapped.masked == 0
    assert few.dram_bytes == swapped.dram_bytes == few.least_bytes


def distances(p: Problem) -> list[int]:
    """Return each step's bytes from DRAM: a tile is kept if all that was used since it fits."""
    rows, cols = (p.n, p.m) if p.swapped else (p.m, p.n)
    tiles_m, tiles_n, slices = walker.counts(p)
    order = [walker.place(t, tiles_m, tiles_n, p.group_m) for t in range(tiles_m * tiles_n)]
    last: dict[tuple[str, int, int], int] = {}  # when a tile was used last
    size: dict[tuple[str, int, int], int] = {}
    now, found = 0, []
    for wave in range(0, len(order), p.at_once):
        for k in range(slices):
            depth, fetched, asked = min(p.block_k, p.k - k * p.block_k), 0, set()
            for row, col in order[wave : wave + p.at_once]:
                a = min(p.block_m, rows - row * p.block_m)
                b = min(p.block_n, cols - col * p.block_n)
                for tile, n in ((("A", row, k), a), (("B", col, k), b)):
                    if tile in asked:
                        continue
                    asked.add(tile)
                    size[tile] = n * depth * p.number_bytes
                    since = sum(size[t] for t, at in last.items() if at > last.get(tile, now))
                    if tile not in last or since + size[tile] > p.l2_mib * 2**20:
                        fetched += size[tile]
                    last[tile] = now = now + 1
            found.append(fetched)
    return found


def test_the_cache_keeps_what_was_used_last():
    for p in [SMALL, *some_problems(12)]:
        w = walk(p)
        if w.tiles * len(w.steps) < 40_000:  # the other way is slow
            assert [step.dram_bytes for step in w.steps] == distances(p), p
        assert w.least_bytes <= w.dram_bytes <= w.asked_bytes
        assert max(step.kept_bytes for step in w.steps) <= p.l2_mib * 2**20


def test_masked_products_and_asked_bytes_are_counted_one_by_one():
    for p in some_problems(20):
        w, (rows, cols) = walk(p), (p.n, p.m) if p.swapped else (p.m, p.n)
        tiles_m, tiles_n, slices = walker.counts(p)
        sides = [(tiles_m, p.block_m, rows), (tiles_n, p.block_n, cols), (slices, p.block_k, p.k)]
        inside = np.prod([np.mean(np.arange(n * block) < whole) for n, block, whole in sides])
        assert w.masked == pytest.approx(1 - inside)
        assert w.asked_bytes == p.number_bytes * p.k * (rows * tiles_n + cols * tiles_m)


REFUSED = {
    "K must be an integer >= 1, got 0": dict(k=0),
    "programs at once must be an integer >= 1, got -2": dict(at_once=-2),
    "BLOCK_M must be at least 64, the rows of Hopper's tensor-core product, got 16: make it larger,"
    " or swap the sides": dict(block_m=16),
    "BLOCK_M x BLOCK_N must be at most 32,768, half of a multiprocessor's registers, got 65,536: "
    "make one smaller": dict(block_m=256, block_n=256),
    "tiles of two steps must fit into 227 KiB of shared memory, got 256 KiB: make a BLOCK smaller":
        dict(block_m=128, block_n=128, block_k=256, number_bytes=2),
    "a walk must have at most 4,000,000 loads to be followed here, got 8,388,608: make a BLOCK "
    "larger": dict(m=16384, n=16384, k=4096, block_m=64, block_n=64, block_k=64),
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_walked_is_refused(words):
    with pytest.raises(ValueError, match=re.escape(words)):
        walk(SMALL._replace(**REFUSED[words]))


# Stills


MACHINES = [
    figures.Machine("a CPU", 0.03, 0.12), figures.Machine("H100, FP8", 3.35, 1979),
    figures.Machine("H200, FP8", 4.8, 1979),
]  # fmt: skip


def v3_points(measured: float | None = None) -> list[figures.Point]:
    """Return V3's products at 16 and 4,096 tokens, without scales; `measured` TFLOP/s an op/B."""
    found = []
    for tokens in (16, 4096):
        for name, (n, k) in walker.products().items():
            intensity = 2 * tokens * n * k / (tokens * k + n * k + 2 * tokens * n)
            rate = measured and min(measured * intensity, 1000)
            found.append(figures.Point(name, intensity, rate, f"{tokens:,} tokens"))
    return found


@pytest.mark.parametrize("cpu", [(0.005, 0.01), (0.03, 0.12), (0.4, 9.0)])
@pytest.mark.parametrize("measured", [None, 0.8])
def test_names_on_the_roofline_do_not_cover_each_other(cpu, measured):
    machines = [figures.Machine("a CPU", *cpu), *MACHINES[1:]]
    fig = figures.draw_roofline(machines, v3_points(measured))
    fig.draw_without_rendering()
    (ax,) = fig.axes
    boxes = {text: text.get_window_extent() for text in ax.texts}
    assert len(boxes) == 16
    for one, box in boxes.items():
        assert ax.bbox.x0 <= box.x0 < box.x1 <= ax.bbox.x1, one
        assert ax.bbox.y0 <= box.y0 < box.y1 <= ax.bbox.y1, one
        for other, its in boxes.items():
            assert one is other or not box.overlaps(its), (one, other)
        for line in ax.lines:
            (x, low), (_, high) = ax.transData.transform(line.get_xydata())[[0, -1]]
            upright = len(set(line.get_xdata())) == 1 and len(line.get_xdata()) == 2
            crosses = box.x0 < x < box.x1 and min(low, high) < box.y1 and box.y0 < max(low, high)
            assert not (upright and crosses), one


def access(program: tuple[int, int, int], name: str, offsets, kind: str = "load") -> Access:
    return Access(program, kind, name, np.asarray(offsets))


def test_pieces_of_a_tile_picture_by_hand():
    """Two programs on 2 x 4 elements: one column each, one for both, one for nobody."""
    records = [
        access((0, 0, 0), "x", [0, 2, 4, 6]), access((1, 0, 0), "x", [1, 2, 5, 6]),
        access((1, 0, 0), "x", [1]),
    ]  # fmt: skip
    fig = figures.draw_tiles(records, {"x": (2, 4)})
    (ax,) = fig.axes
    assert ax.get_title() == "x [2 × 4]: 9 loaded"
    assert [text.get_text() for text in ax.texts] == ["0", "1", "all"]
    assert [text.get_position() for text in ax.texts] == [(0.5, 1), (1.5, 1), (2.5, 1)]
    hatched = [patch.get_xy() for patch in ax.patches if patch.get_hatch()]
    assert hatched == [(2, 0)]


def test_labels_of_a_tile_picture_name_programs_along_each_axis():
    grid = [(i, j, 0) for i in range(4) for j in range(2)]
    label = figures._label
    assert label(((2, 1, 0),), grid) == "2,1"
    assert label(((2, 0, 0), (2, 1, 0)), grid) == "2,*"
    assert label(((0, 0, 0), (1, 0, 0), (2, 0, 0)), grid) == "0–2,0"
    assert label(((0, 0, 0), (3, 0, 0)), grid) == "0+3,0"
    assert label(tuple(grid), grid) == "all"
    assert label(((0, 0, 0),), [(0, 0, 0)]) == "0"


def test_an_element_outside_of_the_array_is_an_error():
    with pytest.raises(ValueError, match="x must have 1 x 4 elements, got one at 4"):
        figures.draw_tiles([access((0, 0, 0), "x", [3, 4])], {"x": (4,)})


def test_levels_without_a_number_say_so():
    levels = [figures.Level("1 loop", 0.5, 60.0), figures.Level("2 tiles")]
    fig = figures.draw_levels(levels, "torch.matmul", "made up for a test")
    (ax,) = fig.axes
    assert [text.get_text() for text in ax.texts] == ["0.5 %", "not yet measured"]
    assert fig.get_supxlabel() == "made up for a test"
    (legend,) = fig.legends
    assert [text.get_text() for text in legend.get_texts()] == ["torch.matmul, the same floor"]
    nothing = figures.draw_levels([figures.Level(name) for name in "ab"])
    assert [text.get_text() for text in nothing.axes[0].texts] == ["not yet measured"] * 2
    assert not nothing.legends


@pytest.mark.slow
def test_stills_are_drawn_the_same_twice():
    records = [access((p, 0, 0), name, range(4 * p, 4 * p + 4)) for p in (0, 1) for name in "xy"]
    stills = [
        lambda: figures.draw_roofline(MACHINES, v3_points()),
        lambda: figures.draw_tiles(records, {"x": (8,), "y": (4, 2)}),
        lambda: figures.draw_levels([figures.Level("1 loop", 5.0, 60.0), figures.Level("2")]),
    ]
    for draw in stills:
        svg = style.render(draw())
        assert svg == style.render(draw())
        assert float(svg.split(b'width="')[1].split(b"pt")[0]) <= roofline.WIDE * 72


# The widget


def control(page, name: str):
    return page.locator(f"[data-name={name}]").first


def shown(page, name: str) -> str:
    return control(page, name).text_content()


SET = """given => {
    const find = name => document.querySelector(`[data-name="${name}"]`);
    for (const [name, value] of Object.entries(given)) {
        if (typeof value === "boolean") find(name).checked = value;
        else find(name).value = value;
    }
    find("m").dispatchEvent(new Event("input", { bubbles: true }));
}"""
READ = """() => {
    const figure = document.querySelector('[data-name="walk"]').closest(".mn-fig"), found = {};
    for (const out of figure.querySelectorAll("output[data-name], [data-name=groups]"))
        found[out.dataset.name] = { text: out.textContent, bytes: out.dataset.bytes };
    return found;
}"""


def put(page, p: Problem) -> None:
    """Set every input of the walker at once."""
    given = p._asdict() | {
        "l2": walker.L2_MIB.index(p.l2_mib), "persistent": str(p.persistent).lower(),
    }  # fmt: skip
    del given["l2_mib"]
    page.evaluate(SET, {k: v if isinstance(v, bool) else str(v) for k, v in given.items()})


def assert_shows(page, p: Problem, groups: bool = False) -> None:
    """Compare all that the walker says with Python, at the step where it stands."""
    said, w = page.evaluate(READ), walk(p)
    assert shown(page, "refused") == ""
    assert int(control(page, "step").get_attribute("max")) == len(w.steps) - 1
    at = int(control(page, "step").input_value())
    step = w.steps[at]
    amounts = {
        "now-asked": step.asked_bytes, "now-dram": step.dram_bytes, "now-kept": step.kept_bytes,
        "so-far": sum(s.dram_bytes for s in w.steps[: at + 1]), "asked": w.asked_bytes,
        "l2-bytes": w.asked_bytes - w.dram_bytes, "dram": w.dram_bytes, "least": w.least_bytes,
        "result": w.result_bytes,
    }  # fmt: skip
    assert {name: int(said[name]["bytes"]) for name in amounts} == amounts
    assert {name: said[name]["text"] for name in amounts} == {
        name: binary(n) for name, n in amounts.items()
    }
    assert said["running"]["text"] == f"{step.running:,} of {p.at_once:,} places"
    assert said["tiles"]["text"] == f"{w.tiles:,} in {w.waves:,}"
    assert float(said["intensity"]["text"]) == pytest.approx(w.intensity, abs=TENTH)
    fed = walker.fed(w, p.number_bytes)
    for name, share in {"masked": w.masked, "tail": w.tail, "idle": w.idle, "fed": fed}.items():
        shown_share = float(said[name]["text"].split(" %")[0])
        assert shown_share == pytest.approx(100 * share, abs=TENTH), name
    assert said["fed"]["text"].endswith("(H100)")
    sums = p.block_m * p.block_n
    assert said["sums"]["text"].startswith(f"{sums:,} (")
    if groups:
        bars = [walk(p._replace(group_m=height)).dram_bytes for height in GROUPS]
        assert [int(n) for n in said["groups"]["bytes"].split()] == bars


def test_walker_by_mouse_and_keys(open_chapter, surface):
    page = open_chapter(CHAPTER)
    assert_shows(page, SMALL, groups=True)
    drag(control(page, "step"), 0.5)
    at = int(control(page, "step").input_value())
    assert 12 < at < 24
    assert_shows(page, SMALL)
    control(page, "step").press("ArrowRight")
    assert int(control(page, "step").input_value()) == at + 1
    assert_shows(page, SMALL)
    group = control(page, "group_m")
    group.press("Home")
    assert_shows(page, SMALL._replace(group_m=1))
    group.press("ArrowRight")
    drag(control(page, "l2"), 0.0)
    p = SMALL._replace(group_m=2, l2_mib=0.0)
    assert_shows(page, p)
    control(page, "more").click()
    control(page, "m").fill("321")
    control(page, "block_n").select_option("128")
    control(page, "persistent").select_option("false")
    control(page, "swapped").press("Space")
    p = p._replace(m=321, block_n=128, persistent=False, swapped=True)
    assert_shows(page, p)
    drag(control(page, "start"), 1.0)
    assert_shows(page, p._replace(start=8), groups=True)
    shot(page, f"kernels-walker-{surface}")


def test_a_tile_that_is_pressed_is_gone_to(site_page):
    page = site_page(f"{CHAPTER}.html")
    number = page.locator("[data-name=walk] text[data-at='6 3']")
    number.scroll_into_view_if_needed()
    number.click()
    tile = int(number.text_content())
    tiles_m, tiles_n, slices = walker.counts(SMALL)
    assert walker.place(tile, tiles_m, tiles_n, SMALL.group_m) == (6, 3)
    assert int(control(page, "step").input_value()) == tile // SMALL.at_once * slices
    assert_shows(page, SMALL)


def test_play_goes_to_the_end_and_stops(site_page):
    page = site_page(f"{CHAPTER}.html")
    control(page, "play").press("Enter")
    assert shown(page, "play") == "Stop"
    page.wait_for_function(
        "() => document.querySelector('[data-name=play]').textContent === 'Play'"
    )
    step = control(page, "step")
    assert step.input_value() == step.get_attribute("max")
    assert_shows(page, SMALL)


def test_the_order_that_is_drawn_is_the_kernels(site_page):
    tiles, _, _ = kernels()
    page = site_page(f"{CHAPTER}.html")
    tiles_m, tiles_n, _ = walker.counts(SMALL)
    for group_m in (1, 2, 3, 4, 5, 9, 64):
        put(page, SMALL._replace(group_m=group_m))
        drawn = page.evaluate(
            "() => [...document.querySelectorAll('[data-name=walk] text[data-at]')]"
            ".map(text => [text.textContent, text.dataset.at])"
        )
        want = [
            [str(tile), "{} {}".format(*tiles.place.fn(tile, tiles_m, tiles_n, group_m))]
            for tile in range(tiles_m * tiles_n)
        ]
        assert drawn == want


def test_walker_equals_python_on_any_problem(site_page):
    page, step = site_page(f"{CHAPTER}.html"), "[data-name=step]"
    for number, p in enumerate([RAGGED, *some_problems(40)]):
        put(page, p)
        # any step: cached copies to begin from lie between them
        page.eval_on_selector(
            step,
            "(e, share) => { e.value = Math.round(share * e.max);"
            " e.dispatchEvent(new Event('input', { bubbles: true })); }",
            (number * 0.37) % 1,
        )
        assert_shows(page, p, groups=number < 10)


@pytest.mark.parametrize("name", list(walker.problems()))
def test_walker_equals_python_on_v3(site_page, name):
    page = site_page(f"{CHAPTER}.html")
    control(page, "preset").select_option(name)
    drag(control(page, "step"), 0.6)
    assert_shows(page, walker.problems()[name], groups=name.startswith("o, 4"))


def test_walker_refuses_in_python_s_words(site_page):
    page = site_page(f"{CHAPTER}.html")
    for words, changes in REFUSED.items():
        put(page, SMALL._replace(**changes))
        assert shown(page, "refused") == words
        assert not control(page, "walk").is_visible()
        put(page, SMALL)
        assert_shows(page, SMALL)
    control(page, "more").click()
    control(page, "n").fill("")
    assert shown(page, "refused") == "N must be an integer >= 1, got None"
    control(page, "n").fill("1.5")
    assert shown(page, "refused") == "N must be an integer >= 1, got 1.5"


# What is seen


def test_walker_by_touch_on_a_phone(touch_page):
    page = touch_page(f"{CHAPTER}.html", color_scheme="dark")
    swipe(control(page, "step"), 0.4)
    assert int(control(page, "step").input_value()) > 5
    assert_shows(page, SMALL)
    number = page.locator("[data-name=walk] text[data-at='1 9']")
    number.scroll_into_view_if_needed()
    number.tap()
    tile = int(number.text_content())
    assert int(control(page, "step").input_value()) == tile // SMALL.at_once * 4
    swipe(control(page, "group_m"), 0.0)
    control(page, "more").tap()
    assert_shows(page, SMALL._replace(group_m=int(control(page, "group_m").input_value())))
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for name in ("walk", "time", "groups", "step", "m", "at_once", "preset", "play", "asked"):
        box = control(page, name).bounding_box()
        assert box["x"] >= 0, name
        assert box["x"] + box["width"] <= 390, name
    shot(page, "kernels-phone", full_page=True)


def test_walker_in_the_dark(site_page):
    page = site_page(f"{CHAPTER}.html", color_scheme="dark")
    control(page, "walk").scroll_into_view_if_needed()
    shot(page, "kernels-dark")
    for name in ("walk", "time", "groups"):
        ink = control(page, name).evaluate("e => getComputedStyle(e.querySelector('text')).fill")
        assert min(int(part) for part in re.findall(r"\d+", ink)[:3]) > 120


def test_what_a_step_loads_is_told_by_shape_too(site_page):
    """From DRAM fills its cell, from L2 is smaller: the colour is not needed."""
    page = site_page(f"{CHAPTER}.html")
    put(page, SMALL._replace(m=576, n=640, l2_mib=200.0))  # whole tiles
    orange, green = (style.COLOURS[n] for n in (1, 2))
    sizes = {orange: set(), green: set()}
    for number in range(0, 30, 4):
        control(page, "step").fill(str(number))
        found = page.evaluate(
            "() => [...document.querySelectorAll('[data-name=walk] rect')]"
            ".map(r => [r.getAttribute('fill'), r.width.baseVal.value * r.height.baseVal.value])"
        )
        for colour, area in found:
            if colour in sizes:
                sizes[colour].add(round(area))
    assert sizes[orange]
    assert sizes[green]
    assert max(sizes[green]) < 0.5 * min(sizes[orange])


# The lecture page


@pytest.fixture
def card() -> str:
    page = Path(figures.__file__).parents[1] / "book/teach/kernels.md"
    if not page.exists():
        pytest.skip("NOT RUN: a students' copy has no lecture pages")
    return " ".join(page.read_text("utf-8").split())


def begun(name: str, **changes) -> walker.Walk:
    """Walk what the walker begins with under this name."""
    return walk(walker.problems()[name]._replace(**changes))


def times(w: walker.Walk) -> str:
    return f"{w.dram_bytes / w.least_bytes:.1f} times"


def test_the_lecture_s_numbers_of_rows_and_stripes(card):
    rows, *stripes = (begun("o, 4,096 tokens", group_m=height) for height in (1, 8, 16, 32))
    said = "Row by row {}, in stripes of 8 {}, of 16 {}, of 32 again {}"
    assert said.format(times(rows), *map(times, stripes)) in card
    assert 11 * 12 == walker.H100["multiprocessors"]
    down = [begun("shared down, 4,096 tokens", group_m=height) for height in (1, 8, 16, 32)]
    assert {w.dram_bytes for w in down} == {down[0].least_bytes} == {22 * 2**20}
    wide = begun("gate + up, 4,096 tokens", group_m=1)
    fed = [f"{100 * walker.fed(w, 1):.1f} %" for w in (rows, wide)]
    assert 'feed {} of an H100\'s peak for `o`; for "gate + up", {}.'.format(*fed) in card


def test_the_lecture_s_numbers_of_rows_that_win(card):
    found = {
        (height, l2): times(begun("a small one", group_m=height, l2_mib=l2))
        for height in (1, 4) for l2 in (0.125, 0.25)
    }  # fmt: skip
    assert f"stripes of 4 read {found[4, 0.125].replace(' times', '')} times the least" in card
    assert f"and rows {found[1, 0.125]}" in card
    assert found[1, 0.25] == "1.0 times"
    assert f"half as much again: {found[4, 0.25]}" in card
    assert f"All of B is {SMALL.n * SMALL.k // 1024} KiB" in card


def test_the_lecture_s_numbers_of_the_tail(card):
    wide, narrow = (begun("q_a + kv_a, 4,096 tokens", block_n=n) for n in (128, 64))
    assert f"{wide.tiles} tiles, 132 multiprocessors" in card
    assert f"{wide.tiles / 132:.1f} waves are five" in card
    assert wide.waves == 5
    assert f"{100 * wide.tail:.1f} % of the last one's places have no tile" in card
    assert f"and {100 * wide.idle:.1f} % of all places and steps are idle" in card
    assert f"there are {narrow.tiles:,} tiles, which is 8 times 132" in card
    assert narrow.tiles == 8 * 132
    assert narrow.tail == narrow.masked == 0
    assert f"{100 * narrow.idle:.1f} % idle" in card
    asked = [f"{w.asked_bytes / 2**30:.2f}" for w in (narrow, wide)]
    assert "{} GiB in place of {}".format(*asked) in card


def test_the_lecture_s_numbers_of_the_start(card):
    for name, words in (
        ("kv_b", "{} % against {} %: three steps"),
        ("o", "{} % against {} %: who"),
    ):
        idle = [begun(f"{name}, 4,096 tokens", persistent=many).idle for many in (False, True)]
        assert words.format(*(f"{100 * share:.1f}" for share in idle)) in card
    p = walker.problems()["kv_b, 4,096 tokens"]
    assert (walker.counts(p)[2], p.start) == (4, 3)


def test_the_lecture_s_numbers_of_sixteen_tokens(card):
    names = ("o, 16 tokens", "o, 16 tokens, sides swapped")
    few, swapped = map(begun, names)
    assert f"{100 * few.masked:.1f} % of what the tensor cores do" in card
    assert swapped.masked == 0
    assert few.dram_bytes == swapped.dram_bytes
    assert walker.fed(few, 1) == walker.fed(swapped, 1)
    assert f"DRAM can feed {100 * walker.fed(few, 1):.1f} % of the peak" in card
    sums = [f"{p.block_m * p.block_n:,}" for p in map(walker.problems().get, names)]
    assert "a program's sums, from {} to {}".format(*sums) in card


def test_the_lecture_s_numbers_of_the_interpreter(card):
    one, small = (torch.tensor(v).bfloat16().view(torch.int16).item() for v in (1.0, 0.015625))
    assert f"{one * small:,}, for the bits of both numbers" in card
    assert torch.tensor(31.4).to(torch.float8_e4m3fn).item() == 32


def test_the_lecture_s_numbers_of_the_levels(card):
    pytest.importorskip("triton")
    from minids_kernels.levels import LEVELS, loads

    asked = [loads(level, 8192, 8192, 8192).l2 for level in LEVELS[:7]]
    assert asked[0] == 128 * asked[1]
    assert "takes off a factor of 128" in card
    assert set(asked[1:6]) == {asked[1]}
    assert asked[6] / asked[5] == pytest.approx(0.5, rel=0.02)  # scales come on top
