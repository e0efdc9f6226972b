"""book/_tools/normalise.py: what changes, what is kept, and that twice is once."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("normalise", ROOT / "book/_tools/normalise.py")
assert SPEC is not None
assert SPEC.loader is not None
tool = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tool)


def code(source, outputs=(), count=1, tags=(), **metadata):
    metadata |= {"tags": list(tags)} if tags else {}
    return {
        "cell_type": "code", "id": "d1b2", "metadata": metadata, "execution_count": count,
        "outputs": list(outputs), "source": source,
    }  # fmt: skip


def stream(text, name="stdout"):
    return {"output_type": "stream", "name": name, "text": text}


def result(text, count):
    data = {"text/plain": text}
    return {
        "output_type": "execute_result", "data": data, "metadata": {}, "execution_count": count,
    }  # fmt: skip


def book(*cells):
    metadata = {"kernelspec": {"name": "mine"}, "widgets": {"x": 1}}
    return {"cells": list(cells), "metadata": metadata, "nbformat": 4, "nbformat_minor": 4}


TEXT = {"cell_type": "markdown", "metadata": {"collapsed": True}, "source": "# A\n\nb"}


def test_worked_example():
    cell = code(
        ["1 +\n", "1"],
        [result("2", 17)],
        17,
        ["hide-input"],
        execution={"iopub": 1},
        mystnb={"a": 1},
    )
    normal = tool.normalise(
        book(TEXT, cell, code("pass", count=None), code("x", [stream("a")], 30))
    )
    first, second, never_run, last = normal["cells"]
    assert [cell["id"] for cell in normal["cells"]] == ["c001", "c002", "c003", "c004"]
    assert first == {
        "cell_type": "markdown", "id": "c001", "metadata": {}, "source": ["# A\n", "\n", "b"],
    }  # fmt: skip
    assert second["metadata"] == {"mystnb": {"a": 1}, "tags": ["hide-input"]}
    assert second["execution_count"] == second["outputs"][0]["execution_count"] == 1
    assert second["outputs"][0]["data"] == {"text/plain": ["2"]}
    assert never_run["execution_count"] is None
    assert last["execution_count"] == 2
    assert normal["metadata"]["kernelspec"]["name"] == "python3"
    assert "widgets" not in normal["metadata"]
    assert normal["nbformat_minor"] == 5


def test_normal_form_of_normal_form_is_itself():
    once = tool.normalise(book(TEXT, code("x", [stream("a"), stream("b"), result("c", 5)], 5)))
    assert tool.to_text(tool.normalise(once)) == tool.to_text(once)


def test_pieces_of_a_stream_are_joined_but_not_across_streams():
    pieces = [stream("a"), stream(["b\n", "c"]), stream("d", "stderr"), stream("e")]
    assert [tool.as_text(o["text"]) for o in tool.merge_streams(pieces)] == ["ab\nc", "d", "e"]
    assert pieces[0]["text"] == "a"


def test_ignored_outputs_stay_as_stored():
    stored = book(code("t", [stream("1 s")], tags=[tool.IGNORED]), code("n", [stream("3")]))
    new = book(code("t", [stream("2 s")], tags=[tool.IGNORED]), code("n", [stream("4")]))
    kept = tool.keep_ignored(new, stored)
    assert [tool.as_text(cell["outputs"][0]["text"]) for cell in kept["cells"]] == ["1 s", "4"]


def test_ignored_outputs_of_a_changed_cell_are_new():
    stored = book(code("t", [stream("1 s")], tags=[tool.IGNORED]))
    new = book(code("t + 1", [stream("2 s")], tags=[tool.IGNORED]))
    assert tool.keep_ignored(new, stored) == new


def test_check_writes_nothing_and_fails_until_written(tmp_path, capsys):
    path = tmp_path / "a.ipynb"
    path.write_text(json.dumps(book(TEXT)))
    before = path.read_bytes()
    assert tool.main(["--check", str(path)]) == 1
    assert "not in normal form" in capsys.readouterr().out
    assert path.read_bytes() == before
    assert tool.main([str(path)]) == 0
    assert tool.main(["--check", str(path)]) == 0
    assert path.read_bytes().endswith(b"}\n")


@pytest.mark.slow  # starts three kernels
def test_two_executions_give_the_same_bytes(tmp_path):
    path = tmp_path / "a.ipynb"
    timed = code("import time\ntime.time()", tags=[tool.IGNORED], count=None)
    path.write_text(json.dumps(book(TEXT, timed, code("print(6 * 7)\n'x'", count=None))))
    assert tool.main(["--execute", str(path)]) == 0
    once = path.read_bytes()
    cells = json.loads(once)["cells"]
    assert cells[2]["outputs"][0]["text"] == ["42\n"]
    assert cells[1]["execution_count"] == 1
    assert tool.main(["--execute", str(path)]) == 0
    assert path.read_bytes() == once
    assert tool.main(["--execute", "--fresh", str(path)]) == 0
    assert path.read_bytes() != once


@pytest.mark.parametrize(
    "path", sorted((ROOT / "book").glob("*.ipynb")), ids=lambda path: path.name
)
def test_chapters_are_kept_as_the_guide_says(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    ignored = [cell for cell in cells if tool.IGNORED in cell["metadata"].get("tags", [])]
    assert path.read_text(encoding="utf-8") == tool.to_text(tool.normalise(notebook))
    assert path.stat().st_size < 500_000
    assert all(cell["execution_count"] for cell in cells), "nbval never compares a cell not run"
    assert len(ignored) <= 0.4 * len(cells), "most cells must be compared exactly"
