"""Slides of a chapter, from its notebook: `make slides CH=04`, then open the file it names.

    python book/_tools/slides.py CHAPTER [--out FOLDER]

A section is a stack of slides, each as much as fits: text, code, output, figures that can be
dragged. Exercises show their statement alone. What cannot be read on a wall is left out: the
installation cell, the header's links. Lecture cards and plan are speaker notes (press S). The deck
needs no network and no server: reveal.js comes from sphinx-revealjs, MathJax from its wheel.
"""

import argparse
import base64
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from chapters import BOOK, chapter, stem_of
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from normalise import as_text
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

THEME = Path(__file__).parent / "slides_theme"
HEIGHT = 600  # of a slide's text, in the pixels of a 1280 x 720 screen; slides.js fits what is over
LINE, CODE_LINE, CHARACTERS = 38, 28, 88
WHOLE = HEIGHT  # a figure has a slide to itself
TOGETHER = 1.25 * HEIGHT  # a cell and its text, a formula and its sentence: rather small than apart
SKIPPED_ROWS = re.compile(r"\| \**(Open in|Package)")
SECTION = re.compile(r"[Ss]ections? (\d+)")
PAGE = MarkdownIt("commonmark").enable("table").use(dollarmath_plugin, double_inline=True)


@dataclass
class Block:
    """A piece that stays whole: MyST text, its height on the wall in pixels."""

    text: str
    height: int
    follows: bool = False  # belongs to the piece before it


@dataclass
class Section:
    """A heading and what follows it."""

    level: int
    title: str
    blocks: list[Block] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def slides(self) -> Iterator[list[Block]]:
        """Yield blocks slide by slide; a slide holds what fits, or one block that is larger."""
        slide: list[Block] = []
        for group in self.groups():
            if slide and sum(b.height for b in [*slide, *group]) > HEIGHT:
                yield slide
                slide = []
            slide += group
        yield slide

    def groups(self) -> list[list[Block]]:
        """Return blocks, each with what belongs to it and can be shown with it."""
        groups: list[list[Block]] = []
        for block in self.blocks:
            height = sum(b.height for b in groups[-1]) if groups else 0
            if groups and block.follows and height + block.height <= TOGETHER:
                groups[-1].append(block)
            else:
                groups.append([block])
        return groups


def pieces(source: str) -> Iterator[tuple[str, str]]:
    """Cut a markdown cell into (kind, lines): headings, paragraphs, tables, formulas, lists."""
    lines = source.splitlines()
    for token in PAGE.parse(source):
        if token.level == 0 and token.map and not token.type.endswith("_close"):
            yield token.type.removesuffix("_open"), "\n".join(lines[slice(*token.map)]).strip()


def unlinked(text: str) -> str:
    """Keep the words of links to files and other pages: a deck stands alone."""
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:)[^)]*\)", r"\1", text)


