"""The map of the book: which chapter opens which file of the package, and where the report says it.

Read from the docstrings of the modules themselves, so that it cannot drift from them.
"""

import ast
import re
from importlib import resources
from typing import NamedTuple

CHAPTER = re.compile(r"book/(\d\d_\w+)\.ipynb")
REPORT = re.compile(r"DeepSeek-V3 \(arXiv:2412\.19437\),? ?([^;:]*)")


class Place(NamedTuple):
    """One module: the chapters that open it, its file, and the places in the report."""

    chapters: tuple[str, ...]
    module: str
    report: str

    def __str__(self) -> str:
        chapters = ", ".join(name.replace("_", " ") for name in self.chapters)
        return f"{chapters:<18} {self.module:<14} {self.report}"


def atlas() -> list[Place]:
    """Return a place for each module of minids that names a section of the report, in order."""
    places = []
    for file in resources.files("minids").iterdir():
        if file.name.endswith(".py"):
            doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
            label = {name: text for name, text in re.findall(r"^(Paper|Book) +(.*)$", doc, re.M)}
            report = REPORT.search(label.get("Paper", ""))
            if report and re.match("section|Eq", report[1]):
                chapters = tuple(CHAPTER.findall(label["Book"]))
                places.append(Place(chapters, file.name, report[1].strip(" .")))
    return sorted(places)
