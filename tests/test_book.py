"""The form of every chapter and lecture page, rule by rule; each is shown to fail where broken."""

import base64
import json
import re
from pathlib import Path

import normalise
import pytest
import rules
from repository import repository

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "book").glob("*.ipynb"))
LECTURES = sorted(
    path for path in (ROOT / "book/teach").glob("*.md") if path.stem != "index"
)  # fmt: skip


def name(value: object) -> str | None:
    """Return how a test is called after a rule or a file; pytest numbers the rest."""
    return getattr(value, "__name__", getattr(value, "name", None))


def rule_holds(rule, chapter: rules.Chapter) -> list[str]:
    return [] if rule in rules.EXCEPTIONS.get(chapter.stem, {}) else list(rule(chapter))


@pytest.mark.parametrize("rule", rules.CHAPTER_RULES, ids=name)
@pytest.mark.parametrize("path", CHAPTERS, ids=name)
def test_chapter(path, rule):
    assert rule_holds(rule, rules.Chapter(path)) == []


@pytest.mark.parametrize("path", CHAPTERS, ids=name)
def test_chapter_is_in_normal_form(path):
    text = path.read_text(encoding="utf-8")
    assert text == normalise.to_text(normalise.normalise(json.loads(text)))


@pytest.mark.parametrize("rule", rules.LECTURE_RULES, ids=name)
@pytest.mark.parametrize("path", LECTURES, ids=name)
def test_lecture_page(path, rule):
    assert list(rule(path.read_text(encoding="utf-8"), path.stem)) == []


@pytest.mark.skipif(
    not (ROOT / "book/teach").exists(), reason="NOT RUN: a students' copy has no lecture pages"
)
def test_every_chapter_has_a_lecture_page():
    stems = {path.stem.partition("_")[2] for path in CHAPTERS}
    assert {path.stem for path in LECTURES} == stems


@pytest.mark.parametrize("stem", rules.EXCEPTIONS)
def test_exceptions_are_still_needed(stem):
    (path,) = (ROOT / "book").glob(f"[0-9][0-9]_{stem}.ipynb")
    for rule, reason in rules.EXCEPTIONS[stem].items():
        assert list(rule(rules.Chapter(path))), f"{rule.__name__} holds without an exception"
        assert reason


# A chapter that keeps every rule, and what breaks each of them


def markdown(text):
    return {"cell_type": "markdown", "metadata": {}, "source": text}


def code(text, *outputs, tags=(), count=1):
    return {
        "cell_type": "code", "metadata": {"tags": list(tags)} if tags else {}, "source": text,
        "execution_count": count, "outputs": list(outputs),
    }  # fmt: skip


def stream(text, name="stdout"):
    return {"output_type": "stream", "name": name, "text": text}


def shown(**data):
    data = {kind.replace("_", "/", 1): text for kind, text in data.items()}
    return {"output_type": "display_data", "metadata": {}, "data": data}


PROSE = "One sentence of ten words stands here and says it. " * 4
HEAD = f"""# 07 Moe: many small experts

{PROSE}

| | |
|---|---|
| **Goals** | to count |
| **Know first** | [chapter 08](08_balance.ipynb) |
| **Time** | MINUTES min to read, 40 s to run on two CPU cores |
| **Report** | section 2.1.2 |
| **Package** | [moe.py](../minids/moe.py) |
| **Open in** | [![Open in Colab](_static/colab.svg)](COLAB) |
"""


def head(minutes=15):
    repo = repository().removeprefix("https://github.com/")
    colab = f"https://colab.research.google.com/github/{repo}/blob/main/book/07_moe.ipynb"
    return HEAD.replace("MINUTES", str(minutes)).replace("COLAB", colab)


