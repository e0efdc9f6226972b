"""The model sizer counts as minids, refuses as Config, and moves by mouse, touch and keys."""

import random
import re
from dataclasses import asdict

import pytest
from browser import drag, shot, swipe

from figures.count import grouped, widget
from minids.config import Config, preset
from minids.count import MEASURED_TFLOPS, REPORTED_TOKENS, count

PRESETS = ("v3", "v2", "v2_lite", "small", "nano")
FIELDS = [field["name"] for field in widget().data["config"]]
LEAST = {field["name"]: field["least"] for field in widget().data["config"]}
CHAPTER = "01_count"
# BigInt is no JSON: as text, and back to int here
ASK = """asked => {
    const { count, hours, refuse } = document.querySelector('.mn-fig').sizer;
    const plain = (key, value) => (typeof value === 'bigint' ? `${value}n` : value);
    return asked.map(({ cfg, seq_len, tokens, tflops }) => {
        const refused = refuse(cfg);
        if (refused) return { refused };
        const counts = count(cfg, seq_len);
        return { counts: JSON.stringify(counts, plain), hours: hours(counts, tokens, tflops) };
    });
}"""


def drawn(seed: int) -> list[dict]:
    """Return configs at random: near a preset, small, or with products beyond 2^53."""
    dice, found = random.Random(seed), []
    for number in range(300):
        base = asdict(preset(PRESETS[number % len(PRESETS)]))
        base["attn"] = ("mla", "mha", "gqa", "mqa")[number // len(PRESETS) % 4]
        base["n_kv_heads"] = 1 + number % 2  # 2 divides the heads of every preset
        for name in dice.sample(FIELDS, dice.randint(1, 5)):
            if name in ("attn", "score_func"):
                base[name] = dice.choice(["mla", "gqa", "sigmoid", "softmax"])
            elif name.endswith("_dim") or name == "vocab_size":
                base[name] = dice.choice([2 * dice.randint(0, 40), 2 * dice.randint(1, 10**6)])
            else:
                base[name] = dice.choice([0, 1, 2, 4, 8, 16, dice.randint(0, 300), 2.5, -1])
        found.append(base)
    return found


def build(values: dict) -> Config | str:
    """Return a Config, or what it says of an illegal one."""
    cfg = object.__new__(Config)  # past the type hook of the tests, which would speak first
    for name, value in values.items():
        object.__setattr__(cfg, name, value)
    try:
        cfg.__post_init__()
    except ValueError as error:
        return str(error)
    return cfg


def as_python(text: str) -> dict:
    """Read what the figure counted: whole numbers as they are, of any size."""
    return eval(re.sub(r'"(\d+)n"', r"\1", text))


def wanted(cfg: Config, seq_len: int) -> dict:
    """Return what minids counts, under the names that the figure uses."""
    counts = count(cfg, seq_len)
    chosen = counts.parts["routed experts"] * cfg.n_activated_experts // cfg.n_routed_experts
    names = ("parts", "total", "mtp", "mtp_stored", "active", "cache_elements", "cache_bytes",
             "flops_forward", "flops_training")  # fmt: skip
    return {name: getattr(counts, name) for name in names} | {
        "used": counts.parts | {"routed experts": chosen, "embedding": 0},
        "flops_attention": counts.flops_forward - 2 * counts.active["with head"],
    }


@pytest.fixture
def alone(visitor, tmp_path):
    """The figure on a page of its own."""
    path = tmp_path / "sizer.html"
    path.write_text(f"<!doctype html><meta charset=utf-8>{widget()._repr_html_()}")
    return visitor.open(path.as_uri())


def test_counts_and_refusals_are_those_of_minids(alone):
    values = [asdict(preset(name)) for name in PRESETS] + drawn(0)
    asked = [
        {"cfg": {name: cfg[name] for name in FIELDS}, "seq_len": 4096 + n, "tokens": 1e9 * (n + 1),
         "tflops": 385.0 + n}
        for n, cfg in enumerate(values)
    ]  # fmt: skip
    answers = alone.evaluate(ASK, asked)
    legal = 0
    for cfg, question, answer in zip(map(build, values), asked, answers, strict=True):
        if isinstance(cfg, str):
            assert answer == {"refused": cfg}, question
            continue
        legal += 1
        assert as_python(answer["counts"]) == wanted(cfg, question["seq_len"]), question
        counts = count(cfg, question["seq_len"])
        assert answer["hours"] == counts.gpu_hours(question["tokens"], question["tflops"])
    assert 100 < legal < len(values) - 100  # both sides are tested


def test_sizes_beyond_doubles_are_exact(alone):
    huge = preset("v3", dim=999_999, vocab_size=1_000_003, moe_inter_dim=999_983)
    assert count(huge).total > 2**53
    cfg = {name: asdict(huge)[name] for name in FIELDS}
    (answer,) = alone.evaluate(ASK, [{"cfg": cfg, "seq_len": 7, "tokens": 1, "tflops": 1}])
    assert as_python(answer["counts"])["total"] == count(huge).total


def readouts(figure) -> dict[str, str]:
    script = "e => [...e.querySelectorAll('output[data-name]')].map(o => [o.dataset.name, o.value])"
    return dict(figure.evaluate(script))


def named(figure, name: str):
    return figure.locator(f'[data-name="{name}"]')


def says(figure, **changes) -> dict[str, str]:
    """Wait for the figure to say what minids counts for V3 with changes; return what it says."""
    counts = count(preset("v3", **changes))
    hours = counts.gpu_hours(REPORTED_TOKENS, MEASURED_TFLOPS)
    expected = {
        "total": f"{counts.total:,}", "active": f"{counts.active['with head']:,}",
        "both": f"{counts.active['with both tables']:,}",
        "neither": f"{counts.active['with neither']:,}",
        "share": f"{100 * counts.active['with head'] / counts.total:.2f} %",
        "mtp": f"{counts.mtp:,}", "stored": f"{counts.mtp_stored:,}",
        "cache": f"{counts.cache_bytes:,} B", "flops": f"{counts.flops_training:,}",
        "hours": f"{hours:,.0f}", "days": f"{hours / 2048 / 24:.1f}", "money": f"${2 * hours:,.0f}",
    }  # fmt: skip
    found = readouts(figure)
    assert found | expected == found
    return found


@pytest.fixture
def sizer(open_chapter):
    """The figure of the chapter that nobody has run: on the page, then in JupyterLab."""
    figure = open_chapter(CHAPTER).locator(".mn-fig[data-live]").first
    figure.wait_for()
    return figure


def test_mouse_drags_a_slider(sizer, surface):
    assert says(sizer)["twin"] == "56.9 : 1"
    before = named(sizer, "treemap").evaluate("e => e.innerHTML")
    drag(named(sizer, "slide-n_routed_experts"), 0.5)
    experts = int(named(sizer, "n_routed_experts").input_value())
    assert experts != 256
    says(sizer, n_routed_experts=experts)
    assert named(sizer, "treemap").evaluate("e => e.innerHTML") != before
    assert named(sizer, "preset").input_value() == ""
    shot(sizer, f"count_sizer_{surface}")
    named(sizer, "preset").select_option("v3")
    says(sizer)


def test_keys_work_it(sizer):
    chosen = named(sizer, "n_activated_experts")
    chosen.focus()
    chosen.press("ArrowUp")
    says(sizer, n_activated_experts=9)
    slider = named(sizer, "slide-moe_inter_dim")
    slider.focus()
    slider.press("ArrowRight")
    says(sizer, n_activated_experts=9, moe_inter_dim=2080)
    fold = sizer.locator("summary", has_text="Attention")
    fold.focus()
    fold.press("Enter")
    named(sizer, "attn").select_option("mha")
    says(sizer, n_activated_experts=9, moe_inter_dim=2080, attn="mha")
    assert not named(sizer, "dim").is_visible()  # one fold is open at a time
    assert not chosen.is_visible()


def test_finger_drags_it_on_a_phone(touch_page):
    page = touch_page(f"{CHAPTER}.html")
    figure = page.locator(".mn-fig[data-live]").first
    swipe(named(figure, "slide-n_shared_experts"), 1)
    says(figure, n_shared_experts=8)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    box = named(figure, "treemap").bounding_box()
    assert box["width"] <= 390
    assert box["height"] > box["width"]  # the two maps stand one below the other
    shot(figure, "count_sizer_phone")


@pytest.mark.parametrize(
    ("changes", "fold"),
    [
        ({"n_expert_groups": 7}, None), ({"n_activated_experts": 129}, None),
        ({"moe_inter_dim": 0.5}, None), ({"n_dense_layers": 62}, "Shape"),
    ],
)  # fmt: skip
def test_what_config_refuses_is_not_drawn(alone, changes, fold):
    figure = alone.locator(".mn-fig")
    if fold:
        figure.locator("summary", has_text=fold).click()
    ((name, value),) = changes.items()
    named(figure, name).fill(str(value))
    assert named(figure, "refused").text_content() == build(asdict(preset("v3")) | changes)
    assert set(readouts(figure).values()) == {"–"}
    assert figure.locator("svg rect").count() == 0
    named(figure, "preset").select_option("v3")
    says(figure)
    assert named(figure, "refused").text_content() == ""


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("seq_len", "0", "seq_len must be at least 1, got 0"),
        ("tokens", "-1", "tokens must be a positive number, got -1"),
        ("usd", "", "usd must be a positive number, got NaN"),
        ("gpus", "0.5", "gpus must be an integer >= 1, got 0.5"),
        ("tokens", "1e300", "tokens is beyond what this figure shows, got 1e+300"),
        ("tflops", "1e-300", "tflops is beyond what this figure shows, got 1e-300"),
    ],
)
def test_training_numbers_are_checked(alone, name, value, words):
    figure = alone.locator(".mn-fig")
    figure.locator("summary", has_text="Training").click()
    named(figure, name).fill(value)
    assert named(figure, "refused").text_content() == words
    assert readouts(figure)["hours"] == "–"


