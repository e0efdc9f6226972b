"""Chapters by their number or name: what `CH=04` means for every tool."""

from pathlib import Path

BOOK = Path(__file__).resolve().parents[1]


def chapters(book: Path = BOOK) -> dict[str, Path]:
    """Return the notebook of each chapter by its stem, in reading order."""
    return {path.stem: path for path in sorted(book.glob("[0-9][0-9]_*.ipynb"))}


def stem_of(path: Path) -> str:
    """Return the idea a chapter is about: `mla` of 04_mla.ipynb."""
    return path.stem.partition("_")[2]


def chapter(which: str, book: Path = BOOK) -> Path:
    """Return the notebook of 04, 4, mla or 04_mla; ValueError says which chapters there are."""
    known = chapters(book)
    for path in known.values():
        number, _, stem = path.stem.partition("_")
        if which in (number, str(int(number)), stem, path.stem):
            return path
    names = ", ".join(stem.replace("_", " ") for stem in known)
    asked = f"no chapter {which!r}" if which else "which chapter? Say it with CH=04 or CH=mla"
    raise ValueError(f"{asked}; there are {names}")