def good():
    """Return the cells of a chapter that keeps every rule."""
    alt = shown(text_html='<img alt="two bars" src="data:image/svg+xml;base64,AAAA">')
    cells = [markdown(head()), code(rules.colab_cell(), tags=["remove-cell"])]
    cells += [markdown(f"## 1. Experts\n\n{PROSE}\n\n$$ y = x \\tag{{7.1}} $$")]
    cells += [
        cell for n in range(10) for cell in (markdown(PROSE), code(f"print({n})", stream(f"{n}\n")))
    ]
    cells += [code("style.show(fig, alt='two bars')", alt), code("def f():\n    return 1")]
    cells += [code("t = 1\nassert t\nprint(t)", stream("1"), tags=[rules.IGNORED])]
    cells += [markdown(f"## Exercises\n\n{PROSE}")]
    for n in range(1, 6):
        ask = f'x = ...\n\ncheck("moe.{n}", x)\n'
        cells += [markdown(f"### Exercise moe.{n}: count\n\n{PROSE}"), code(ask, stream("o"))]
    cells += [markdown(f"## Mistakes others make\n\n{PROSE}[seen](https://example.org/a_b)")]
    cells += [markdown(f"## On one GPU\n\n{PROSE}"), code("print('none')", stream("none"))]
    cells += [markdown(f"## Where to go from here\n\n{PROSE}It costs \\$5.6M; $x < y$ and $z$.")]
    return [cell | {"source": cell["source"].strip("\n")} for cell in cells]


