"""Documents in two domains, prose and code, and a split that shares none of them.

Paper   DeepSeek-V3 (arXiv:2412.19437), section 4.1: its own data are not published.
Dims    none; sizes in characters.
Book    book/14_train.ipynb             Kernel  none
"""

import importlib.util
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

HELDOUT = 0.05  # of the documents, so about of the characters
LONGEST = 20_000  # characters; a longer local file becomes several documents, cut at line ends
_SALT = "6"  # of the split's hash: the first that holds out 4.5-5.5 % of either stdlib domain
# hand-written code, a few MB, without tests and tables
_PACKAGES = """asyncio collections concurrent email http importlib json logging multiprocessing re
    tomllib unittest urllib wsgiref xml zoneinfo""".split()
_CODE = """.c .cc .cpp .cs .css .cu .go .h .hpp .html .java .jl .js .json .kt .lua .php .py .pyi .r
    .rb .rs .scala .sh .sql .swift .ts .tsx""".split()


class Corpus(NamedTuple):
    """Documents by domain, "prose" and "code"; no text is in it twice."""

    train: dict[str, list[str]]
    heldout: dict[str, list[str]]


def load_corpus(source: str | Path = "stdlib", max_chars: int = 4_000_000) -> Corpus:
    """Read at most `max_chars` characters a domain and hold about 5 % of the documents out.

    "stdlib" is Python's help topics and library source, so it differs between Pythons. A path names
    a file or folder of UTF-8 text; programs are told by their suffix. "hf:NAME" streams the split
    "train" of a public data set. Raises ValueError, FileNotFoundError or ImportError saying why
    there is no text; warns of skipped files.
    """
    if max_chars < 1:
        raise ValueError(f"max_chars must be at least 1, got {max_chars}")
    name, skipped, seen = str(source), [], set()
    if name == "stdlib":
        domains = _stdlib()
    elif name.startswith("hf:"):
        domains = _hugging_face(name.removeprefix("hf:"))
    else:
        domains = _local(Path(source), skipped)
    corpus = Corpus({}, {})
    for domain, texts in domains.items():
        if documents := list(_take(texts, max_chars, seen)):
            corpus.train[domain], corpus.heldout[domain] = _split(domain, documents)
    if skipped:
        warnings.warn(f"skipped {len(skipped)} files: {', '.join(skipped[:9])}", stacklevel=2)
    if not corpus.train:
        raise ValueError(f"no text in {name}: name a UTF-8 file that is not empty, or a folder")
    return corpus


def _take(texts: Iterable[str], max_chars: int, seen: set[str]) -> Iterator[str]:
    """Yield texts not `seen` before until there are `max_chars` characters, cutting the last."""
    for text in texts:
        if (text := text[:max_chars]).strip() and text not in seen:
            seen.add(text)
            yield text
            max_chars -= len(text)
        if not max_chars:
            return


def text_hash(text: str) -> int:
    """Return 64 bits that are the same in every process."""
    return int.from_bytes(sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def _cut(text: str, longest: int) -> Iterator[str]:
    start = 0
    while len(text) - start > longest:
        end = text.rfind("\n", start, start + longest) + 1 or start + longest
        yield text[start:end]
        start = end
    yield text[start:]


def _split(domain: str, texts: list[str]) -> tuple[list[str], list[str]]:
    """Hold out documents of low hash, whatever stands beside them, but leave neither side empty."""
    if len(texts) == 1:  # about 20 parts of whole lines
        line = max(map(len, texts[0].split("\n"))) + 1
        texts = list(dict.fromkeys(_cut(texts[0], max(line, len(texts[0]) // 20))))
    if len(texts) == 1:
        raise ValueError(f"{domain} needs two different documents, one to hold out: give more text")
    rank = {text: text_hash(_SALT + text) for text in texts}
    limit = min(max(int(HELDOUT * 2**64), min(rank.values()) + 1), max(rank.values()))
    return [t for t in texts if rank[t] >= limit], [t for t in texts if rank[t] < limit]


def _stdlib() -> dict[str, Iterable[str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for package in _PACKAGES for path in (root / package).rglob("*.py")]
    files = [path for path in files if not {"test", "tests"} & set(path.parts)]
    if not files or not importlib.util.find_spec("pydoc_data"):
        raise ValueError("this Python lacks its help topics or source: name a file or folder")
    topics = importlib.import_module("pydoc_data.topics").topics.values()
    prose, seen = [], set()
    for text in sorted(topics, key=len, reverse=True):
        lines = {line.strip() for line in text.splitlines() if len(line.strip()) >= 30}
        if len(lines & seen) <= len(lines) / 2:  # many topics are a section of a longer one
            prose.append(text)
            seen |= lines
    return {"prose": sorted(prose, key=text_hash), "code": _read(files, root, [])}


def _local(source: Path, skipped: list[str]) -> dict[str, Iterable[str]]:
    if not source.exists():
        raise FileNotFoundError(f"no file or folder {source}; other sources: stdlib, hf:NAME")
    sides: dict[str, list[Path]] = {"prose": [], "code": []}
    for path in [source] if source.is_file() else source.rglob("*"):
        hidden = re.search(r"(^|/)(\.[^/]|__pycache__)", path.relative_to(source).as_posix())
        if path.is_file() and not hidden:
            sides["code" if path.suffix.lower() in _CODE else "prose"].append(path)
    texts = {domain: _read(paths, source, skipped) for domain, paths in sides.items()}
    return {d: (part for text in texts[d] for part in _cut(text, LONGEST)) for d in texts}


def _read(paths: list[Path], root: Path, skipped: list[str]) -> Iterator[str]:
    """Yield the files' texts in an order that mixes folders; note in `skipped` why one has none."""
    for path in sorted(paths, key=lambda path: text_hash(path.relative_to(root).as_posix())):
        try:
            text = path.read_bytes().decode("utf-8-sig")
            if "\0" in text or not text.strip():
                raise ValueError("binary" if text.strip() else "empty")
            yield text
        except (OSError, ValueError) as error:
            reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else error
            skipped.append(f"{path} ({reason})")


def _hugging_face(name: str) -> dict[str, Iterable[str]]:
    try:
        datasets = importlib.import_module("datasets")
        rows = datasets.load_dataset(name, split="train", streaming=True)
        first = next(iter(rows))
    except ImportError as error:
        raise ImportError(f"hf:{name} needs 'pip install datasets': {error}") from None
    except Exception as error:  # whatever the network and the library raise
        raise ValueError(f"cannot read hf:{name}, see name and network: {error!r}") from error
    column = next((key for key in ("text", "content", "code") if key in first), None)
    if column is None:
        raise ValueError(f"hf:{name} needs a column text, content or code, got {sorted(first)}")
    return {"prose" if column == "text" else "code": (row[column] for row in rows)}