def test_what_is_small_is_not_shown_as_nothing(alone):
    figure = alone.locator(".mn-fig")
    figure.locator("summary", has_text="Training").click()
    named(figure, "tokens").fill("1e-6")
    hours = count(preset("v3")).gpu_hours(1e6, MEASURED_TFLOPS)
    found = readouts(figure)
    assert [float(found[name].strip("$")) for name in ("hours", "days", "money")] == [
        float(f"{hours:.1e}"), float(f"{hours / 2048 / 24:.1e}"), float(f"{2 * hours:.1e}"),
    ]  # fmt: skip


def test_names_of_narrow_areas_take_a_line_a_word(alone):
    alone.set_viewport_size({"width": 390, "height": 844})
    script = "[...document.querySelectorAll('svg text')].map(e => e.textContent)"
    alone.wait_for_function(f"{script}.includes('shared')")
    lines = alone.evaluate(script)
    assert "one token uses: 36.63 B, 18 times enlarged" in lines
    at = lines.index("shared")
    assert lines[at : at + 3] == ["shared", "experts", "2.55 B"]


def test_table_fits_a_phone(touch_page):
    figure = touch_page(f"{CHAPTER}.html").locator(".mn-fig[data-live]").first
    table = figure.locator(".mn-scroll", has=figure.page.locator("table"))
    assert table.evaluate("e => e.scrollWidth <= e.clientWidth")


