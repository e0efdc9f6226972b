"""Carry the repository's address from pyproject.toml to every link that names it.

    python book/_tools/repository.py https://github.com/NAME/minids
    python book/_tools/repository.py --check

The address is written once, under [project.urls]. Links to Colab, to Binder and to files hold the
same owner and name in other words, and notebooks cannot compute a link: this rewrites them all.
`--check` writes nothing and exits 1 where a link leads elsewhere.
"""

import argparse
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = re.compile(r"https://github\.com/([\w.-]+)/([\w.-]+?)(?:\.git)?/?")
SUFFIXES = {".cff", ".ipynb", ".json", ".md", ".py", ".toml", ".txt", ".yml"}
# the ways to write owner and name of a repository of ours, all of which keep the name
HOSTS = (
    r"github\.com/",
    r"colab\.research\.google\.com/github/",
    r"mybinder\.org/(?:badge/|v2/gh/)",
    r"raw\.githubusercontent\.com/",
)


def repository(root: Path = ROOT) -> str:
    """Return the address that pyproject.toml names; ValueError for one that is not on GitHub."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return check_address(project["urls"]["Repository"])


def check_address(address: str) -> str:
    """Return the address without a slash or .git; ValueError for any other form."""
    match = ADDRESS.fullmatch(address)
    if match is None:
        raise ValueError(f"the address must read https://github.com/OWNER/NAME, got {address!r}")
    return f"https://github.com/{match[1]}/{match[2]}"


def pattern(name: str) -> re.Pattern[str]:
    """Return what finds a link to a repository of this name, whoever owns it."""
    return re.compile(rf"({'|'.join(HOSTS)})([\w.-]+)/({re.escape(name)})(?![\w-])")


def files(root: Path) -> Iterator[Path]:
    """Yield the tracked texts that may hold a link; the tests name addresses of their own."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root, capture_output=True, check=True, text=True,
    ).stdout  # fmt: skip
    for name in sorted(filter(None, listed.split("\0"))):
        path = root / name
        if path.suffix in SUFFIXES and not name.startswith("tests/") and path.is_file():
            yield path


def wrong_links(root: Path) -> Iterator[str]:
    """Yield each link that names another owner than pyproject.toml does."""
    owner, name = repository(root).rsplit("/", 2)[1:]
    for path in files(root):
        for match in pattern(name).finditer(path.read_text(encoding="utf-8")):
            if match[2] != owner and path != Path(__file__):
                yield f"{path.relative_to(root)}: {match[0]} is not of {owner}"


def move(root: Path, address: str) -> Iterator[Path]:
    """Rewrite every link, pyproject.toml's too, and yield the files that changed."""
    old_name = repository(root).rsplit("/", 1)[1]
    owner, name = check_address(address).rsplit("/", 2)[1:]
    for path in files(root):
        if path == Path(__file__):
            continue
        text = path.read_text(encoding="utf-8")
        new = pattern(old_name).sub(rf"\g<1>{owner}/{name}", text)
        if new != text:
            path.write_text(new, encoding="utf-8", newline="\n")
            yield path


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Run the command line; return 1 where --check finds a link that leads elsewhere."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("address", nargs="?", help="https://github.com/NAME/minids")
    task.add_argument("--check", action="store_true", help="write nothing, exit 1 for a wrong link")
    options = parser.parse_args(arguments)
    if options.check:
        wrong = list(wrong_links(root))
        print(*wrong or [f"every link leads to {repository(root)}"], sep="\n")
        return int(bool(wrong))
    try:
        changed = list(move(root, options.address))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(*(path.relative_to(root) for path in changed), sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
