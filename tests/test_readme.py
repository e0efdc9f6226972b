"""README.md: its lines of code print what it shows, and it names files and chapters that exist."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def blocks(text: str, language: str) -> list[str]:
    """Return the fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def readme() -> str:
    return README.read_text(encoding="utf-8")


def test_ten_lines_print_what_is_shown(readme):
    code, shown = blocks(readme, "python")[0], blocks(readme, "text")[0]
    assert len([line for line in code.splitlines() if line]) == 10
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert printed.getvalue() == shown


def test_ten_lines_would_notice_another_number(readme):
    assert "671,026,419,200" in blocks(readme, "text")[0]
    assert "671,026,419,200" not in blocks(readme, "python")[0]


def test_tree_names_every_module_and_nothing_else(readme):
    tree = next(block for block in blocks(readme, "text") if "minids/" in block)
    named = set(re.findall(r"^  (\w+\.py)\b", tree, flags=re.MULTILINE))
    there = {path.name for path in (ROOT / "minids").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert named == there
    folders = set(re.findall(r"^  (\w+)/", tree, flags=re.MULTILINE))
    assert folders == {path.parent.name for path in (ROOT / "minids").glob("*/__init__.py")}


def test_chapters_marked_as_written_are_there(readme):
    rows = re.findall(r"^\| (\d\d) \| (\w+) \|.*\| (yes)? ?\|$", readme, flags=re.MULTILINE)
    assert len(rows) == 20
    written = {f"{number}_{stem}.ipynb" for number, stem, yes in rows if yes}
    assert written == {path.name for path in (ROOT / "book").glob("*.ipynb")}


def test_links_and_pictures_lead_somewhere(readme):
    targets = re.findall(r"\]\(([^)#]+)\)", readme)
    assert targets
    for target in targets:
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_make_targets_that_it_names_exist(readme):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"\bmake ([a-z]+)\b", readme)) - {"and"}
    assert {"learn", "test", "tour"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
