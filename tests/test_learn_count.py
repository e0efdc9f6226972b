"""Chapter 01's figures draw what minids counts; the sizer has every field that decides a count."""

from dataclasses import asdict, fields

import pytest
import torch
from matplotlib.text import Text

from figures import count as figures
from figures import style
from minids import check
from minids.config import Config, preset
from minids.count import count
from minids.learn.check import find
from minids.learn.exercises import count as exercises

V3 = preset("v3")


def test_cut_by_hand():
    boxes = figures.cut({"a": 1, "b": 2, "c": 1}, 0, 0, 4, 2)
    assert boxes == [("b", 0, 0, 2, 2), ("a", 2, 0, 1, 2), ("c", 3, 0, 1, 2)]


def test_cut_keeps_areas_and_fills_the_rectangle():
    values = {name: used for name, (_, used) in figures.grouped(count(V3), V3).items()}
    boxes = figures.cut(values, 0, 0, 1.2, 1)
    for box in boxes:
        share = values[box.name] / sum(values.values())
        assert box.width * box.height / 1.2 == pytest.approx(share)
        assert 0 <= box.x <= box.x + box.width <= 1.2 + 1e-12
        assert 0 <= box.y <= box.y + box.height <= 1 + 1e-12


def test_an_empty_part_has_no_area():
    boxes = figures.cut({"a": 3, "none": 0}, 0, 0, 2, 1)
    assert [box.width * box.height for box in boxes] == [2, 0]


@pytest.mark.parametrize(
    ("figure", "interval"), [("37", (36.5, 37.5)), ("36.7", (36.65, 36.75)), ("2.4", (2.35, 2.45))]
)
def test_what_a_figure_can_stand_for(figure, interval):
    assert figures.rounds_to(figure) == pytest.approx(interval)


def test_conventions_that_published_figures_fit():
    """What the figure shows and section 7 concludes."""
    fits = {}
    for name, published in figures.PUBLISHED.items():
        for figure in published:
            low, high = figures.rounds_to(figure)
            active = count(preset(name)).active.items()
            fits[figure] = [convention for convention, n in active if low <= n / 1e9 < high]
    assert fits == {
        "37": ["with head"], "36.7": [], "36.6": ["with head"],
        "21": ["with head", "with both tables"], "2.4": [],
    }  # fmt: skip
    assert 2.45e9 < count(preset("v2_lite")).active["with head"] < 2.5e9  # 2.4 if cut off


@pytest.mark.slow
@pytest.mark.parametrize("name", ["draw_treemap", "draw_active", "draw_flops"])
def test_figures_are_the_same_bytes_twice(name):
    draw = getattr(figures, name)
    assert style.render(draw()) == style.render(draw())


def test_flops_figure_shows_the_counts():
    (ax,) = figures.draw_flops().axes
    shown = [text.get_text() for text in ax.texts]
    assert shown == ["matrices, 6ND", "attention", "4K: 250, attention 12%",
                     "32K: 465, attention 53%", "128K: 1,202, attention 82%"]  # fmt: skip
    (curve,) = ax.collections[1].get_paths()
    assert len(curve.vertices) > 200  # on a logarithmic axis few points make corners


@pytest.mark.parametrize("name", ["draw_treemap", "draw_active", "draw_flops"])
def test_letters_stay_readable_on_a_phone(name):
    """A page for a phone is 358 px wide; a picture of 5 inches shrinks to it by a quarter."""
    fig = getattr(figures, name)()
    shrunk = min(1, 358 / (96 * fig.get_figwidth()))
    shown = [text for text in fig.findobj(Text) if text.get_visible() and text.get_text()]
    assert min(text.get_fontsize() for text in shown) * 96 / 72 * shrunk > 9


def test_sizer_has_every_field_that_decides_a_count():
    """Changing a field that it leaves out changes nothing that is counted."""
    data = figures.widget().data
    shown = {field["name"] for field in data["config"]}
    left_out = {field.name for field in fields(Config)} - shown - {"original_seq_len"}
    other = {"score_func": "softmax", "group_score": "max", "precision": "bf16", "norm_topk": False,
             "scale_fmt": "ue8m0"}  # fmt: skip
    for name in left_out:
        value = other.get(name, getattr(V3, name))
        changed = preset("v3", **{name: value if name in other else value + 1})
        assert changed != V3
        assert count(changed) == count(V3), name
    assert {name: set(values) for name, values in data["presets"].items()} == {
        name: shown | {"seq_len"} for name in ("v3", "v2", "v2_lite", "small", "nano")
    }


def test_sizer_is_the_same_twice():
    assert figures.widget()._repr_html_() == figures.widget()._repr_html_()
    assert repr(figures.widget()).startswith("Explorable('Model sizer")


@pytest.mark.parametrize(
    ("which", "answer", "told"),
    [
        ("count.1", "6", "enough must be a whole number, got '6'"),
        ("count.2", lambda cfg: None, "gave None, expected a number: is a `return` missing?"),
        ("count.2", lambda cfg: [306], "gave [306], expected a number."),
        ("count.3", lambda cfg, figure: None, "gave None, expected {'with head'}: is a `return`"),
        ("count.3", lambda cfg, figure: "with head", "gave 'with head', expected {'with head'}"),
        ("count.4", lambda cfg, batch, context: torch.ones(3), "expected a number."),
        ("count.6", lambda cfg, tokens, tflops, usd: 5.0, "must return a pair of numbers"),
        ("count.6", lambda cfg, tokens, tflops, usd: "ab", "must return a pair of numbers"),
    ],
)
def test_answers_of_a_wrong_kind_are_told_so(which, answer, told):
    """And not what the check raised when it computed with them."""
    verdict = check(which, answer)
    assert not verdict
    assert told in repr(verdict)
    assert "raised" not in repr(verdict)


def test_lists_are_as_good_as_sets_and_pairs():
    assert check("count.3", lambda *given: sorted(solved("count.3", "conventions")(*given)))
    assert check("count.6", lambda *given: list(solved("count.6", "cost")(*given)))


def solved(which, name):
    defined = {}
    exec(find(which).solution, defined)
    return defined[name]


def test_an_moe_layer_of_the_exercises():
    expert = 3 * 7168 * 2048
    layer = 257 * expert + 256 * 7169 + 2 * 7168 + 187_107_328
    assert exercises.moe_layer() == layer
    assert exercises.best_experts(8, exercises.share_of(V3)) == 256
    assert asdict(V3)["n_routed_experts"] == 256
