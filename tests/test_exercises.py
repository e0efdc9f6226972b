"""Every exercise of the book: its solution passes, all else is rejected and told why."""

import json
import linecache
from pathlib import Path

import pytest

from minids import check
from minids.learn.check import Exercise, chapter, chapters
from minids.learn.kernels import is_interpreted

BOOK = Path(__file__).parents[1] / "book"
EXERCISES = [(stem, number) for stem in chapters() for number in range(1, len(chapter(stem)) + 1)]
SOURCES = [(s, n, what) for s, n in EXERCISES for what in chapter(s)[n - 1].wrong]
HAS_KEYS = any(this.solution for stem in chapters() for this in chapter(stem))
needs_keys = pytest.mark.skipif(not HAS_KEYS, reason="NOT RUN: a students' copy has no solutions")
LEAST = 5  # exercises a chapter; chapter 00 has two to warm up


def exercise(stem: str, number: int) -> Exercise:
    return chapter(stem)[number - 1]


def answer(source: str, name: str):
    """Run a cell's source, where Triton finds it as in a notebook; return what it defines."""
    if "triton" in source and not is_interpreted():
        pytest.skip("NOT RUN: kernels to write run in Triton's interpreter, which is off here")
    file = f"<{name} {hash(source)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    namespace: dict[str, object] = {}
    exec(compile(source, file, "exec"), namespace)
    return namespace[name]


def notebook(stem: str) -> list[dict]:
    (path,) = BOOK.glob(f"[0-9][0-9]_{stem}.ipynb")
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def named(value: object) -> str:
    return str(value).replace(" ", "-")


def test_there_are_exercises():
    assert {"start", "count", "mla", "balance", "fp8", "kernels"} <= set(chapters())


@pytest.mark.parametrize("stem", chapters())
def test_chapter_has_enough(stem):
    assert len(chapter(stem)) >= (2 if stem == "start" else LEAST)


@needs_keys
@pytest.mark.parametrize(("stem", "number"), EXERCISES)
def test_solution_is_right(stem, number):
    this = exercise(stem, number)
    verdict = check(f"{stem}.{number}", answer(this.solution, this.name))
    assert verdict.right, verdict.text


@pytest.mark.parametrize(("stem", "number"), EXERCISES)
def test_start_is_not_answered(stem, number):
    this = exercise(stem, number)
    verdict = check(f"{stem}.{number}", answer(this.start, this.name))
    assert not verdict.right
    assert not verdict.answered


@pytest.mark.parametrize(("stem", "number", "what"), SOURCES, ids=named)
def test_wrong_answer_is_rejected_by_a_property_that_is_named(stem, number, what):
    this = exercise(stem, number)
    verdict = check(f"{stem}.{number}", answer(this.wrong[what], this.name))
    assert not verdict.right, f"{what} passes"
    assert verdict.answered
    assert verdict.failed in {required.name for required in this.properties}
    assert "It raised" not in verdict.text, "a wrong answer that only crashes teaches nothing"


@needs_keys
@pytest.mark.parametrize(("stem", "number"), EXERCISES)
def test_exercise_is_complete(stem, number):
    this = exercise(stem, number)
    assert len(this.hints) == 3
    assert len(set(this.hints)) == 3
    assert len(this.wrong) >= 2
    assert len(set(this.wrong.values()) | {this.solution, this.start}) == len(this.wrong) + 2
    assert this.properties
    assert all(required.name and not required.name.endswith(".") for required in this.properties)
    assert this.statement.strip()


@needs_keys
@pytest.mark.parametrize(("stem", "number"), EXERCISES)
def test_solution_is_worked_and_not_in_the_chapter(stem, number):
    this = exercise(stem, number)
    assert "#" in this.solution, "a worked solution explains itself"
    text = "\n".join("".join(cell["source"]) for cell in notebook(stem))
    assert this.solution.strip() not in text


@pytest.mark.parametrize(("stem", "number"), EXERCISES)
def test_chapter_asks_it_as_it_is_checked(stem, number):
    this, cells = exercise(stem, number), notebook(stem)
    heading = f"### Exercise {stem}.{number}: {this.title}\n"
    sources = ["".join(cell["source"]) for cell in cells]
    places = [n for n, source in enumerate(sources) if source.startswith(heading)]
    assert len(places) == 1, f"no cell starts with {heading!r}"
    assert this.statement.strip() in sources[places[0]]
    wanted = f'{this.start.strip()}\n\ncheck("{stem}.{number}", {this.name})'
    found = sources[places[0] + 1].strip()
    # two empty lines after a function, as the formatter has it
    assert found.replace("\n\n\n", "\n\n") == wanted.replace("\n\n\n", "\n\n")


def test_names_of_exercises_differ_within_a_chapter():
    for stem in chapters():
        names = [this.name for this in chapter(stem)]
        assert len(set(names)) == len(names), f"{stem} would overwrite an answer"
