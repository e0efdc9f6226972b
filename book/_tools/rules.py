"""The form of a chapter and of its lecture page, as rules; each yields what breaks it.

    python book/_tools/rules.py [book/04_mla.ipynb book/teach/mla.md ...]

Without files: every chapter and every lecture page. Exits 1 where a rule is broken.
"""

import argparse
import ast
import json
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

from repository import repository

BOOK = Path(__file__).resolve().parents[1]
MAX_BYTES, CELLS, WIDTH, EXERCISES, CARDS = 500_000, (40, 70), 88, 5, 3
CODE_LINES = {"median": 6, "nine in ten": 20, "all": 40}
PROSE_WORDS = (30, 60)  # a cell, on average
READING = {"words a minute": 200, "minutes a code cell": 0.5, "factor": 1.6}
IGNORED, MAX_IGNORED = "nbval-ignore-output", 0.4
TAGS = {IGNORED, "hide-input", "hide-output", "raises-exception", "remove-cell"}
BOX = ["Goals", "Know first", "Time", "Report", "Package", "Open in"]
TIME = re.compile(r"(\d+) min to read, (\d+) s to run on two CPU cores")
LAST_SECTIONS = ["Exercises", "Mistakes others make", "On one GPU", "Where to go from here"]
PLAN = ["minutes", "what", "where in the chapter"]
LABELS = ["Question.", "Predict.", "Change.", "Surprise.", "Minutes."]
MYST = {
    r"^\s*:{3,}": "a colon fence",
    r"^\s*`{3,}\s*\{": "a directive",
    r"\{[a-z][a-z:-]*\}`": "a role",
    r"^\([\w-]+\)=\s*$": "a label",
    r"\[\^[\w-]+\]": "a footnote",
}
MACHINE_PATH = re.compile(r"(?<![\w:/.])(?:/(?:tmp|root|home|work|Users|var)/|[A-Z]:\\\\)\S*")


class Chapter:
    """A notebook, cut into what the rules look at."""

    def __init__(self, path: Path):
        self.path = path
        self.number, _, self.stem = path.stem.partition("_")
        self.cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        self.code = [cell for cell in self.cells if cell["cell_type"] == "code"]
        self.prose = [source(c) for c in self.cells if c["cell_type"] == "markdown"]
        self.text = "\n\n".join(self.prose)

    @cached_property
    def headings(self) -> list[tuple[int, str]]:
        """Return level and text of each heading, in order."""
        found = re.findall(r"^(#+) +(.*?)\s*$", without_code(self.text), re.MULTILINE)
        return [(len(marks), text) for marks, text in found]

    @cached_property
    def box(self) -> dict[str, str]:
        """Return the rows of the header box."""
        rows = re.findall(r"^\|([^|]*)\|(.*)\|\s*$", self.prose[0] if self.prose else "", re.M)
        return {a.strip(" *"): b.strip() for a, b in rows if not set(a + b) <= set("|:- ")}


def source(cell: dict[str, Any]) -> str:
    """Return the text of a cell; nbformat allows a string and a list of lines."""
    return "".join(cell["source"])


def first_line(cell: dict[str, Any]) -> str:
    """Return what a reader finds a cell by."""
    return f"'{source(cell).strip().splitlines()[0]}'" if source(cell).strip() else "(empty)"


def tags(cell: dict[str, Any]) -> list[str]:
    """Return the tags of a cell."""
    return cell["metadata"].get("tags", [])


def parsed(cell: dict[str, Any]) -> list[ast.stmt]:
    """Return the statements of a code cell, IPython's own lines left out."""
    return ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", source(cell), flags=re.M)).body


def without_code(text: str) -> str:
    """Return markdown without fenced and inline code."""
    text = re.sub(r"^(`{3,}|~{3,}).*?^\1\s*$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", text)


def words(text: str) -> int:
    """Count the words of running text: no tables, displayed equations or blocks of code."""
    text = re.sub(r"^(`{3,}|~{3,}).*?^\1\s*$|\$\$.*?\$\$", "", text, flags=re.M | re.DOTALL)
    return len(re.sub(r"^\s*\|.*$", "", text, flags=re.MULTILINE).split())


def colab_cell(root: Path = BOOK.parent) -> str:
    """Return the second cell of every chapter; its pip command is run by tests/test_colab.py."""
    return (
        "# Colab alone needs this; elsewhere the cell does nothing\n"
        "import sys\n\n"
        'if "google.colab" in sys.modules:\n'
        f'    %pip install -q "minids[figures] @ git+{repository(root)}@main"'
    )


# The rules of a chapter. A rule takes a Chapter and yields what breaks it.


