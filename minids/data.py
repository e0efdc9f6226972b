"""Text in two domains, split by documents, encoded, packed into rows that any run can ask for again.

Paper   DeepSeek-V3 (arXiv:2412.19437), section 4.1: document packing; FIM at rate 0.1 in PSM order.
Dims    T targets a row, so T1 = T + 1 tokens.
Book    book/14_train.ipynb             Kernel  none
Differs bos stands before every document, FIM or not (the report's layout starts at the begin token).
        Rows say which document a token is of; the report masks nothing between documents.
"""

import hashlib
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from minids.tokenizer import BOS, EOS, FIM_BEGIN, FIM_END, FIM_HOLE

HELDOUT = 0.05  # of the documents, and so about of the characters
LONGEST = 20_000  # characters of a document from a local file; longer ones are cut at line ends
_SALT = "6"  # of the split: with it the stdlib corpus of Python 3.11 comes close to HELDOUT
# hand-written code that every supported Python has, a few MB of it
_PACKAGES = (
    "asyncio", "collections", "concurrent", "email", "http", "importlib", "json", "logging",
    "multiprocessing", "re", "tomllib", "unittest", "urllib", "wsgiref", "xml", "zoneinfo",
)  # fmt: skip
_CODE = set(
    ".bash .c .cc .cpp .cs .css .cu .go .h .hpp .html .java .jl .js .json .jsx .kt .lua .m .php .pl .py"
    " .pyi .r .rb .rs .scala .sh .sql .swift .toml .ts .tsx .yaml .yml".split()
)


@dataclass(frozen=True)
class Corpus:
    """Documents by domain ("prose", "code"); no text stands twice, neither here nor there."""

    train: dict[str, list[str]]
    heldout: dict[str, list[str]]


@dataclass(frozen=True)
class Document:
    """A document with bos and eos as ids, and the length of its text, which losses are divided by."""

    tokens: list[int]
    n_chars: int
    n_bytes: int  # of UTF-8


def load_corpus(source: str | Path = "stdlib", max_chars: int | None = 4_000_000) -> Corpus:
    """Read documents, at most `max_chars` characters a domain, and hold some out for evaluation.

    "stdlib" is what comes with Python: the help topics and library source, so it differs between
    Pythons. A path is a text file or a folder, read in an order that neighbours do not share;
    programs (by suffix) are code. "hf:NAME" streams a public data set's split "train".
    Raises ValueError, FileNotFoundError or ImportError saying why there is no text; warns of
    files it skips.
    """
    if max_chars is not None and max_chars < 1:
        raise ValueError(f"max_chars must be at least 1 or None, got {max_chars}")
    skipped: list[str] = []
    if source == "stdlib":
        texts = _stdlib()
    elif str(source).startswith("hf:"):
        texts = _hugging_face(str(source).removeprefix("hf:"))
    else:
        texts = _local(Path(source), skipped)
    seen: set[str] = set()
    domains = {domain: _take(texts[domain], max_chars, seen) for domain in texts}
    if skipped:
        more = ", ..." if len(skipped) > 3 else ""
        warnings.warn(f"skipped {len(skipped)} files: {', '.join(skipped[:3])}{more}", stacklevel=2)
    splits = {domain: _split(domain, found) for domain, found in domains.items() if found}
    if not splits:
        raise ValueError(f"no text in {source!s}: files must be UTF-8, not binary, not empty")
    return Corpus(*({domain: split[side] for domain, split in splits.items()} for side in (0, 1)))


