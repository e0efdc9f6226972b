"""A folder that is replaced as a whole: its old content stays until the new one is on disk.

Paper   none.
Dims    none.
Book    book/14_train.ipynb             Kernel  none
"""

import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

_WRITTEN = re.compile(r"config\.json|model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_KEPT = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
         "generation_config.json", "chat_template.jinja")  # fmt: skip


@contextmanager
def replaced(folder: str | Path) -> Iterator[Path]:
    """Give an empty folder to fill; at the end it takes the place of `folder`, or nothing changes.

    ValueError if that would lose more than a checkpoint, OSError when writing fails. What belongs
    to a model beside its weights (tokenizer, ...) is carried over where it is not written anew.
    """
    folder = _replaceable(folder)
    new = _beside(folder, "new")
    try:
        shutil.rmtree(new, ignore_errors=True)  # of a save that was killed
        new.mkdir(parents=True)
        yield new
        for name in _KEPT:
            if (folder / name).is_file() and not (new / name).exists():
                shutil.copy2(folder / name, new)
        _swap(new, folder)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{folder} was not saved, what it held is untouched: {error}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def readable(folder: str | Path) -> Path:
    """Return the folder, or the older one that a save killed between its renames left beside it."""
    folder = Path(folder).absolute()
    if not folder.exists() and _beside(folder, "old").is_dir():
        warnings.warn(f"{folder}: its last save was killed, reading the one before", stacklevel=4)
        folder = _beside(folder, "old")
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    return folder


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.{what}")


def _replaceable(folder: str | Path) -> Path:
    """Return the absolute folder; ValueError if replacing it would lose more than a checkpoint."""
    folder = Path(folder).resolve()
    if not folder.exists() and _beside(folder, "old").is_dir():
        os.rename(_beside(folder, "old"), folder)  # finish what a killed save left
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, choose a folder")
    if Path.cwd().is_relative_to(folder):
        raise ValueError(f"{folder} is or holds the current folder, choose another one")
    for path in folder.iterdir() if folder.exists() else ():
        if not (path.is_file() and (path.name in _KEPT or _WRITTEN.fullmatch(path.name))):
            raise ValueError(f"{path} is no part of a checkpoint and would be lost: move it away")
    return folder


def _swap(new: Path, folder: Path) -> None:
    """Flush `new` to disk and put it in the place of `folder`."""
    _flush(*new.iterdir(), new)
    old = _beside(folder, "old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    try:
        os.rename(new, folder)
    except BaseException:
        if old.exists():
            os.rename(old, folder)
        raise
    _flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush(*paths: Path) -> None:
    for path in paths:
        if path.is_file() or os.name == "posix":  # Windows opens no folder
            descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
