"""book/_tools and book/conftest.py: normal form, the repository's address, limits of a chapter."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import normalise as tool
import pytest
import repository

ROOT = Path(__file__).parents[1]


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


def widget(**data):
    data |= {"application/vnd.jupyter.widget-view+json": {"model_id": "9f"}}
    return {"output_type": "display_data", "data": data, "metadata": {}}


def test_models_of_widgets_are_dropped_and_what_stands_beside_them_stays():
    shown = widget(**{"text/html": ["<p>run it</p>"], "text/plain": ["Live('a')"]})
    normal = tool.normalise(book(code("w", [shown, widget(), stream("a")])))
    first, second = normal["cells"][0]["outputs"]
    assert first["data"] == {"text/html": ["<p>run it</p>"], "text/plain": ["Live('a')"]}
    assert second["text"] == ["a"]
    assert tool.WIDGET in shown["data"], "the caller's notebook stays as it is"


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


@pytest.mark.slow  # runs a chapter
def test_a_chapter_run_again_is_the_same_file(tmp_path, capsys):
    """What `make run-book` writes is what is kept: for the shortest chapter, cell by cell."""
    chapter = min((ROOT / "book").glob("*.ipynb"), key=seconds_promised)
    copy = tmp_path / chapter.name
    shutil.copy(chapter, copy)
    assert tool.main(["--execute", str(copy)]) == 0
    assert copy.read_bytes() == chapter.read_bytes()
    assert capsys.readouterr().out.startswith(chapter.name), "it says which chapter it runs"


def seconds_promised(path):
    return int(path.read_text(encoding="utf-8").split(" min to read, ")[1].split(" s to run")[0])


@pytest.mark.slow
def test_a_cell_that_raises_ends_the_run_and_writes_nothing(tmp_path):
    path = tmp_path / "a.ipynb"
    path.write_text(json.dumps(book(code("1 / 0", count=None))))
    before = path.read_bytes()
    with pytest.raises(Exception, match="ZeroDivisionError"):
        tool.main(["--execute", str(path)])
    assert path.read_bytes() == before


# book/conftest.py, run on planted notebooks in a folder of their own


def nbval(folder, *options):
    """Run nbval on a folder as `make test` does; return the exit status and what is printed."""
    shutil.copy(ROOT / "book/conftest.py", folder)
    command = [sys.executable, "-m", "pytest", folder, f"--rootdir={folder}", "-rfE"]
    command += ["-p", "nbval.plugin", "-p", "xdist.plugin", "-p", "no:cacheprovider"]
    command += ["--nbval", "--nbval-current-env", "--nbval-cell-timeout=60"]
    alone = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # others take seconds to load
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, cwd=folder, env=alone
    )
    return done.returncode, done.stdout


def planted(folder, name, *cells):
    (folder / name).write_text(tool.to_text(tool.normalise(book(TEXT, *cells))))


@pytest.mark.slow  # starts a kernel for each notebook
def test_a_run_fails_for_a_changed_output_and_for_too_little_compared(tmp_path):
    right = code("print(6 * 7)", [stream("42\n")])
    loose = code("print(1)", [stream("2\n")], tags=[tool.IGNORED])
    planted(tmp_path, "good.ipynb", right, right, loose)
    planted(tmp_path, "changed.ipynb", code("print(6 * 7)", [stream("43\n")]))
    planted(tmp_path, "loose.ipynb", right, loose)
    planted(tmp_path, "never_run.ipynb", code("print(6 * 7)", count=None))
    (tmp_path / "_build").mkdir()
    planted(tmp_path, "_build/copy.ipynb", code("1 / 0"))
    status, printed = nbval(tmp_path)
    assert status == 1
    failed = {line.split(" ")[1] for line in printed.splitlines() if line.startswith("FAILED")}
    assert {name.split("/")[-1] for name in failed} == {
        "changed.ipynb::Cell", "loose.ipynb::limits", "never_run.ipynb::limits",
    }  # fmt: skip
    assert "1 of 2 cells of loose.ipynb are compared" in printed
    table = printed.split(" chapters ")[1]
    row = next(line for line in table.splitlines() if line.startswith("good.ipynb"))
    assert row.endswith("2 of 3 cells, 67%")
    took, busy, peak = (float(row.split()[n].replace(",", "")) for n in (2, 4, 6))
    assert 0.1 < busy <= took * (os.cpu_count() or 1), "seconds of the processor"
    assert 20 < peak < 2000, "a kernel of Python takes tens of MiB"


@pytest.mark.slow
def test_a_run_fails_for_a_chapter_that_takes_too_long_and_says_which(tmp_path):
    planted(tmp_path, "slow.ipynb", code("import time\ntime.sleep(1)"))
    status, printed = nbval(tmp_path, "--book-limit-s=0.9")
    assert status == 1
    assert "slow.ipynb took" in printed
    assert ", more than 0.9" in printed
    assert "1 failed, 1 passed" in printed, "its cell alone has nothing wrong"


@pytest.mark.slow
def test_limits_hold_where_workers_share_the_run(tmp_path):
    planted(tmp_path, "slow.ipynb", code("x = 1"))
    status, printed = nbval(tmp_path, "-n", "1", "--dist", "loadfile", "--book-limit-s=0")
    assert status == 1
    assert "slow.ipynb::limits" in printed
    assert "1 of 1 cells, 100%" in printed.split(" chapters ")[1]


# book/_tools/repository.py


def test_every_link_to_the_repository_is_the_one_of_pyproject():
    assert list(repository.wrong_links(ROOT)) == []


def a_repository(root, owner="OWNER"):
    (root / "pyproject.toml").write_text(
        f'[project]\nurls = {{ Repository = "https://github.com/{owner}/minids" }}\n'
    )
    (root / "README.md").write_text(
        "https://github.com/OWNER/minids.git https://github.com/deepseek-ai/DeepSeek-V3\n"
        "https://mybinder.org/v2/gh/OWNER/minids/main https://github.com/OWNER/minids-x\n"
    )
    link = "https://colab.research.google.com/github/OWNER/minids/blob/main/book/a.ipynb"
    planted(
        root, "a.ipynb", code(f"# {link}\n%pip install git+https://github.com/OWNER/minids@main")
    )
    (root / "data.bin").write_bytes(b"https://github.com/OWNER/minids \xff")
    subprocess.run(["git", "init", "-q", root], check=True)
    return root


def test_the_address_is_carried_to_every_link(tmp_path, capsys):
    root = a_repository(tmp_path)
    assert repository.main(["https://github.com/some-one/tiny.ds/"], root) == 0
    assert set(capsys.readouterr().out.split()) == {"README.md", "a.ipynb", "pyproject.toml"}
    assert repository.repository(root) == "https://github.com/some-one/tiny.ds"
    text = (root / "README.md").read_text()
    assert "https://github.com/some-one/tiny.ds.git https://github.com/deepseek-ai/" in text
    assert "mybinder.org/v2/gh/some-one/tiny.ds/main https://github.com/OWNER/minids-x" in text
    cell = tool.as_text(json.loads((root / "a.ipynb").read_text())["cells"][1]["source"])
    assert "/github/some-one/tiny.ds/blob/main/book/a.ipynb" in cell
    assert "git+https://github.com/some-one/tiny.ds@main" in cell
    assert repository.main(["https://github.com/OWNER/minids"], root) == 0
    assert "https://github.com/OWNER/minids.git" in (root / "README.md").read_text()


def test_a_link_to_another_owner_is_found(tmp_path, capsys):
    root = a_repository(tmp_path, owner="me")
    assert repository.main(["--check"], root) == 1
    found = capsys.readouterr().out
    assert "README.md: github.com/OWNER/minids is not of me" in found
    assert "README.md: mybinder.org/v2/gh/OWNER/minids is not of me" in found
    assert "a.ipynb: colab.research.google.com/github/OWNER/minids is not of me" in found
    assert repository.main(["https://github.com/me/minids"], root) == 0
    assert repository.main(["--check"], root) == 0


@pytest.mark.parametrize(
    "address", ["github.com/a/b", "https://gitlab.com/a/b", "https://github.com/a"]
)
def test_an_address_of_another_form_is_refused(address, tmp_path, capsys):
    root = a_repository(tmp_path)
    before = (root / "README.md").read_bytes()
    assert repository.main([address], root) == 2
    assert f"must read https://github.com/OWNER/NAME, got '{address}'" in capsys.readouterr().err
    assert (root / "README.md").read_bytes() == before


# .binder: what it installs is what `make venv` installs


def test_binder_installs_the_tested_environment():
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    (torch,) = [line for line in constraints.splitlines() if line.startswith("torch==")]
    wanted = (ROOT / ".binder/requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in wanted if not line.startswith("#")] == [
        "-c ../constraints.txt",
        torch,
    ]
    tested = constraints.splitlines()[0]
    python = (ROOT / ".binder/runtime.txt").read_text(encoding="utf-8").strip()
    assert python.replace("python-", "Python ") in tested
    script = (ROOT / ".binder/postBuild").read_text(encoding="utf-8")
    assert '-c constraints.txt --editable ".[book]"' in script
    assert script.strip().endswith("jupyter trust book/*.ipynb"), "figures live before a run"
    subprocess.run(["sh", "-n", ROOT / ".binder/postBuild"], check=True)
    assert os.access(ROOT / ".binder/postBuild", os.X_OK)
