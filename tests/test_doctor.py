"""minids doctor: what it says of a machine on which something is missing, broken or too small."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from minids.learn import doctor as module
from minids.learn.doctor import BOOK, CORE, KERNELS, TEST, Found, advice, doctor, look, verdict

ALL = [Found(name, source, "1.0") for source in module.PACKAGES for name in module.PACKAGES[source]]
PLENTY_GIB = 100.0
ROOT = Path(__file__).parents[1]


def without(*names: str, problem: str = "missing") -> list[Found]:
    return [at._replace(version="", problem=problem) if at.name in names else at for at in ALL]


@pytest.fixture
def hide(monkeypatch):
    """Make a module impossible to import or find, as if it had never been installed."""

    def hide_one(name: str) -> None:
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setattr(module, "find_spec", lambda asked: None if asked == name else asked)

    return hide_one


def run() -> tuple[bool, list[str]]:
    lines: list[str] = []
    return doctor(lines.append), lines


def test_complete_machine_lists_everything_and_has_nothing_missing():
    works, lines = run()
    assert works
    listed = [line.split()[0] for line in lines]
    for name in ("Python", "minids", "cores", "memory", "disk", "GPU", *(at.name for at in ALL)):
        assert name in listed
    assert lines[-1].startswith("You can do every chapter")


def test_colab_is_told_of_no_other_jupyter(monkeypatch):
    monkeypatch.setitem(sys.modules, "google.colab", module)
    _, lines = run()
    listed = [line.split()[0] for line in lines]
    assert "jupyterlab" not in listed
    assert {"matplotlib", "torch"} <= set(listed)


def test_core_package_missing(hide):
    hide("tokenizers")
    works, lines = run()
    assert not works
    assert "tokenizers    missing" in lines
    (todo,) = [line for line in lines if line.startswith("to do")]
    assert todo.endswith(f'tokenizers (minids itself), in the folder of pyproject.toml: '
                         f'{sys.executable} -m pip install -e "."')  # fmt: skip
    assert lines[-1].startswith("minids does not work yet")


def test_book_package_missing(hide):
    hide("jupyterlab")
    works, lines = run()
    assert works
    (todo,) = [line for line in lines if line.startswith("to do")]
    assert "jupyterlab (chapters)" in todo
    assert todo.endswith('-e ".[book]"')
    assert "minids tour" in lines[-1]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError("libtorch.so: cannot open\nmore"), "broken: libtorch.so: cannot open"),
        (RuntimeError(), "broken: RuntimeError"),
        (ModuleNotFoundError("No module named 'sympy'", name="sympy"), "broken: No module named"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), "missing"),
    ],
)
def test_package_that_does_not_import(monkeypatch, error, says):
    def fail(name):
        raise error

    monkeypatch.setattr(module.importlib, "import_module", fail)
    found = look("torch", CORE)
    assert found.problem.startswith(says)
    assert not found.version


def test_broken_package_is_installed_anew():
    (line,) = advice(without("torch", problem="broken: no library"), PLENTY_GIB)
    assert line.endswith("-m pip install --force-reinstall torch")


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ((), "You can do every chapter; the timings"),
        (("transformers",), "You can do every chapter; the timings"),
        (("triton",), "every chapter but 12"),
        (("ipywidgets", "triton"), "chapters need the above"),
        (("torch", "ipywidgets"), "does not work yet"),
    ],
)
def test_verdict_names_the_worst(monkeypatch, missing, says):
    monkeypatch.setattr(module, "gpus", list)
    assert says in verdict(without(*missing))


def test_verdict_with_gpu(monkeypatch):
    monkeypatch.setattr(module, "gpus", lambda: ["a GPU, 80 GiB"])
    assert verdict(ALL).endswith("with the GPU where it pays.")


def test_triton_is_not_asked_for_where_it_does_not_exist(monkeypatch):
    monkeypatch.setattr(module.platform, "system", lambda: "Darwin")
    assert advice(without("triton"), PLENTY_GIB) == ["triton (chapter 12) exists for Linux only"]
    monkeypatch.setattr(module.platform, "system", lambda: "Linux")
    (line,) = advice(without("triton"), PLENTY_GIB)
    assert line.endswith('-e ".[kernels]"')


def test_small_machine(monkeypatch):
    monkeypatch.setattr(module, "memory_gib", lambda: 2.0)
    lines = advice(ALL, disk_gib=0.5)
    assert [line.split(":")[0] for line in lines] == ["memory", "disk"]


def test_unknown_memory_is_no_complaint(monkeypatch):
    monkeypatch.delattr(module.os, "sysconf")
    assert module.memory_gib() is None
    assert advice(ALL, PLENTY_GIB) == []


def test_every_package_is_one_that_the_project_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    book = [*extras["book"], *extras["figures"]]  # the one asks for the other
    assert "minids[figures]" in extras["book"]
    wanted = {CORE: project["dependencies"], BOOK: book, TEST: extras["test"]}
    wanted[KERNELS] = extras["kernels"]
    for source, names in module.PACKAGES.items():
        assert all(any(line.startswith(name) for line in wanted[source]) for name in names)


def test_runs_without_torch(tmp_path):
    """As a file, with a torch that breaks on import: the machine on which it is needed most."""
    (tmp_path / "torch.py").write_text("raise OSError('a DLL is missing')")
    copy = shutil.copy(module.__file__, tmp_path)
    done = subprocess.run([sys.executable, copy], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "broken: a DLL is missing" in done.stdout
    assert "--force-reinstall torch" in done.stdout