def _take(texts: Iterable[str], max_chars: int | None, seen: set[str]) -> list[str]:
    """Collect texts not seen before until there are `max_chars` characters; the last is cut there."""
    kept, left = [], max_chars
    for text in texts:
        text = text[:left]
        if text.strip() and text not in seen:
            seen.add(text)
            kept.append(text)
            left = None if left is None else left - len(text)
        if left == 0:
            break
    return kept


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _split(domain: str, texts: list[str]) -> tuple[list[str], list[str]]:
    """Hold out the documents whose hash is low: the same ones whatever stands beside them.

    Only where that would leave a side empty, the lowest (or all but the highest) is held out.
    """
    if len(texts) < 2:
        raise ValueError(f"domain {domain!r} needs two different documents, one to hold out, got 1")
    ranks = [_hash(_SALT + text) for text in texts]
    limit = min(max(int(HELDOUT * 2**64), min(ranks) + 1), max(ranks))
    low = [text for text, rank in zip(texts, ranks, strict=True) if rank < limit]
    return [text for text, rank in zip(texts, ranks, strict=True) if rank >= limit], low


def _stdlib() -> dict[str, Iterable[str]]:
    """Return help topics, without those that are a part of another, and a choice of packages."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ValueError("this Python has no pydoc_data: name a text file or folder") from None
    prose, seen = [], set()
    for text in sorted(topics.values(), key=lambda text: (-len(text), text)):
        lines = [line.strip() for line in text.splitlines() if len(line.strip()) >= 30]
        if sum(line in seen for line in lines) <= len(lines) / 2:
            prose.append(text)
            seen.update(lines)
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for package in _PACKAGES for path in (root / package).rglob("*.py")]
    files = [path for path in files if not {"test", "tests"} & set(path.parts)]
    return {"prose": sorted(prose, key=_hash), "code": _read_all(files, root, [])}


def _local(source: Path, skipped: list[str]) -> dict[str, Iterable[str]]:
    if not source.exists():
        raise FileNotFoundError(f"no file or folder {source}: give one, or 'stdlib', or 'hf:NAME'")
    root = source.parent if source.is_file() else source
    files = [source] if source.is_file() else [path for path in source.rglob("*") if path.is_file()]
    files = [path for path in files if not _hidden(path.relative_to(root))]
    code = {path for path in files if path.suffix.lower() in _CODE}
    sides = {"prose": [path for path in files if path not in code], "code": sorted(code)}
    return {domain: _cut(list(_read_all(paths, root, skipped))) for domain, paths in sides.items()}


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def _read_all(paths: list[Path], root: Path, skipped: list[str]) -> Iterator[str]:
    """Yield the text of files; note in `skipped` those that have none."""
    for path in sorted(paths, key=lambda path: _hash(path.relative_to(root).as_posix())):
        try:
            data = path.read_bytes()
            if not data.strip() or b"\0" in data:
                raise ValueError("binary" if data.strip() else "empty")
            yield data.decode("utf-8-sig")
        except (OSError, ValueError) as error:
            reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else error
            skipped.append(f"{path} ({reason})")


def _cut(texts: list[str]) -> Iterator[str]:
    """Yield documents of at most LONGEST characters; a lone one comes in about 20 parts."""
    longest = LONGEST if len(texts) > 1 else min(LONGEST, sum(map(len, texts)) // 20 + 1)
    for text in texts:
        while len(text) > longest:
            end = text.rfind("\n", 0, longest) + 1 or longest
            yield text[:end]
            text = text[end:]
        yield text


def _hugging_face(name: str) -> dict[str, Iterable[str]]:
    try:
        import datasets
    except ImportError:
        raise ImportError("hf:NAME needs the library datasets: pip install datasets") from None
    try:
        rows = datasets.load_dataset(name, split="train", streaming=True)
        first = next(iter(rows))
    except Exception as error:
        raise ValueError(f"cannot read hf:{name}: {error}") from error
    column = next((key for key in ("text", "content", "code") if key in first), None)
    if column is None:
        raise ValueError(f"hf:{name} needs a column text, content or code, got {sorted(first)}")
    return {"prose" if column == "text" else "code": (row[column] for row in rows)}


def split_fim(text: str, rate: float, seed: int) -> tuple[str, str, str] | None:
    """Cut a document at two random characters into prefix, middle and suffix; None: leave it whole."""
    rng = np.random.default_rng([seed, _hash(text)])
    if rng.random() >= rate:
        return None
    start, end = sorted(rng.integers(0, len(text) + 1, size=2).tolist())
    return text[:start], text[start:end], text[end:]


def encode(
    texts: Sequence[str], tokenizer: Tokenizer, fim_rate: float = 0.0, seed: int = 0
) -> list[Document]:
    """Put each text between bos and eos; a share `fim_rate` of them in prefix-suffix-middle order.

    What happens to a text depends on the text and `seed` alone.
    """
    if not 0 <= fim_rate <= 1:
        raise ValueError(f"fim_rate must lie in 0..1, got {fim_rate}")

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    documents = []
    for text in tqdm(texts, desc="encode", unit=" documents", delay=3, leave=False):
        if (pieces := split_fim(text, fim_rate, seed)) is None:
            tokens = [BOS, *ids(text), EOS]
        else:
            prefix, middle, suffix = map(ids, pieces)
            tokens = [BOS, FIM_BEGIN, *prefix, FIM_HOLE, *suffix, FIM_END, *middle, EOS]
        documents.append(Document(tokens, len(text), len(text.encode())))
    return documents


def encode_train(
    corpus: Corpus, tokenizer: Tokenizer, fim_rate: float = 0.1, seed: int = 0
) -> list[list[int]]:
    """Return the training documents of all domains as ids; FIM is for code alone."""
    encoded = []
    for domain, texts in corpus.train.items():
        encoded += encode(texts, tokenizer, fim_rate if domain == "code" else 0.0, seed)
    return [document.tokens for document in encoded]


class Packed:
    """An endless stream of rows: every epoch all documents, end to end, in a new order.

    Row n holds tokens nT..nT+T of the stream, so each token is a target once an epoch; the stream
    runs on from epoch to epoch, nothing is dropped at a tail. Raises ValueError for documents that
    do not fill a row, and for an empty one.
    """

    def __init__(self, documents: list[list[int]], seq_len: int, seed: int):
        lengths = np.array([len(document) for document in documents], dtype=np.int64)
        if seq_len < 1 or seed < 0:
            raise ValueError(f"seq_len must be >= 1 and seed >= 0, got {seq_len} and {seed}")
        if not lengths.all():
            raise ValueError("every document must have at least one token, got an empty one")
        if lengths.sum() <= seq_len:
            raise ValueError(
                f"a row needs {seq_len + 1} tokens, all documents have {lengths.sum()}"
            )
        self.seq_len, self.seed = seq_len, seed
        self.n_tokens = int(lengths.sum())  # of an epoch
        self._flat = np.concatenate([np.asarray(document) for document in documents])
        self._lengths, self._starts = lengths, lengths.cumsum() - lengths

    def rows(
        self, start: int, count: int
    ) -> tuple[Int[Tensor, "count T1"], Int[Tensor, "count T1"]]:
        """Return rows start..start+count-1 and, of each token, the number of its document in the row."""
        if start < 0 or count < 1:
            raise ValueError(f"rows need start >= 0 and count >= 1, got {start} and {count}")
        first = np.arange(start, start + count)[:, None] * self.seq_len
        epoch, at = np.divmod(first + np.arange(self.seq_len + 1), self.n_tokens)
        tokens, slot = np.empty_like(at), np.empty_like(at)
        for number in range(epoch[0, 0], epoch[-1, -1] + 1):
            inside = epoch == number
            tokens[inside], slot[inside] = self._read(number, at[inside])
        return torch.from_numpy(tokens), torch.from_numpy(slot - slot[:, :1])

    def _read(self, epoch: int, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens at places of an epoch, and which document of the stream they are of."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self._lengths))
        ends = self._lengths[order].cumsum()
        turn = np.searchsorted(ends, at, side="right")
        document = order[turn]
        index = self._starts[document] + at - (ends[turn] - self._lengths[document])
        return self._flat[index], epoch * len(order) + turn