def begins_with_the_header_box(chapter: Chapter) -> Iterator[str]:
    first = chapter.prose[0] if chapter.cells[0]["cell_type"] == "markdown" else ""
    if not re.match(rf"# {chapter.number} \w.+\n\n\w", first):
        yield f"the first cell must begin '# {chapter.number} Name: ...' and ask the question"
    if not re.search(r"^\| +\| +\|\n\|[-:]+\|[-:]+\|$", first, re.MULTILINE):
        yield "the header box must be a table that begins with | | |"
    if list(chapter.box) != BOX:
        yield f"the rows of the header box must be {BOX}, got {list(chapter.box)}"
    address = repository().removeprefix("https://github.com/")
    colab = f"https://colab.research.google.com/github/{address}/blob/main/book/{chapter.path.name}"
    badge = f"[![Open in Colab](_static/colab.svg)]({colab})"
    if not chapter.box.get("Open in", "").startswith(badge):
        yield f"the row 'Open in' must begin {badge}"


def says_how_long_it_takes(chapter: Chapter) -> Iterator[str]:
    time = TIME.fullmatch(chapter.box.get("Time", ""))
    if time is None:
        yield "the row 'Time' must read 'N min to read, M s to run on two CPU cores'"
        return
    minutes = sum(map(words, chapter.prose)) / READING["words a minute"]
    minutes += len(chapter.code) * READING["minutes a code cell"]
    if not 1 / READING["factor"] <= int(time[1]) / minutes <= READING["factor"]:
        yield f"{time[1]} min to read: by words and code cells it is {minutes:.0f}"


def installs_itself_on_colab(chapter: Chapter) -> Iterator[str]:
    second = chapter.cells[1] if len(chapter.cells) > 1 else {"source": "", "metadata": {}}
    if source(second) != colab_cell():
        yield f"the second cell must read\n{colab_cell()}"
    if tags(second) != ["remove-cell"]:
        yield f"the second cell must be tagged remove-cell alone, got {tags(second)}"


def has_cells_of_a_size(chapter: Chapter) -> Iterator[str]:
    low, high = CELLS
    if not low <= len(chapter.cells) <= high:
        yield f"{len(chapter.cells)} cells, must be {low} to {high}"
    lines = sorted(len(source(cell).splitlines()) for cell in chapter.code)
    found = {
        "median": median(lines), "nine in ten": lines[int(0.9 * (len(lines) - 1))],
        "all": lines[-1],
    }  # fmt: skip
    for what, limit in CODE_LINES.items():
        if found[what] > limit:
            yield f"lines of code a cell, {what}: {found[what]}, must be at most {limit}"
    for cell in chapter.code:
        for line in source(cell).splitlines():
            if len(line) > WIDTH and cell is not chapter.cells[1]:
                yield f"a line of code is {len(line)} wide, more than {WIDTH}: {line}"


def has_prose_of_a_length(chapter: Chapter) -> Iterator[str]:
    low, high = PROSE_WORDS
    if not low <= (found := mean(map(words, chapter.prose))) <= high:
        yield f"{found:.0f} words a cell of text on average, must be {low} to {high}"


def shows_something_in_every_cell(chapter: Chapter) -> Iterator[str]:
    for number, cell in enumerate(chapter.cells):
        if cell["cell_type"] != "code" or cell["outputs"] or number == 1:
            continue
        defines = ast.FunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom
        if not isinstance([None, *parsed(cell)][-1], defines):
            yield f"cell {number + 1} shows nothing: {first_line(cell)}"


def outputs_are_clean(chapter: Chapter) -> Iterator[str]:
    for cell in chapter.code:
        for output in cell["outputs"]:
            if output["output_type"] == "error" or output.get("name") == "stderr":
                yield f"an error or a warning is kept as output of: {first_line(cell)}"
            data = output.get("data", {})
            shown = ["".join(output.get("text", ""))]
            shown += ["".join(text) for kind, text in data.items() if kind.startswith("text/")]
            for text in shown:
                text = re.sub(r"base64,[\w+/=]*", "", text)
                if found := MACHINE_PATH.search(text):
                    yield f"a path of one machine is kept as output: {found[0][:80]}"


def headings_do_not_jump(chapter: Chapter) -> Iterator[str]:
    levels = [level for level, _ in chapter.headings]
    if levels[:1] != [1] or levels.count(1) != 1:
        yield "there must be one heading of level 1, and it comes first"
    for (before, _), (level, text) in pairwise(chapter.headings):
        if level > before + 1:
            yield f"the heading '{text}' jumps from level {before} to {level}"


def ends_with_the_same_sections(chapter: Chapter) -> Iterator[str]:
    sections = [text for level, text in chapter.headings if level == 2]
    if (last := sections[-len(LAST_SECTIONS) :]) != LAST_SECTIONS:
        yield f"the last sections must be {LAST_SECTIONS}, got {last}"
    section = re.search(r"^## Mistakes others make\n(.*?)^## ", chapter.text, re.M | re.DOTALL)
    if section and "](https://" not in section[1]:
        yield "'Mistakes others make' must link to where they were seen"


