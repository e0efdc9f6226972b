"""figures/style.py: readable on light and dark pages, and the same bytes twice."""

import re

import matplotlib as mpl
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from figures import style

PAGES = {"light": "#ffffff", "dark": "#121212"}  # sphinx-book-theme's backgrounds
CONTRAST = 3.0  # what WCAG 2.1, 1.4.11 asks of graphical objects


def luminance(colour: str) -> float:
    """Return the relative luminance of WCAG 2.1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def draw() -> Figure:
    with style.context():
        fig = Figure(figsize=(3, 2))
        ax = fig.subplots()
        ax.plot([0, 1, 2], [1, 0, 2], label="line")
        ax.legend()
    return fig


def test_contrast_by_hand():
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("colour", [*style.COLOURS, style.INK])
def test_colours_are_seen_on_both_pages(colour, page):
    assert contrast(colour, PAGES[page]) >= CONTRAST


def test_same_bytes_twice_without_date_or_background(tmp_path):
    for name in ("one", "two"):
        style.save(draw(), tmp_path / f"{name}.svg")
    svg = (tmp_path / "one.svg").read_bytes()
    assert svg == (tmp_path / "two.svg").read_bytes()
    assert b"dc:date" not in svg
    assert b"#ffffff" not in svg


def test_style_leaves_no_trace():
    before = {key: mpl.rcParams[key] for key in style._RC}
    style.render(draw())
    assert {key: mpl.rcParams[key] for key in style._RC} == before


def test_show_carries_its_text():
    picture = style.show(draw(), 'a line, "bent"')
    assert re.match(r'<img alt="a line, &quot;bent&quot;" src="data:', picture._repr_html_())
    assert repr(picture) == "Picture('a line, \"bent\"')"
    with pytest.raises(ValueError, match="alt must say"):
        style.show(draw(), " ")


def test_save_refuses_other_formats(tmp_path):
    with pytest.raises(ValueError, match=r"saved as \.svg"):
        style.save(draw(), tmp_path / "a.png")
