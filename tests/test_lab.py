"""Chapters in JupyterLab: figures live before anything is run, and a reader answers an exercise."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest
from browser import drag, run_all, shot
from nbformat.sign import NotebookNotary

ROOT = Path(__file__).parents[1]
BOOK = ROOT / "book"
LIVE = 'class=\\"mn-fig mn-'  # of a figure that can be dragged, as a file has it
CHAPTERS = [p.name for p in sorted(BOOK.glob("*.ipynb")) if LIVE in p.read_text(encoding="utf-8")]


def test_there_are_chapters_with_figures_to_drag():
    written = {"01_count", "04_mla", "08_balance", "11_fp8", "12_kernels"}
    assert {f"{name}.ipynb" for name in written} <= set(CHAPTERS)


def test_make_learn_trusts_the_book_before_it_opens_it(tmp_path):
    """The commands that `make learn` would run, on a copy: then each notebook's mark is there."""
    printed = subprocess.run(
        ["make", "-n", "learn"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    commands = [line for line in printed.splitlines() if line.startswith("cd book")]
    trust, opening = commands
    assert "jupyter lab" in opening
    copy = tmp_path / "book"
    copy.mkdir()
    for path in BOOK.glob("*.ipynb"):
        shutil.copy(path, copy)
    command = trust.replace("../.venv/bin", str(ROOT / ".venv/bin"))
    env = os.environ | {"JUPYTER_DATA_DIR": str(tmp_path / "data")}
    subprocess.run(command, shell=True, cwd=tmp_path, env=env, check=True, capture_output=True)
    for folder, trusted in {"data": True, "another": False}.items():
        (tmp_path / folder).mkdir(exist_ok=True)
        notary = NotebookNotary(data_dir=str(tmp_path / folder))
        for path in copy.glob("*.ipynb"):
            assert notary.check_signature(nbformat.read(path, as_version=4)) is trusted, path.name
        notary.store.close()


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_opened_untouched_can_be_dragged(name, lab, lab_page):
    page = lab_page(name)
    figure = page.locator(".mn-fig[data-live]").first
    slider = figure.locator("input[type=range]:visible").first
    slider.scroll_into_view_if_needed()
    before, value = figure.inner_html(), slider.input_value()
    at = slider.evaluate("e => (e.value - e.min) / (e.max - e.min)")
    drag(slider, to=0.9 if at < 0.5 else 0.1)
    assert slider.input_value() != value
    assert figure.inner_html() != before, "the figure followed"
    assert "asleep" not in figure.inner_text()
    for session in lab.request("sessions"):
        assert session["kernel"]["execution_state"] in {"starting", "idle"}
    cells = json.loads((lab.folder / name).read_text(encoding="utf-8"))["cells"]
    wanted = [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"]
    prompts = page.locator(".jp-CodeCell .jp-InputPrompt").all_inner_texts()
    assert prompts == [f"[{count}]:" for count in wanted], "no cell was run"
    shot(page, f"lab_untouched_{name.removesuffix('.ipynb')}")


@pytest.fixture
def cheap_start(lab):
    """Put chapter 00 without its training run beside the others; return its name."""
    notebook = nbformat.read(BOOK / "00_start.ipynb", as_version=4)
    kept, skip = [], False
    for cell in notebook.cells:
        if found := re.match(r"## (\d)", cell.source):
            skip = found[1] in {"4", "5"}
        if not skip:
            kept.append(cell)
    assert len(kept) < len(notebook.cells)
    notebook.cells = kept
    nbformat.write(notebook, lab.folder / "cheap_start.ipynb")
    yield "cheap_start.ipynb"
    (lab.folder / "cheap_start.ipynb").unlink()


def test_run_all_then_answer_an_exercise(cheap_start, lab_page):
    page = lab_page(cheap_start)
    run_all(page)
    assert page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0
    cell = page.locator(".jp-CodeCell", has_text='check("start.1", shape)')
    output = cell.locator(".jp-OutputArea-output")
    assert "start.1: not answered yet" in output.inner_text()
    for answer, told in {
        "[2, 3, 4, 5]": "axis 1 is 3; the size of 'h' is another.",
        "[2, 4, 3, 5]": "start.1: right. 3 properties held",
    }.items():
        cell.locator(".cm-content").click()
        page.keyboard.press("ControlOrMeta+a")
        page.keyboard.insert_text(f'shape = {answer}\ncheck("start.1", shape)')
        page.keyboard.press("Shift+Enter")
        output.get_by_text(told).wait_for()
        cell.scroll_into_view_if_needed()
        shot(page, f"lab_answer_{'right' if 'right' in told else 'wrong'}")