def poses_exercises(chapter: Chapter) -> Iterator[str]:
    found = []
    for cell, after in pairwise(chapter.cells):
        title = re.match(r"### Exercise ([\w.]+): \S", source(cell))
        if cell["cell_type"] != "markdown" or title is None:
            continue
        found.append(title[1])
        call = rf'\ncheck\("{re.escape(title[1])}", \w+\)\s*\Z'
        if after["cell_type"] != "code" or not re.search(call, source(after)):
            yield f'after exercise {title[1]} comes its start, ending check("{title[1]}", ...)'
    if found != [f"{chapter.stem}.{n}" for n in range(1, len(found) + 1)]:
        yield f"exercises must be {chapter.stem}.1, {chapter.stem}.2, ... in order, got {found}"


def poses_enough_exercises(chapter: Chapter) -> Iterator[str]:
    found = [text for _, text in chapter.headings if text.startswith("Exercise ")]
    if len(found) < EXERCISES:
        yield f"{len(found)} exercises, must be {EXERCISES} or more"


def is_plain_commonmark(chapter: Chapter) -> Iterator[str]:
    for text in chapter.prose:
        for mark, name in MYST.items():
            if found := re.search(mark, text, re.MULTILINE):
                yield f"{name} is shown as it is by JupyterLab and Colab: {found[0]}"
        if found := re.search(r"^( *<[a-z].*)$", without_code(text), re.MULTILINE):
            yield f"raw HTML: {found[0]}"


def dollars_are_mathematics(chapter: Chapter) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", without_code(chapter.text)):
        inline = re.sub(r"\$\$.*?\$\$", "", paragraph, flags=re.DOTALL).replace(r"\$", "")
        if inline.count("$") % 2:
            yield f"a $ without its twin; money is written \\$: {paragraph[:80]}"
        for formula in re.findall(r"\$([^$]+)\$", inline):
            letters = re.sub(r"\\(text|mathrm|operatorname)\{[^}]*\}|\\[a-zA-Z]+", "", formula)
            money = re.search(r"^\d[\d.,]*\s?[A-Za-z]*[,;.]?\s+[a-z]{2,}\b", formula)
            if money or re.search(r"[a-z]{3,},? [a-z]{2,}", letters):
                yield f"words between two $: {formula[:80]}"


def equations_are_numbered_in_order(chapter: Chapter) -> Iterator[str]:
    found = re.findall(r"\\tag\{([^}]*)\}", chapter.text)
    if found != [f"{int(chapter.number)}.{n}" for n in range(1, len(found) + 1)]:
        yield f"equations must be tagged {int(chapter.number)}.1, ... in order, got {found}"


