"""Widgets for a class: `make demo` shows them in a browser, with no code on the page.

    python book/_tools/demo.py [CHAPTER] [--host ADDRESS] [--port PORT]

Each page of book/demos is one question and the chapter's widgets, served by Voila; whoever opens a
page gets a Python process of their own. By default this machine alone can open them; a class needs
`make demo HOST=0.0.0.0`.
"""

import argparse
import os
import socket
import subprocess
import sys
from pathlib import Path

from chapters import BOOK, chapter, stem_of

DEMOS = BOOK / "demos"
THEME = Path(__file__).parent / "demo_theme"


def demo(which: str) -> Path:
    """Return the demo of a chapter, or the folder of all; ValueError says which there are."""
    if not which:
        return DEMOS
    stem = stem_of(chapter(which))
    if not (path := DEMOS / f"{stem}.ipynb").exists():
        names = ", ".join(path.stem for path in sorted(DEMOS.glob("*.ipynb")))
        raise ValueError(f"no demo for chapter {stem!r}; there are {names}")
    return path


def command(path: Path, host: str, port: int) -> list[str]:
    """Return the command that serves a notebook or a folder of them."""
    return [
        sys.executable, "-m", "voila", str(path), "--no-browser", "--template=minids",
        "--classic-tree", f"--Voila.ip={host}", f"--port={port}", "--Voila.port_retries=0",
        "--Voila.log_level=WARN",
    ]  # fmt: skip


def environment() -> dict[str, str]:
    """Return the environment in which Voila finds the book's template."""
    places = [str(THEME), *filter(None, [os.environ.get("JUPYTER_PATH")])]
    # one thread a visitor: a class shares this machine
    return {"OMP_NUM_THREADS": "1"} | os.environ | {"JUPYTER_PATH": os.pathsep.join(places)}


def addresses(host: str, port: int) -> str:
    """Say where to open the pages, and who can."""
    if host in ("127.0.0.1", "localhost", "::1"):
        return (
            f"Open http://127.0.0.1:{port} - on this machine alone; a class: make demo HOST=0.0.0.0"
        )
    name = socket.gethostname() if host == "0.0.0.0" else host
    return (
        f"Open http://{name}:{port} or, if that name is not known, this machine's IP address.\n"
        "Everybody in this network can: each visitor starts a Python process here. Ctrl-C ends it."
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line until it is stopped; return 1 for a chapter without a demo."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("chapter", nargs="?", default="")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8866)
    options = parser.parse_args(arguments)
    try:
        path = demo(options.chapter)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print(addresses(options.host, options.port), flush=True)
    try:
        return subprocess.run(
            command(path, options.host, options.port), env=environment(), check=False
        ).returncode
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    raise SystemExit(main())
