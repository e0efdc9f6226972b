"""The table of contents: the parts of the book, and in each the chapters that are written."""

import re
from pathlib import Path

from sphinx.application import Sphinx

# the first chapter of each part
PARTS = {
    "Start": 0,
    "Attention": 4,
    "Experts": 7,
    "More than one token": 9,
    "Fast and large": 11,
    "The whole": 14,
}
FURTHER = ["run", "glossary", "references", "errata", "teach/index"]
MARK = "<!-- chapters -->"


def part_of(chapter: int) -> str:
    """Return the part that a chapter belongs to."""
    return [part for part, first in PARTS.items() if first <= chapter][-1]


def contents(folder: Path) -> dict[str, list[str]]:
    """Return the pages of each part that has any, in reading order."""
    parts: dict[str, list[str]] = {}
    for path in sorted(folder.glob("[0-9][0-9]_*.ipynb")):
        parts.setdefault(part_of(int(path.stem[:2])), []).append(path.stem)
    parts["Beside the chapters"] = [name for name in FURTHER if (folder / f"{name}.md").exists()]
    return parts


def toctrees(parts: dict[str, list[str]]) -> str:
    """Return the parts as toctrees, which make the list on the page and the one at its side."""
    return "\n\n".join(
        "\n".join(["```{toctree}", f":caption: {part}", ":maxdepth: 1", "", *pages, "```"])
        for part, pages in parts.items()
    )


def fill(app: Sphinx, page: str, source: list[str]) -> None:
    """Put the table of contents where the first page says so."""
    if page == "index":
        text = toctrees(contents(Path(app.srcdir)))
        source[0] = re.sub(re.escape(MARK), lambda _: text, source[0])


def refresh(app: Sphinx, *_: object) -> list[str]:
    """Read the first page again whenever the set of pages has changed."""
    pages = [page for part in contents(Path(app.srcdir)).values() for page in part]
    changed = getattr(app.env, "book_pages", pages) != pages
    app.env.book_pages = pages
    return ["index"] if changed else []


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", fill)
    app.connect("env-get-outdated", refresh)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