def chapter(folder, cells) -> rules.Chapter:
    """Write a chapter 07, with a chapter 08 and a module beside it."""
    book = folder / "book"
    book.mkdir()
    for path in (book / "08_balance.ipynb", book / "_static/colab.svg", folder / "minids/moe.py"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    path = book / "07_moe.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    return rules.Chapter(path)


@pytest.mark.parametrize("rule", rules.CHAPTER_RULES, ids=name)
def test_rule_lets_a_good_chapter_pass(rule, tmp_path):
    assert list(rule(chapter(tmp_path, good()))) == []


def put(number, cell):
    def change(cells):
        cells.insert(number, cell)

    return change


def replace(old, new):
    """Return a change of text in every cell that has it."""

    def change(cells):
        assert any(old in cell["source"] for cell in cells), old
        for cell in cells:
            cell["source"] = cell["source"].replace(old, new)

    return change


def drop(start):
    """Return a change that takes out the cell that starts so."""

    def change(cells):
        (number,) = [n for n, cell in enumerate(cells) if cell["source"].startswith(start)]
        del cells[number]

    return change


def each_ignored(cells):
    for cell in cells:
        if cell["cell_type"] == "code":
            cell["metadata"]["tags"] = [rules.IGNORED]


def short_prose(cells):
    for cell in cells:
        cell["source"] = cell["source"].replace(PROSE.strip(), "Two words.")


def a_long_cell(lines):
    return put(4, code("\n".join(["print(1)"] * lines), stream("1")))


def long_cells(cells):
    """Make every fifth code cell too long for the nine in ten."""
    for cell in [cell for cell in cells if cell["cell_type"] == "code"][2::5]:
        cell["source"] = "\n".join(["print(1)"] * 21)


def long_median(cells):
    for cell in cells:
        if cell["cell_type"] == "code":
            cell["source"] = "\n".join(["print(1)"] * 7)


PLANTED = [
    (rules.begins_with_the_header_box, replace("# 07 Moe", "# 08 Moe")),
    (rules.begins_with_the_header_box, replace("| | |", "| a | b |")),
    (rules.begins_with_the_header_box, replace("| **Report** | section 2.1.2 |\n", "")),
    (rules.begins_with_the_header_box, replace("/book/07_moe.ipynb)", "/book/08_moe.ipynb)")),
    (rules.begins_with_the_header_box, replace("colab.svg", "colab.png")),
    (rules.begins_with_the_header_box, put(0, code("1"))),
    (rules.says_how_long_it_takes, replace("15 min", "45 min")),
    (rules.says_how_long_it_takes, replace("15 min", "5 min")),
    (rules.says_how_long_it_takes, replace("40 s to run", "40 s")),
    (rules.installs_itself_on_colab, replace("@main", "@dev")),
    (rules.installs_itself_on_colab, put(1, markdown("a"))),
    (rules.installs_itself_on_colab, lambda cells: cells[1].update(metadata={})),
    (rules.has_cells_of_a_size, lambda cells: cells.__delitem__(slice(5, 10))),
    (rules.has_cells_of_a_size, lambda cells: cells.extend([markdown("a")] * 40)),
    (rules.has_cells_of_a_size, a_long_cell(41)),
    (rules.has_cells_of_a_size, long_cells),
    (rules.has_cells_of_a_size, long_median),
    (rules.has_cells_of_a_size, put(4, code("x" * 89, stream("1")))),
    (rules.has_prose_of_a_length, short_prose),
    (rules.has_prose_of_a_length, replace("## Exercises", "word " * 600)),
    (rules.shows_something_in_every_cell, put(4, code("x = 1"))),
    (rules.shows_something_in_every_cell, put(4, code("def f():\n    pass\n\nf()"))),
    (rules.shows_something_in_every_cell, put(4, code("# nothing"))),
    (rules.outputs_are_clean, put(4, code("w", stream("a warning", "stderr")))),
    (rules.outputs_are_clean, put(4, code("w", {"output_type": "error"}))),
    (rules.outputs_are_clean, put(4, code("w", stream("kept in /tmp/tmpab12/log.txt\n")))),
    (rules.outputs_are_clean, put(4, code("w", shown(text_plain="'/home/me/a'")))),
    (rules.headings_do_not_jump, replace("### Exercise moe.1", "#### Exercise moe.1")),
    (rules.headings_do_not_jump, replace("## Exercises", "# Exercises")),
    (rules.headings_do_not_jump, replace("# 07 Moe", "## 07 Moe")),
    (rules.ends_with_the_same_sections, drop("## On one GPU")),
    (rules.ends_with_the_same_sections, replace("## Exercises", "## More")),
    (rules.ends_with_the_same_sections, replace("[seen](https://example.org/a_b)", "")),
    (rules.poses_exercises, replace("moe.2", "moe.9")),
    (rules.poses_enough_exercises, drop("### Exercise moe.5")),
    (rules.poses_exercises, drop('x = ...\n\ncheck("moe.3"')),
    (rules.poses_exercises, replace('check("moe.3", x)', 'check("moe.3", x)\nprint(1)')),
    (rules.is_plain_commonmark, put(4, markdown("```{note}\na\n```"))),
    (rules.is_plain_commonmark, put(4, markdown(":::{tip}\na\n:::"))),
    (rules.is_plain_commonmark, put(4, markdown("see {cite:p}`deepseek-v3`"))),
    (rules.is_plain_commonmark, put(4, markdown("(a-label)=\n## A"))),
    (rules.is_plain_commonmark, put(4, markdown("a claim[^1]"))),
    (rules.is_plain_commonmark, put(4, markdown("<div>a</div>"))),
    (rules.dollars_are_mathematics, put(4, markdown("It costs $5.576M"))),
    (rules.dollars_are_mathematics, put(4, markdown("It costs $5M, at $2 an hour"))),
    (rules.equations_are_numbered_in_order, put(4, markdown("$$ a \\tag{7.3} $$"))),
    (rules.equations_are_numbered_in_order, put(4, markdown("$$ a \\tag{6.2} $$"))),
    (rules.links_lead_somewhere, put(4, markdown("[a](09_mtp.ipynb)"))),
    (rules.links_lead_somewhere, put(4, markdown("[![a](_static/b.svg)](https://a.org)"))),
    (rules.links_lead_somewhere, put(4, markdown("[a](08_balance.ipynb#Collapse)"))),
    (rules.pictures_have_a_text, put(4, markdown("![ ](_static/colab.svg)"))),
    (rules.pictures_have_a_text, put(4, code("p", shown(image_png="AA", text_plain="a")))),
    (rules.pictures_have_a_text, put(4, code("p", shown(text_html=["<p>", '<img src="a">'])))),
    (rules.pictures_have_a_text, put(4, code("p", shown(text_html='<img alt=" " src="a">')))),
    (rules.outputs_are_compared, each_ignored),
    (rules.outputs_are_compared, replace("assert t\n", "t\n")),
    (rules.outputs_are_compared, put(4, code("1", stream("1"), count=None))),
    (rules.outputs_are_compared, put(4, code("1", stream("1"), tags=["nbval-skip"]))),
    (rules.outputs_are_compared, put(4, code("# NBVAL_IGNORE_OUTPUT\n1", stream("1")))),
    (rules.is_small, put(4, markdown("x" * 500_000))),
]


@pytest.mark.parametrize(("rule", "change"), PLANTED, ids=name)
def test_rule_sees_what_breaks_it(rule, change, tmp_path):
    cells = good()
    change(cells)
    assert list(rule(chapter(tmp_path, cells)))


def test_every_rule_is_shown_to_fail():
    assert {rule for rule, _ in PLANTED} == set(rules.CHAPTER_RULES)


@pytest.mark.parametrize(
    ("rule", "cell"),
    [
        (rules.outputs_are_clean, code("w", stream("see https://a.org/home/me and x/tmp/y"))),
        (rules.outputs_are_clean, code("w", shown(text_html="base64,ab/tmp/cd"))),
        (rules.is_plain_commonmark, markdown("`{'a': 1}` and $x_{i}$ and\n\n```python\n<p>\n```")),
        (rules.dollars_are_mathematics, markdown(r"$\text{if any}$, $d_{model}$, `a$b`")),
        (rules.shows_something_in_every_cell, code("%load x\nimport a")),
        (rules.headings_do_not_jump, markdown("```python\n#### a comment\n```")),
        (rules.links_lead_somewhere, markdown("`a[0](x)` and\n\n```\n[a](b)\n```")),
    ],
    ids=name,
)
def test_rule_lets_pass_what_only_looks_wrong(rule, cell, tmp_path):
    assert list(rule(chapter(tmp_path, [*good()[:3], cell, *good()[3:]]))) == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("# A title\n\ntwo words", 5),
        ("a\n\n| x | y |\n|---|---|\n| 1 | 2 |\n\nb", 2),
        ("a $$ x = y $$ b\n\n```python\nprint(1)\n```\n\n$z$", 3),
    ],
)
def test_words_are_those_that_are_read(text, count):
    assert rules.words(text) == count


