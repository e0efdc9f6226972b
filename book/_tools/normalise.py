"""Bring notebooks into normal form, so that an unchanged chapter is an unchanged file.

    python book/_tools/normalise.py [--check | --execute [--fresh]] [FILE.ipynb ...]

Without files: every chapter. `--check` writes nothing and exits 1 where a file would change.
`--execute` runs the cells first; outputs of cells tagged `nbval-ignore-output` differ from machine
to machine and stay as stored, unless `--fresh` asks for the new ones. Widgets that need a kernel
are kept as the text and the HTML beside them: their models have random names and no life in a file.
"""

import argparse
import json
import sys
from copy import deepcopy
from pathlib import Path
from time import perf_counter
from typing import Any

from tqdm import tqdm

BOOK = Path(__file__).resolve().parents[1]
KEPT_METADATA = ("mystnb", "slideshow", "tags")
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
IGNORED = "nbval-ignore-output"
WIDGET = "application/vnd.jupyter.widget-view+json"


def as_text(value: str | list[str]) -> str:
    """Return multi-line text as one string: nbformat allows both, and tools differ."""
    return value if isinstance(value, str) else "".join(value)


def normalise(notebook: dict[str, Any]) -> dict[str, Any]:
    """Return a notebook in normal form: ids, counts, metadata, lists of lines; outputs stay."""
    cells, count = [], 0
    for number, cell in enumerate(notebook["cells"], start=1):
        metadata = {key: cell["metadata"][key] for key in KEPT_METADATA if key in cell["metadata"]}
        kept = {
            "cell_type": cell["cell_type"],
            "id": f"c{number:03}",
            "metadata": metadata,
            "source": as_text(cell["source"]).splitlines(keepends=True),
        }
        if "attachments" in cell:
            kept["attachments"] = cell["attachments"]
        if cell["cell_type"] == "code":
            executed = cell.get("execution_count") is not None
            count += executed
            kept["execution_count"] = count if executed else None
            outputs = without_widgets(merge_streams(cell["outputs"]))
            kept["outputs"] = [normalise_output(output, count) for output in outputs]
        cells.append(kept)
    return {"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}


def normalise_output(output: dict[str, Any], count: int) -> dict[str, Any]:
    """Number a result as its cell; keep text as lists of lines."""
    output = deepcopy(output)
    if "execution_count" in output:
        output["execution_count"] = count
    if "text" in output:
        output["text"] = as_text(output["text"]).splitlines(keepends=True)
    for kind, data in output.get("data", {}).items():
        if kind.startswith("text/") or kind == "image/svg+xml":
            output["data"][kind] = as_text(data).splitlines(keepends=True)
    return output


def merge_streams(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join neighbouring pieces of one stream: where a stream is cut is a matter of timing."""
    merged: list[dict[str, Any]] = []
    for output in outputs:
        last = merged[-1] if merged else {}
        if output["output_type"] == "stream" and output.get("name") == last.get("name"):
            merged[-1] = last | {"text": as_text(last["text"]) + as_text(output["text"])}
        else:
            merged.append(output)
    return merged


def without_widgets(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop the models of widgets, and the outputs that hold nothing else."""
    kept = []
    for output in outputs:
        if WIDGET in output.get("data", {}):
            data = {kind: text for kind, text in output["data"].items() if kind != WIDGET}
            meta = {kind: value for kind, value in output["metadata"].items() if kind != WIDGET}
            output = output | {"data": data, "metadata": meta}
        if output.get("data") != {}:
            kept.append(output)
    return kept


def keep_ignored(new: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """Return `new` with the stored outputs of ignored cells whose source is still the same."""
    kept = {
        as_text(cell["source"]): cell["outputs"]
        for cell in stored["cells"]
        if IGNORED in cell["metadata"].get("tags", []) and cell.get("outputs")
    }
    cells = [
        cell | {"outputs": kept[as_text(cell["source"])]}
        if IGNORED in cell["metadata"].get("tags", []) and as_text(cell["source"]) in kept
        else cell
        for cell in new["cells"]
    ]
    return new | {"cells": cells}


def execute(notebook: dict[str, Any], path: Path) -> dict[str, Any]:
    """Run a notebook from top to bottom; a cell that raises ends it with nbclient's error."""
    import nbformat
    from nbclient import NotebookClient

    node = nbformat.reads(json.dumps(normalise(notebook)), as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    total = sum(cell.cell_type == "code" for cell in node.cells)
    with tqdm(total=total, unit="cell", leave=False, disable=None) as bar:  # on a terminal alone
        NotebookClient(
            node, timeout=180, kernel_name="python3", resources=resources,
            on_cell_complete=lambda cell, cell_index: bar.update(),
        ).execute()  # fmt: skip
    return json.loads(nbformat.writes(node))


def run(path: Path, stored: dict[str, Any], fresh: bool) -> dict[str, Any]:
    """Run a chapter, say how long it took, and return it with what is kept of its old outputs."""
    start = perf_counter()
    print(f"{path.name:<28} ", end="", flush=True)
    notebook = execute(stored, path)
    print(f"{perf_counter() - start:6.1f} s")
    return notebook if fresh else keep_ignored(notebook, stored)


def to_text(notebook: dict[str, Any]) -> str:
    """Return the file's text: keys sorted, one space of indentation, a final newline."""
    return json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 where --check finds a file that would change."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE.ipynb")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="write nothing, exit 1 for a change")
    mode.add_argument("--execute", action="store_true", help="run the cells first")
    parser.add_argument("--fresh", action="store_true", help="with --execute: all outputs new")
    options = parser.parse_args(arguments)
    changed = 0
    for path in options.files or sorted(BOOK.glob("*.ipynb")):
        text = path.read_text(encoding="utf-8")
        stored = notebook = json.loads(text)
        if options.execute:
            notebook = run(path, stored, options.fresh)
        if (wanted := to_text(normalise(notebook))) != text:
            changed += 1
            print(f"{path}: {'not in normal form' if options.check else 'written'}")
            if not options.check:
                path.write_text(wanted, encoding="utf-8", newline="\n")
    if options.check and changed:
        print(f"run: python {Path(__file__).name} FILE.ipynb", file=sys.stderr)
    return int(options.check and changed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
