"""The students' copy: `make student` writes dist/minids-student, and a tar.gz of it.

    python book/_tools/student.py [--out FOLDER]

It holds the files that git tracks, but for lecture pages and demos, and without the solution and
the wrong answers of any exercise. Checks, hints, notebooks, site and tests work in it; tests that
need a solution are skipped there. What is not committed is not in it.
"""

import argparse
import ast
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from chapters import BOOK

ROOT = BOOK.parent
NAME = "minids-student"
KEPT_BACK = ("book/teach/", "book/demos/")
EXERCISES = "minids/learn/exercises/"
BLANK = {"solution": '""', "wrong": "{}"}


def tracked(root: Path) -> list[str]:
    """Return the files that git tracks and that are there; ValueError outside of a repository."""
    listed = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-z"], capture_output=True, text=True, check=False
    )
    if listed.returncode:
        raise ValueError(f"the students' copy is made from a git repository: {listed.stderr}")
    return [name for name in listed.stdout.split("\0") if name and (root / name).is_file()]


def blanked(source: str) -> str:
    """Return the source of an exercise file with every `solution=` and `wrong=` emptied."""
    lines = source.encode().splitlines(keepends=True)  # positions in a syntax tree count bytes
    calls = [node for node in ast.walk(ast.parse(source)) if is_exercise(node)]
    cuts = [word.value for call in calls for word in call.keywords if word.arg in BLANK]
    words = {id(word.value): word.arg for call in calls for word in call.keywords}
    if len(cuts) != 2 * len(calls):
        raise ValueError("each Exercise must have solution= and wrong=, or one would be left in")
    for value in sorted(cuts, key=lambda node: (node.lineno, node.col_offset), reverse=True):
        first, last = value.lineno - 1, value.end_lineno - 1
        before, after = lines[first][: value.col_offset], lines[last][value.end_col_offset :]
        # brackets around a text of several lines are no part of it in the tree
        first, before = opening(lines, first, before)
        last, after = closing(lines, last, after)
        lines[first : last + 1] = [before + BLANK[words[id(value)]].encode() + after]
    result = b"".join(lines).decode()
    left = [w for n in ast.walk(ast.parse(result)) if is_exercise(n) for w in n.keywords]
    if any(w.arg in BLANK and ast.unparse(w.value) not in ("''", "{}") for w in left):
        raise ValueError("a solution or a wrong answer would be left in")
    return result


def opening(lines: list[bytes], first: int, before: bytes) -> tuple[int, bytes]:
    """Go back over an opening bracket to the keyword's equals sign."""
    while not before.rstrip().endswith(b"="):
        stripped = before.rstrip()
        if stripped.endswith(b"("):
            before = stripped[:-1]
        elif not stripped:
            first -= 1
            before = lines[first]
        else:
            raise ValueError(f"cannot read line {first + 1}: {before!r}")
    return first, before


def closing(lines: list[bytes], last: int, after: bytes) -> tuple[int, bytes]:
    """Go on over a closing bracket to the comma behind it."""
    while not after.lstrip().startswith(b","):
        stripped = after.lstrip()
        if stripped.startswith(b")"):
            after = stripped[1:]
        elif not stripped:
            last += 1
            after = lines[last]
        else:
            raise ValueError(f"cannot read line {last + 1}: {after!r}")
    return last, after


def is_exercise(node: ast.AST) -> bool:
    """Say whether a node of the syntax tree makes an Exercise."""
    return isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Exercise")


def build(root: Path, out: Path) -> Path:
    """Write the folder and the archive, anew; return the archive."""
    folder = out / NAME
    shutil.rmtree(folder, ignore_errors=True)
    for name in tracked(root):
        if name.startswith(KEPT_BACK):
            continue
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, place)
        if name.startswith(EXERCISES) and name.endswith(".py"):
            place.write_text(blanked(place.read_text(encoding="utf-8")), encoding="utf-8")
    archive = out / f"{NAME}.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder, NAME)
    return archive


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 outside of a git repository."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    options = parser.parse_args(arguments)
    try:
        archive = build(ROOT, options.out)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{archive}: {archive.stat().st_size / 1e6:.1f} MB, no solutions in it")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