def test_context_moves_cache_and_attention(alone):
    figure = alone.locator(".mn-fig")
    figure.locator("summary", has_text="Training").click()
    named(figure, "seq_len").fill("131072")
    found, counts = readouts(figure), count(preset("v3"), 131_072)
    assert found["context"] == f"{counts.cache_bytes * 131_072 / 2**30:.2f} GiB"
    attention = 1 - 2 * counts.active["with head"] / counts.flops_forward
    assert found["attention"] == f"{100 * attention:.2f} %"
    assert found["memory"] == f"{sum(counts.training_bytes['fp8'].values()) / 2**40:.2f} TiB"


def test_areas_are_the_parameters(alone):
    """Each map's rectangles, largest first, have areas in the proportion of the counts."""
    rects = alone.evaluate(
        """() => [...document.querySelectorAll('svg rect:not([data-name])')].map(
            ({ textContent, width, height }) =>
                [textContent.split(':')[0], width.baseVal.value * height.baseVal.value])"""
    )
    groups = grouped(count(preset("v3")), preset("v3"))
    n = len(groups)
    assert len(rects) == 2 * n
    for which, found in enumerate((rects[:n], rects[n:])):
        area, whole = dict(found), sum(size for _, size in found)
        everything = sum(sizes[which] for sizes in groups.values())
        for name, sizes in groups.items():
            assert area[name] / whole == pytest.approx(sizes[which] / everything, abs=1e-4)
    foot = alone.evaluate("document.querySelector('[data-name=used-experts]').height.baseVal.value")
    tall = alone.evaluate("document.querySelector('svg rect').height.baseVal.value")
    assert foot / tall == pytest.approx(8 / 256)
