"""The dimension lab, operated on the page, in JupyterLab and on a phone, against minids."""

from dataclasses import replace

import pytest
import torch
from browser import drag, shot, swipe

from figures import mla as figures
from minids import Config, preset
from minids.count import attention_parameters, binary
from minids.learn import log
from minids.learn.experiments.mla import left_over

CHAPTER = "04_mla"
KINDS = ("mla", "mha", "gqa", "mqa")
FIELDS = [
    "dim", "n_layers", "n_heads", "n_kv_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim",
    "qk_rope_head_dim", "v_head_dim",
]  # fmt: skip


def control(page, name: str):
    return page.locator(f"[data-name={name}]").first


def shown(page, name: str) -> str:
    return control(page, name).text_content()


def started_from(name: str) -> Config:
    """Return a preset with the groups of GQA that the lab gives it."""
    return preset(name, n_kv_heads=figures.lab_data()["presets"][name]["n_kv_heads"])


def assert_shows(page, cfg: Config, n_bytes: int = 2, kinds: tuple[str, ...] = KINDS) -> None:
    """Compare all that the first half of the lab says with minids."""
    for kind in kinds:
        twin = replace(cfg, attn=kind)
        numbers, times = twin.cache_dim, twin.cache_dim / cfg.cache_dim
        assert shown(page, f"{kind}-cached") == f"{numbers:,}"
        assert shown(page, f"{kind}-bytes") == f"{numbers * cfg.n_layers * n_bytes:,}"
        assert float(shown(page, f"{kind}-times").rstrip("×")) == pytest.approx(times, rel=6e-3)
        assert shown(page, f"{kind}-parameters") == f"{attention_parameters(twin):,}"
    groups = cfg.cache_dim / (cfg.qk_nope_head_dim + cfg.v_head_dim)
    assert float(shown(page, "groups")) == pytest.approx(groups, rel=6e-4)
    for name, kind in (("long", "mla"), ("long-mha", "mha")):
        size = replace(cfg, attn=kind).cache_dim * cfg.n_layers * n_bytes * 131_072
        assert shown(page, name) == binary(size)
    for kind in ("mha", "mla"):
        numbers = replace(cfg, attn=kind).cache_dim
        title = f"{kind.upper()}: {numbers:,} numbers cached (framed)"
        assert title in shown(page, f"path-{kind}")


