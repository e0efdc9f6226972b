"""The one bridge from Python to figures that a reader can drag: with no kernel, or with a live one.

`explore` puts the logic of `figures/<stem>.js` and numbers computed in Python into one piece of
HTML: alive in JupyterLab, in Colab, in the built page and from a file, with nothing to load.
`live` shows an ipywidget where there is a kernel, and says how to run it where there is none.
"""

import hashlib
import html
import json
from importlib import resources
from typing import Any


class Explorable:
    """A figure that the reader can drag with no Python behind it."""

    def __init__(self, script: str, data: dict[str, Any], alt: str):
        self.script, self.data, self.alt = script, data, alt

    def _repr_html_(self) -> str:
        # "</" would end the script; a NaN is no JSON
        data = json.dumps(self.data, sort_keys=True, allow_nan=False).replace("</", "<\\/")
        style = _figures_file("explorable.css")
        # a name from the content, not a random one: the same figure is the same bytes each time
        content = style + self.script + data + self.alt
        name = "mn-" + hashlib.sha256(content.encode()).hexdigest()[:12]
        return (
            f"<style>{style}</style>"
            f'<div class="mn-fig {name}" role="group" aria-label="{html.escape(self.alt)}">'
            f'<p class="mn-asleep">{html.escape(self.alt)} <em>This figure is asleep: run the '
            "cell above, or trust the notebook, and it can be dragged.</em></p></div>"
            f"<script>(() => {{\nconst data = {data};\n{self.script}\n"
            # JupyterLab may show one output twice: each copy is filled once
            f'for (const root of document.querySelectorAll(".{name}:not([data-live])")) {{'
            ' root.dataset.live = "1"; root.replaceChildren(); figure(root, data, ui); }'
            "})();</script>"
        )

    def __repr__(self) -> str:
        return f"Explorable({self.alt!r})"


class Live:
    """An ipywidget with a text for those who see the page and not a running notebook."""

    def __init__(self, widget: Any, alt: str):
        self.widget, self.alt = widget, alt

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        shown = dict(self.widget._repr_mimebundle_())
        note = "Run it live: open this chapter as a notebook and run the cell above."
        return shown | {
            "text/plain": repr(self),
            "text/html": f'<p class="mn-asleep">{html.escape(self.alt)} <em>{note}</em></p>',
        }

    def __repr__(self) -> str:
        return f"Live({self.alt!r})"


def explore(stem: str, data: dict[str, Any], alt: str) -> Explorable:
    """Return the interactive figure `figures/<stem>.js` over `data`, plain numbers for JSON.

    `alt` says in a sentence what it is and what can be changed. The script is the body of a
    function of `(root, data, ui)`: the element to fill, the data, the toolkit of explorable.js.
    ValueError where there is no such script, where `alt` is empty or `data` is no JSON.
    """
    _require_alt(alt)
    try:
        script = _figures_file(f"{stem}.js")
    except FileNotFoundError:
        raise ValueError(f"no interactive figure {stem!r}: figures/{stem}.js is missing") from None
    try:
        json.dumps(data, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"data of the figure {stem!r} must be plain JSON: {error}") from None
    toolkit = _figures_file("explorable.js").replace("COLOURS", json.dumps(_colours()))
    return Explorable(f"{toolkit}\nfunction figure(root, data, ui) {{\n{script}\n}}", data, alt)


def live(widget: Any, alt: str) -> Live:
    """Return an ipywidget for the end of a cell; ValueError where `alt` is empty."""
    _require_alt(alt)
    return Live(widget, alt)


def _require_alt(alt: str) -> None:
    if not alt.strip():
        raise ValueError("alt must say what the figure is and what can be changed, got nothing")


def _figures_file(name: str) -> str:
    return resources.files("figures").joinpath(name).read_text(encoding="utf-8")


def _colours() -> list[str]:
    from figures.style import COLOURS

    return COLOURS