def prose(kind: str, text: str) -> Block:
    """Return a piece of prose with the height it takes."""
    if kind == "table":
        rows = [row for row in map(unlinked, text.splitlines()) if not SKIPPED_ROWS.match(row)]
        height = sum(LINE * 0.8 * (1 + len(row) // (CHARACTERS + 20)) + 10 for row in rows)
        return Block("\n".join(rows), int(height))
    if kind == "math_block":
        return Block(text, 90 + LINE * text.count(r"\\"), follows=True)
    long = (1 + len(line) // CHARACTERS for line in unlinked(text).split("\n- "))
    return Block(unlinked(text), LINE * sum(long) + 20)


def raw(html: str, height: int) -> Block:
    """Return HTML that goes to the slide as it is."""
    longest = max((len(ticks) for ticks in re.findall("`+", html)), default=0)
    fence = "`" * max(3, longest + 1)
    return Block(f"{fence}{{raw}} html\n{html}\n{fence}", height)


def code(source: str) -> Block:
    """Return highlighted code."""
    html = highlight(source, PythonLexer(), HtmlFormatter(cssclass="code"))
    return raw(html, CODE_LINE * (source.count("\n") + 1) + 30)


def output(out: dict[str, Any]) -> Block | None:
    """Return what a cell has shown: a figure, a table, text; None for what has no place here."""
    data = out.get("data", {})
    if "text/html" in data:
        html = as_text(data["text/html"])
        if html.startswith('<p class="mn-asleep">'):  # a widget that needs Python
            return raw(re.sub("<em>.*</em>", "Live with <code>make demo</code>.", html), 2 * LINE)
        return raw(html, WHOLE)
    for kind in ("image/svg+xml", "image/png"):
        if kind in data:
            picture = as_text(data[kind])
            if kind == "image/svg+xml":
                picture = base64.b64encode(picture.encode()).decode()
            return raw(f'<img alt="" src="data:{kind};base64,{picture.strip()}">', WHOLE)
    text = as_text(data.get("text/plain", out.get("text", ""))).rstrip()
    if not text:
        return None
    escaped = text.replace("&", "&amp;").replace("<", "&lt;")
    shown = raw(f'<pre class="output">{escaped}</pre>', CODE_LINE * (text.count("\n") + 1) + 20)
    return replace(shown, follows=True)


def of_cell(cell: dict[str, Any]) -> Iterator[Block]:
    """Yield the blocks of a code cell: its source, then its outputs."""
    tags, source = cell["metadata"].get("tags", []), as_text(cell["source"])
    if "remove-cell" in tags or re.search(r"^check\(", source, re.MULTILINE):
        return  # installation; an exercise to be typed in
    shown = [block for out in cell["outputs"] if (block := output(out)) is not None]
    only_shows = source.count("\n") < 3 and any(block.height == WHOLE for block in shown)
    if not only_shows and not {"hide-input", "remove-input"} & set(tags):
        yield code(source)
    yield from shown


def sections(notebook: dict[str, Any]) -> list[Section]:
    """Return the sections of a chapter in order; the first one is its title."""
    found: list[Section] = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            found[-1].blocks += of_cell(cell)
            continue
        for kind, text in pieces(as_text(cell["source"])):
            if kind == "heading":
                marks, title = text.split(" ", 1)
                found.append(Section(len(marks), unlinked(title)))
            else:
                found[-1].blocks.append(prose(kind, text))
    return found


def annotate(deck: list[Section], lecture: str) -> None:
    """Put the plan and each card into the notes of the section that it names, else of the title."""
    plan, *cards = re.split(r"^## Card: ", lecture.partition("## What goes wrong")[0], flags=re.M)
    deck[0].notes.append(plan.partition("## Plan")[2].partition("\n")[2])
    for card in cards:
        number = SECTION.search(card)
        place = next((s for s in deck if number and s.title.startswith(f"{number[1]}. ")), deck[0])
        place.notes.append(f"### Card: {card}")


def markdown(deck: list[Section]) -> str:
    """Return the deck as one MyST page for sphinx-revealjs."""
    text = []
    for section in deck:
        text.append(f"{'#' * section.level} {section.title}")
        if section.notes:
            notes = PAGE.render(unlinked("\n\n".join(section.notes)))
            text.append(raw(f'<aside class="notes">{notes}</aside>', 0).text)
        for number, slide in enumerate(section.slides()):
            if number:
                text.append("```{revealjs-break}\n```")
            text += [block.text for block in slide]
    return "\n\n".join(text) + "\n"


def settings(name: str, static: Path) -> dict[str, Any]:
    """Return Sphinx's settings of a deck."""
    return {
        "project": name,
        "extensions": ["myst_parser", "sphinx_revealjs", "book_mathjax", "book_equations"],
        "myst_enable_extensions": ["amsmath", "deflist", "dollarmath"],
        "myst_dmath_double_inline": True,
        "root_doc": name,
        "language": "en",
        # a slide that is not shown has no height to match
        "mathjax3_config": {"chtml": {"matchFontHeight": False}, "options": {"enableMenu": False}},
        "revealjs_static_path": [str(static)],
        "revealjs_style_theme": "slides.css",
        "revealjs_js_files": ["figures.js"],
        "revealjs_script_files": ["slides.js"],
        "revealjs_script_plugins": [
            {"src": "revealjs/plugin/notes/notes.js", "name": "RevealNotes"}
        ],
        "revealjs_script_conf": {
            "width": 1280, "height": 720, "margin": 0.03, "center": False, "hash": True,
            "navigationMode": "linear", "slideNumber": "c/t", "transition": "none",
        },
    }  # fmt: skip


def colours() -> str:
    """Return the colours of highlighted code, by day and by night."""
    day = HtmlFormatter(style="default").get_style_defs(".code")
    night = HtmlFormatter(style="github-dark").get_style_defs(".code")
    return f"{day}\n@media screen and (prefers-color-scheme: dark) {{\n{night}\n}}\n"


def build(notebook: Path, out: Path) -> Path:
    """Write the deck of a chapter into folder `out`, anew; return its page."""
    deck = sections(json.loads(notebook.read_text(encoding="utf-8")))
    lecture = notebook.parent / "teach" / f"{stem_of(notebook)}.md"
    if lecture.exists():
        annotate(deck, lecture.read_text(encoding="utf-8"))
    shutil.rmtree(out, ignore_errors=True)
    work = out.parent / f".{out.name}"
    shutil.copytree(THEME, work / "static", dirs_exist_ok=True)
    style = work / "static" / "slides.css"
    style.write_text(style.read_text(encoding="utf-8") + colours(), encoding="utf-8")
    (work / f"{notebook.stem}.md").write_text(markdown(deck), encoding="utf-8")
    chosen = settings(notebook.stem, work / "static")
    (work / "conf.py").write_text(
        f"import sys\nsys.path.insert(0, {str(BOOK / '_ext')!r})\nglobals().update({chosen!r})\n",
        encoding="utf-8",
    )
    folders = ["-d", str(work / "doctrees"), str(work), str(out)]
    sphinx = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "revealjs"]
    done = subprocess.run([*sphinx, *folders], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the slides of {notebook.name} cannot be built:\n{done.stderr}")
    shutil.rmtree(work)
    return out / f"{notebook.stem}.html"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 for a chapter that does not exist."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("chapter", nargs="?", default="")
    parser.add_argument("--out", type=Path, default=BOOK / "_build" / "slides")
    options = parser.parse_args(arguments)
    try:
        path = chapter(options.chapter)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    page = build(path, options.out.resolve() / path.stem)
    print(f"Slides of {path.name}: open\n  {page.as_uri()}")
    print(
        "Arrow keys or space to move, S for speaker notes, Esc for all slides, F for full screen."
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