def refusal(**fields) -> str:
    """Return what Config says of a combination of fields."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - its words are what is compared
        preset("v3", **fields)
    return str(caught.value)


def test_lab_by_mouse_and_keys(open_chapter, surface):
    page = open_chapter(CHAPTER)
    v3 = started_from("v3")
    assert_shows(page, v3)
    heads = control(page, "n_heads")
    drag(heads, 1.0)
    assert int(heads.input_value()) == 256
    assert_shows(page, replace(v3, n_heads=256))
    latent = control(page, "kv_lora_rank")
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft"):
        latent.press(key)
    assert_shows(page, replace(v3, n_heads=256, kv_lora_rank=513))
    control(page, "dtype").select_option("1")
    assert_shows(page, replace(v3, n_heads=256, kv_lora_rank=513), n_bytes=1)
    shot(page, f"mla-lab-{surface}")


def test_rank_by_mouse_and_keys(open_chapter, surface):
    page = open_chapter(CHAPTER)
    sample = torch.tensor(log.read("mla")["results"]["ranks"]["sample"], dtype=torch.float64)
    missed = left_over(sample)
    rank = control(page, "rank")
    before = pixels(page, "map-1")
    drag(rank, 0.5)
    c = int(rank.input_value())
    assert 8 <= c <= 12
    for _ in range(2):
        assert shown(page, "kept") == f"{c} of {len(sample[0])}"
        share = float(shown(page, "missing").rstrip(" %")) / 100
        assert share == pytest.approx(missed[c - 1], abs=2e-4)
        rank.press("ArrowRight")
        c += 1
    assert pixels(page, "map-1") != before
    rank.press("End")
    assert shown(page, "missing") == "0.00 %"
    assert not any(pixels(page, "map-2"))
    assert pixels(page, "map-1") == pixels(page, "map-0")
    shot(page, f"mla-rank-{surface}")


def pixels(page, name: str) -> list[int]:
    """Return how strong each pixel of a heat-map is."""
    return control(page, name).evaluate(
        "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
        ".filter((_, i) => i % 4 === 3)"
    )


@pytest.mark.parametrize("name", list(figures.LABELS))
def test_lab_equals_minids_on_every_preset(site_page, name):
    page = site_page(f"{CHAPTER}.html")
    control(page, "preset").select_option(name)
    cfg = started_from(name)
    assert_shows(page, cfg)
    for field in FIELDS:
        assert int(control(page, field).input_value()) == getattr(cfg, field)


def test_lab_equals_minids_on_odd_widths(site_page):
    page = site_page(f"{CHAPTER}.html")
    changes = dict(n_heads=6, n_kv_heads=3, q_lora_rank=0, kv_lora_rank=7, qk_nope_head_dim=10,
                   qk_rope_head_dim=2, v_head_dim=5, dim=11, n_layers=3)  # fmt: skip
    for field, value in changes.items():
        control(page, field).fill(str(value))
    assert_shows(page, preset("v3", n_dense_layers=0, **changes))


@pytest.mark.parametrize(
    ("fields", "attn"),
    [
        ({"qk_rope_head_dim": 63}, "mla"),
        ({"qk_nope_head_dim": 127}, "mha"),
        ({"n_kv_heads": 0}, "mla"),
        ({"dim": 0}, "mla"),
        ({"q_lora_rank": -1}, "mla"),
        ({"n_layers": -3}, "mla"),
    ],
)
def test_lab_refuses_what_config_refuses(site_page, fields, attn):
    page = site_page(f"{CHAPTER}.html")
    for field, value in fields.items():
        control(page, field).fill(str(value))
    assert shown(page, "refused") == refusal(attn=attn, **fields)
    assert not control(page, "path-mla").is_visible()
    control(page, "preset").select_option("nano")
    assert shown(page, "refused") == ""
    assert_shows(page, started_from("nano"))


@pytest.mark.parametrize("fields", [{"n_kv_heads": 3}, {"n_heads": 129, "n_kv_heads": 8}])
def test_lab_refuses_gqa_alone_where_groups_do_not_divide_the_heads(site_page, fields):
    page = site_page(f"{CHAPTER}.html")
    for field, value in fields.items():
        control(page, field).fill(str(value))
    assert shown(page, "refused") == refusal(attn="gqa", **fields)
    for column in ("cached", "bytes", "times", "parameters"):
        assert shown(page, f"gqa-{column}") == "–"
    assert_shows(page, preset("v3", **fields), kinds=("mla", "mha", "mqa"))
    control(page, "preset").select_option("v3")
    assert_shows(page, started_from("v3"))


@pytest.mark.parametrize(("typed", "told"), [("2.5", "2.5"), ("", "None")])
def test_lab_refuses_what_is_no_whole_number(site_page, typed, told):
    page = site_page(f"{CHAPTER}.html")
    control(page, "n_layers").fill(typed)  # the tests' type checker keeps this from Config
    assert shown(page, "refused") == f"n_layers must be an integer >= 1, got {told}"


def test_lab_by_touch_on_a_phone(touch_page):
    page = touch_page(f"{CHAPTER}.html")
    swipe(control(page, "n_heads"), 0.0)
    assert shown(page, "refused") == refusal(attn="gqa", n_heads=1, n_kv_heads=8)
    swipe(control(page, "n_heads"), 1.0)
    assert_shows(page, replace(started_from("v3"), n_heads=256))
    swipe(control(page, "rank"), 1.0)
    assert shown(page, "missing") == "0.00 %"
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for name in ("path-mla", "map-0"):
        box = control(page, name).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
    shot(page, "mla-lab-phone", full_page=True)


def test_lab_in_the_dark(site_page):
    page = site_page(f"{CHAPTER}.html", color_scheme="dark")
    control(page, "path-mla").scroll_into_view_if_needed()
    shot(page, "mla-lab-dark")
    ink = control(page, "path-mla").evaluate("e => getComputedStyle(e.querySelector('text')).fill")
    assert min(int(part) for part in ink.removeprefix("rgb(").rstrip(")").split(",")) > 120
