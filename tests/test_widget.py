"""The bridge to interactive figures: deterministic, self-contained HTML; refusals; live widgets."""

import json
import re

import pytest
from ipywidgets import IntSlider

from minids.learn import explore, live, widget

ALT = "A square whose side a slider moves"
SCRIPT = "root.append(ui.el('p', {}, String(data.side)));"
ASSET = re.compile(r"https?://(?!www\.w3\.org/2000/svg)")


@pytest.fixture
def planted(monkeypatch):
    """A figure `planted` beside the real toolkit and style."""
    real = widget._figures_file
    monkeypatch.setattr(
        widget, "_figures_file", lambda name: SCRIPT if name == "planted.js" else real(name)
    )


@pytest.mark.usefixtures("planted")
class TestExplore:
    def test_same_figure_is_the_same_bytes(self):
        first, second = (explore("planted", {"b": 1, "side": 2}, ALT) for _ in range(2))
        assert first._repr_html_() == second._repr_html_()
        swapped = explore("planted", {"side": 2, "b": 1}, ALT)
        assert swapped._repr_html_() == first._repr_html_()

    def test_other_data_or_text_is_another_figure(self):
        def name(data, alt=ALT):
            return re.search(r"mn-[0-9a-f]{12}", explore("planted", data, alt)._repr_html_())[0]

        assert len({name({"side": 2}), name({"side": 3}), name({"side": 2}, "other")}) == 3

    def test_text_is_there_for_ears_and_for_a_sleeping_figure(self):
        figure = explore("planted", {"side": 2}, 'a "quoted" <text>')
        page = figure._repr_html_()
        assert 'role="group" aria-label="a &quot;quoted&quot; &lt;text&gt;"' in page
        assert "This figure is asleep" in page
        assert repr(figure) == """Explorable('a "quoted" <text>')"""

    def test_data_cannot_end_the_script(self):
        page = explore("planted", {"side": "</script><b>"}, ALT)._repr_html_()
        assert page.count("</script>") == 1

    def test_nothing_is_asked_from_outside(self):
        assert not ASSET.search(explore("planted", {"side": 2}, ALT)._repr_html_())

    @pytest.mark.parametrize("data", [{"x": float("nan")}, {"x": object()}, {"x": {1, 2}}])
    def test_data_that_is_no_json_is_refused(self, data):
        with pytest.raises(ValueError, match="data of the figure 'planted' must be plain JSON"):
            explore("planted", data, ALT)

    @pytest.mark.parametrize("show", [lambda alt: explore("planted", {}, alt),
                                      lambda alt: live(IntSlider(), alt)])  # fmt: skip
    def test_text_is_required(self, show):
        with pytest.raises(ValueError, match="alt must say what the figure is"):
            show(" ")


def test_unknown_figure_names_the_missing_file():
    with pytest.raises(ValueError, match=r"figures/none\.js is missing"):
        explore("none", {}, ALT)


def test_live_widget_has_a_text_beside_it():
    shown = live(IntSlider(), "A slider")._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in shown
    assert shown["text/plain"] == "Live('A slider')"
    assert "Run it live" in shown["text/html"]


# ---- the toolkit, in a browser ----

TOOLKIT = """
const box = ui.controls(root);
const side = ui.slider(box, { label: "Side of it", min: 1, max: 64, step: 1, value: 8 });
const wide = ui.slider(box, { label: "wide", min: 1, max: 1024, value: 16, log: true });
const exact = ui.number(box, { label: "exact", min: 0, max: 9, value: 3 });
const kinds = [["a", "first"], ["b", "second"]];
const kind = ui.choice(box, { label: "kind", options: kinds, value: "b" });
const on = ui.toggle(box, { label: "on", value: true });
const again = ui.button(box, { label: "again" });
const area = ui.readout(root, { name: "area", label: "area" });
const all = ui.readout(root, { label: "All of them" });
const plot = ui.plot(root, { width: 600, height: 80, name: "square", alt: "a square" });
const rect = ui.svg("rect", { height: 50, fill: ui.colours[0] });
plot.append(rect);
let clicks = 0;
again.addEventListener("click", () => { clicks += 1; side.current = 8; draw(); });
function draw() {
  area.textContent = ui.comma(side.current ** 2);
  all.textContent = [wide.current, exact.current, kind.current, on.current, clicks].join(" ");
  rect.setAttribute("width", side.current * 8);
}
ui.on([side, wide, exact, kind, on], draw);
window.formats = data.numbers.map((n) => [ui.short(n), ui.comma(n), ui.bytes(n)]);
"""
NUMBERS = [7, 1536, 70_272, 671_026_419_200, 14.8e12, 0.25]


@pytest.fixture
def shown(monkeypatch, tmp_path, visitor):
    """The toolkit's controls on a page of their own, opened twice in it as JupyterLab may do."""
    real = widget._figures_file
    monkeypatch.setattr(
        widget, "_figures_file", lambda name: TOOLKIT if name == "planted.js" else real(name)
    )
    page_file = tmp_path / "page.html"
    body = explore("planted", {"numbers": NUMBERS}, ALT)._repr_html_()
    page_file.write_text(f'<!doctype html><meta charset="utf-8"><body>{body}{body}</body>')
    return visitor.open(page_file.as_uri())


def control(page, name):
    return page.locator(f"[data-name={name}]").first


def test_toolkit_by_mouse_keys_and_choice(shown):
    assert shown.locator(".mn-fig").count() == 2
    assert shown.locator(".mn-asleep").count() == 0
    assert control(shown, "area").inner_text() == "64"
    assert control(shown, "all-of-them").inner_text() == "16 3 b true 0"
    slider = control(shown, "side-of-it")
    slider.focus()
    shown.keyboard.press("ArrowRight")
    assert control(shown, "area").inner_text() == "81"
    assert slider.get_attribute("aria-valuetext") == "9"
    box = slider.bounding_box()
    shown.mouse.click(box["x"] + box["width"] - 1, box["y"] + box["height"] / 2)
    assert control(shown, "area").inner_text() == "4,096"
    control(shown, "wide").fill("10")
    control(shown, "exact").fill("5")
    control(shown, "kind").select_option("a")
    control(shown, "on").uncheck()
    assert control(shown, "all-of-them").inner_text() == "1024 5 a false 0"
    control(shown, "again").click()
    assert control(shown, "all-of-them").inner_text() == "1024 5 a false 1"
    assert control(shown, "area").inner_text() == "64"
    # the second copy is a figure of its own
    assert shown.locator("[data-name=area]").last.inner_text() == "64"


def test_toolkit_writes_numbers_as_count_does(shown):
    from minids.count import binary, short

    for number, (as_short, as_comma, as_bytes) in zip(
        NUMBERS, json.loads(shown.evaluate("JSON.stringify(window.formats)")), strict=True
    ):
        assert as_short == short(number)
        assert as_comma == f"{number:,}".removesuffix(".0")
        assert number < 1 or as_bytes == binary(int(number))


def test_toolkit_on_a_phone_has_no_sideways_scroll(shown):
    shown.set_viewport_size({"width": 390, "height": 800})
    assert shown.evaluate("document.documentElement.scrollWidth") <= 390
