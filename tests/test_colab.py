"""The install cell of every chapter: its command is run in a clean environment that has torch."""

import importlib.metadata as metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
import venv
from pathlib import Path

import pytest
import repository
import rules
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).parents[1]
OFFLINE = "NewConnectionError|Temporary failure in name resolution|Failed to establish|ProxyError"
# what a chapter does first, on Colab: import, draw, show what can be dragged, check an answer
SCRIPT = """
import json, sys
from importlib import resources
import torch, minids, figures
from figures import count, style
from minids import check
from minids.learn import explore

shown = explore("count", {"a": 1}, alt="a figure")._repr_html_()
picture = style.show(count.draw(), alt="a picture")._repr_html_()
kept = [file.name for folder in ("figures", "minids.learn.experiments")
        for file in resources.files(folder).iterdir()]
json.dump({"torch": torch.__file__, "minids": minids.__file__, "check": repr(check("start.1", ...)),
           "shown": len(shown), "picture": picture[:40], "files": kept}, sys.stdout)
"""


def command_of_the_cell() -> list[str]:
    """Run the cell as Colab would, with a `%pip` that only listens; return what it was told."""
    told: list[tuple[str, str]] = []
    shell = types.SimpleNamespace(run_line_magic=lambda name, line: told.append((name, line)))
    code = TransformerManager().transform_cell(rules.colab_cell())
    before = sys.modules.get("google.colab")
    sys.modules["google.colab"] = types.ModuleType("google.colab")
    try:
        exec(code, {"get_ipython": lambda: shell})
    finally:
        del sys.modules["google.colab"]
        if before is not None:
            sys.modules["google.colab"] = before
    ((name, line),) = told
    return [name, *shlex.split(line)]


def test_the_cell_installs_from_the_repository_on_colab_alone():
    command = command_of_the_cell()
    assert command[:3] == ["pip", "install", "-q"]
    assert command[3] == f"minids[figures] @ git+{repository.repository()}@main"
    exec(TransformerManager().transform_cell(rules.colab_cell()), {})  # elsewhere: nothing


def closure(name: str) -> set[str]:
    """Return a distribution and all that it needs and that is installed here."""
    found: set[str] = set()
    todo = [name]
    while todo:
        at = todo.pop()
        if at in found:
            continue
        try:
            wants = metadata.requires(at) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(at)
        todo += [re.match(r"[\w.-]+", want)[0] for want in wants if "extra ==" not in want]
    return found


def clean_environment(folder: Path) -> Path:
    """Make an environment that has pip and, like Colab, torch; return its Python."""
    windows = sys.platform == "win32"
    venv.create(folder, with_pip=True, symlinks=not windows)
    python = folder / ("Scripts/python.exe" if windows else "bin/python")
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True)
    for name in closure("torch"):
        distribution = metadata.distribution(name)
        tops = {path.parts[0] for path in distribution.files or () if ".." not in path.parts}
        for top in tops - {"__pycache__"}:
            link = Path(site.stdout.strip()) / top
            if not link.exists():
                link.symlink_to(distribution.locate_file(top))
    return python


def checkout(folder: Path) -> Path:
    """Make a repository with one commit: the working tree, what is not ignored of it."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for arguments in (["init", "-q", "-b", "main"], ["add", "-A"], ["commit", "-q", "-m", "copy"]):
        subprocess.run([*git, *arguments], cwd=folder, check=True)
    return folder


@pytest.mark.slow  # makes an environment; downloads what chapters need but torch
def test_its_command_works_in_a_clean_environment(tmp_path):
    python = clean_environment(tmp_path / "env")
    source = checkout(tmp_path / "checkout")
    # the command stays as it is: git looks for the repository's address in a folder
    aside = os.environ | {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{source.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": repository.repository(),
        "PIP_NO_COMPILE": "1",  # quicker
    }
    command = [python, "-m", *command_of_the_cell()]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, timeout=300, env=aside
    )
    if done.returncode and re.search(OFFLINE, done.stderr):
        pytest.skip("NOT RUN: no package index can be reached, and Colab's cell needs one")
    assert done.returncode == 0, done.stderr[-3000:]
    ran = subprocess.run(
        [python, "-c", SCRIPT], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout)
    assert Path(found["minids"]).is_relative_to(tmp_path / "env"), "installed, not the checkout"
    assert not Path(found["torch"]).resolve().is_relative_to(tmp_path), "torch was not replaced"
    assert found["check"].startswith("○ start.1: not answered yet")
    assert found["shown"] > 1000
    assert found["picture"].startswith('<img alt="a picture"')
    wanted = [*source.glob("figures/*.js"), *source.glob("figures/*.css")]
    wanted += source.glob("minids/learn/experiments/*.json")
    assert {path.name for path in wanted} <= set(found["files"])