def links_lead_somewhere(chapter: Chapter) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(chapter.text)):
        if re.match(r"https?://|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        if not (chapter.path.parent / name).exists():
            yield f"the link {target} leads nowhere"
        if anchor and name.endswith((".ipynb", "")) and not name.endswith(".md"):
            yield f"{target}: page and JupyterLab spell anchors of notebooks differently"


def pictures_have_a_text(chapter: Chapter) -> Iterator[str]:
    for text in re.findall(r"!\[([^\]]*)\]\(", chapter.text):
        if not text.strip():
            yield "a picture in the text has no description: ![what is to be seen](...)"
    for cell in chapter.code:
        for output in cell["outputs"]:
            data = output.get("data", {})
            if any(kind.startswith("image/") for kind in data):
                yield f"a bare picture: show it with style.show(fig, alt=...): {first_line(cell)}"
            for tag in re.findall(r"<img\b[^>]*>", "".join(data.get("text/html", ""))):
                if not re.search(r"\balt=(\"\s*[^\"\s]|'\s*[^'\s])", tag):
                    yield f"a picture without alt: {first_line(cell)}"


def outputs_are_compared(chapter: Chapter) -> Iterator[str]:
    ignored = [cell for cell in chapter.code if IGNORED in tags(cell)]
    if len(ignored) > MAX_IGNORED * len(chapter.code):
        yield f"{len(ignored)} of {len(chapter.code)} code cells are tagged {IGNORED}"
    for cell in ignored:
        nodes = [node for line in parsed(cell) for node in ast.walk(line)]
        if not any(isinstance(node, ast.Assert) for node in nodes):
            yield f"a cell tagged {IGNORED} must assert what matters: {first_line(cell)}"
    for cell in chapter.code:
        if not cell["execution_count"]:
            yield f"a cell that was never run is never compared: {first_line(cell)}"
        if set(tags(cell)) - TAGS:
            yield f"unknown tags {sorted(set(tags(cell)) - TAGS)}, must be of {sorted(TAGS)}"
        if found := re.search(r"#\s*(NBVAL|PYTEST_VALIDATE)\w+", source(cell)):
            yield f"readers see comments: use a tag in place of '{found[0]}'"


def is_small(chapter: Chapter) -> Iterator[str]:
    if (size := chapter.path.stat().st_size) >= MAX_BYTES:
        yield f"{size:,} bytes, must be less than {MAX_BYTES:,}"


CHAPTER_RULES: list[Callable[[Chapter], Iterator[str]]] = [
    begins_with_the_header_box,
    says_how_long_it_takes,
    installs_itself_on_colab,
    has_cells_of_a_size,
    has_prose_of_a_length,
    shows_something_in_every_cell,
    outputs_are_clean,
    headings_do_not_jump,
    ends_with_the_same_sections,
    poses_exercises,
    poses_enough_exercises,
    is_plain_commonmark,
    dollars_are_mathematics,
    equations_are_numbered_in_order,
    links_lead_somewhere,
    pictures_have_a_text,
    outputs_are_compared,
    is_small,
]
# a rule that a chapter need not keep, with the reason
EXCEPTIONS: dict[str, dict[Callable[[Chapter], Iterator[str]], str]] = {
    "start": {poses_enough_exercises: "two, to warm up"}
}


# The rules of a lecture page. A rule takes its text and its stem and yields what breaks it.


def sections(text: str) -> list[tuple[str, str]]:
    """Return heading and body of each section of level 2."""
    return re.findall(r"^## +(.*?)\s*\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)


def lecture_has_its_sections(text: str, stem: str) -> Iterator[str]:
    if not re.match(r"# Teaching \d\d: \S", text):
        yield "the page must begin '# Teaching NN: Name'"
    names = [name for name, _ in sections(text)]
    cards = [name for name in names if name.startswith("Card: ")]
    if names != ["Plan for 50 minutes", *cards, "What goes wrong in class"]:
        yield f"the sections must be the plan, the cards, 'What goes wrong in class', got {names}"
    if len(cards) < CARDS or len(set(cards)) < len(cards):
        yield f"{len(cards)} cards, must be {CARDS} or more, each with its own name"


def lecture_takes_50_minutes(text: str, stem: str) -> Iterator[str]:
    plan = dict(sections(text)).get("Plan for 50 minutes", "")
    rows = [line.strip("| ").split("|") for line in plan.splitlines() if line.startswith("|")]
    if not rows or [cell.strip() for cell in rows[0]] != [
        "minutes",
        "what",
        "where in the chapter",
    ]:
        yield "the plan must be a table: minutes | what | where in the chapter"
        return
    minutes = [row[0].strip() for row in rows[2:]]
    if not all(text.isdigit() for text in minutes) or sum(map(int, minutes)) != 50:
        yield f"the minutes must be whole and sum to 50, got {minutes}"
    if any(len(row) != len(PLAN) or not all(row) for row in rows[2:]):
        yield "each row of the plan must say minutes, what, and where in the chapter"


def lecture_cards_are_complete(text: str, stem: str) -> Iterator[str]:
    for name, body in sections(text):
        if not name.startswith("Card: "):
            continue
        paragraphs = [part for part in re.split(r"\n\s*\n", body.strip()) if part]
        labels = re.findall(r"^\*\*([A-Z]\w+\.)\*\* \S", body, re.MULTILINE)
        if labels != LABELS or len(paragraphs) != len(LABELS):
            yield f"{name}: must be {LABELS}, a paragraph each, got {labels}"
        if not re.search(r"^\*\*Minutes\.\*\* \d+(?![\d.–-]*\d)", body, re.MULTILINE):
            yield f"{name}: Minutes must begin with one whole number"


LECTURE_RULES = [lecture_has_its_sections, lecture_takes_50_minutes, lecture_cards_are_complete]


def broken(path: Path) -> Iterator[str]:
    """Yield what breaks the rules of a chapter (.ipynb) or of a lecture page (.md)."""
    if path.suffix == ".md":
        text = path.read_text(encoding="utf-8")
        for lecture_rule in LECTURE_RULES:
            yield from lecture_rule(text, path.stem)
        return
    chapter = Chapter(path)
    for rule in CHAPTER_RULES:
        if rule not in EXCEPTIONS.get(chapter.stem, {}):
            yield from rule(chapter)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 where a rule is broken."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    lectures = [path for path in (BOOK / "teach").glob("*.md") if path.stem != "index"]
    every = sorted(BOOK.glob("*.ipynb")) + sorted(lectures)
    found = [
        f"{path.name}: {text}"
        for path in parser.parse_args(arguments).files or every
        for text in broken(path)
    ]
    print(*found, sep="\n", end="\n" if found else "")
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