# Lecture pages

CARD = "\n\n".join(f"**{label}** 10 of them." for label in rules.LABELS)
LECTURE = f"""# Teaching 07: Moe

## Plan for 50 minutes

| minutes | what | where in the chapter |
|---|---|---|
| 20 | question | section 1 |
| 30 | cards | section 2 |

## Card: one

{CARD}

## Card: two

{CARD}

## Card: three

{CARD}

## What goes wrong in class

Much.
"""


@pytest.mark.parametrize("rule", rules.LECTURE_RULES, ids=name)
def test_rule_lets_a_good_lecture_page_pass(rule):
    assert list(rule(LECTURE, "moe")) == []


PLANTED_LECTURES = [
    (rules.lecture_has_its_sections, "# Teaching 07: Moe", "# Moe"),
    (rules.lecture_has_its_sections, "## Card: three", "### Card: three"),
    (rules.lecture_has_its_sections, "## Card: three", "## Card: two"),
    (rules.lecture_has_its_sections, "## What goes wrong in class", "## End"),
    (rules.lecture_has_its_sections, "## Plan for 50 minutes", "## Plan"),
    (rules.lecture_takes_50_minutes, "| 20 |", "| 25 |"),
    (rules.lecture_takes_50_minutes, "| 20 |", "| 15-25 |"),
    (rules.lecture_takes_50_minutes, "| minutes |", "| time |"),
    (rules.lecture_takes_50_minutes, "| section 2 |", "| |"),
    (rules.lecture_cards_are_complete, "**Predict.** 10 of them.\n\n", ""),
    (rules.lecture_cards_are_complete, "**Minutes.** 10", "**Minutes.** ten"),
    (rules.lecture_cards_are_complete, "**Minutes.** 10", "**Minutes.** 10-15"),
    (rules.lecture_cards_are_complete, "**Change.** 10", "A word first.\n\n**Change.** 10"),
]


@pytest.mark.parametrize(("rule", "old", "new"), PLANTED_LECTURES)
def test_rule_sees_what_breaks_a_lecture_page(rule, old, new):
    assert old in LECTURE
    assert list(rule(LECTURE.replace(old, new), "moe"))


def test_every_rule_of_lecture_pages_is_shown_to_fail():
    assert {rule for rule, _, _ in PLANTED_LECTURES} == set(rules.LECTURE_RULES)


def test_the_command_says_what_is_broken_where(tmp_path, capsys):
    path = chapter(tmp_path, good()).path
    page = tmp_path / "moe.md"
    page.write_text(LECTURE)
    assert rules.main([str(path), str(page)]) == 0
    page.write_text(LECTURE.replace("| 20 |", "| 21 |"))
    assert rules.main([str(path), str(page)]) == 1
    assert capsys.readouterr().out == (
        "moe.md: the minutes must be whole and sum to 50, got ['21', '30']\n"
    )


def test_the_picture_of_every_output_is_whole():
    """A picture cut short would show as a broken image; its end is that of an SVG."""
    found = 0
    for path in CHAPTERS:
        for cell in rules.Chapter(path).code:
            for output in cell["outputs"]:
                html = "".join(output.get("data", {}).get("text/html", ""))
                for data in re.findall(r"image/svg\+xml;base64,([\w+/=]+)", html):
                    found += 1
                    assert base64.b64decode(data).rstrip().endswith(b"</svg>")
    assert found
