"""Text in two domains, split by documents, encoded, and packed into rows found by their number.

Paper   DeepSeek-V3 (arXiv:2412.19437), section 4.1: document packing; FIM, rate 0.1, PSM order.
Dims    T targets a row, so T1 = T + 1 tokens.
Book    book/14_train.ipynb             Kernel  none
Differs bos stands before every document, FIM or not (in the report FIM begins with its own token).
        Rows number their documents, for a mask between them; the report masks nothing.
"""

import importlib.util
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from minids.tokenizer import BOS, EOS, FIM_BEGIN, FIM_END, FIM_HOLE, SPECIAL_TOKENS

_Rows = Int[Tensor, "count T1"]
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


class Document(NamedTuple):
    """The ids of one document, bos and eos included, and the size of its text (in UTF-8)."""

    tokens: list[int]
    n_chars: int
    n_bytes: int


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


def _hash(text: str) -> int:
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
    rank = {text: _hash(_SALT + text) for text in texts}
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
    return {"prose": sorted(prose, key=_hash), "code": _read(files, root, [])}


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
    for path in sorted(paths, key=lambda path: _hash(path.relative_to(root).as_posix())):
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


def split_fim(text: str, rate: float, seed: int) -> list[str]:
    """Cut a share `rate` of texts in prefix, middle, suffix; which and where: by text and seed."""
    rng = np.random.default_rng([seed, _hash(text)])
    if rng.random() >= rate:
        return [text]
    start, end = sorted(rng.integers(0, len(text) + 1, size=2).tolist())
    return [text[:start], text[start:end], text[end:]]


def encode(
    texts: Sequence[str], tokenizer: Tokenizer, fim_rate: float = 0.0, seed: int = 0
) -> list[Document]:
    """Put each text between bos and eos, a share `fim_rate` in prefix-suffix-middle order.

    Raises ValueError for a tokenizer with other special ids than minids'.
    """
    special = SPECIAL_TOKENS[: FIM_END + 1 if fim_rate else EOS + 1]
    if [tokenizer.id_to_token(id) for id in range(len(special))] != special:
        raise ValueError(f"tokenizer must have {special} as ids 0, 1, ...")
    documents = []
    for text in tqdm(texts, desc="encode", unit=" documents", delay=3, leave=False):
        pieces = tokenizer.encode_batch(split_fim(text, fim_rate, seed), add_special_tokens=False)
        ids, *others = [piece.ids for piece in pieces]  # text order: prefix, middle, suffix
        if others:
            ids = [FIM_BEGIN, *ids, FIM_HOLE, *others[1], FIM_END, *others[0]]
        documents.append(Document([BOS, *ids, EOS], len(text), len(text.encode())))
    return documents


def encode_train(
    corpus: Corpus, tokenizer: Tokenizer, fim_rate: float = 0.1, seed: int = 0
) -> list[list[int]]:
    """Return the ids of the training documents; FIM is for code alone."""
    prose = encode(corpus.train.get("prose", []), tokenizer)
    code = encode(corpus.train.get("code", []), tokenizer, fim_rate, seed)
    return [document.tokens for document in prose + code]


class Packed:
    """An endless stream of rows: each epoch all documents, end to end, in a new order.

    Row n is tokens nT..nT+T of the stream, which runs on from epoch to epoch: each token is once
    an epoch a target, no tail is dropped, and a row depends on documents, seed and n alone.
    Raises ValueError for an empty document, and when all documents do not fill one row.
    """

    def __init__(self, documents: list[list[int]], seq_len: int, seed: int):
        self._lengths = np.array([len(document) for document in documents], dtype=np.int64)
        self.n_tokens = int(self._lengths.sum())  # of an epoch
        if seq_len < 1 or seed < 0:
            raise ValueError(f"seq_len must be >= 1 and seed >= 0, got {seq_len} and {seed}")
        if self.n_tokens <= seq_len or not self._lengths.all():
            need = f"must not be empty and must fill a row of {seq_len + 1} tokens"
            raise ValueError(f"documents {need}, got lengths {self._lengths[:9]}")
        self.seq_len, self.seed = seq_len, seed
        self._flat = np.concatenate(documents)
        self._starts = self._lengths.cumsum() - self._lengths

    def rows(self, start: int, count: int) -> tuple[_Rows, _Rows]:
        """Return rows start, start+1, ... and each token's document, numbered within its row."""
        if start < 0 or count < 1:
            raise ValueError(f"rows need start >= 0 and count >= 1, got {start} and {count}")
        first = np.arange(start, start + count)[:, None] * self.seq_len
        epoch, place = np.divmod(first + np.arange(self.seq_len + 1), self.n_tokens)
        tokens, documents = np.empty_like(place), np.empty_like(place)
        for number in range(epoch[0, 0], epoch[-1, -1] + 1):
            at = epoch == number
            tokens[at], documents[at] = self._epoch(number, place[at])
        return torch.from_numpy(tokens), torch.from_numpy(documents - documents[:, :1])

    def _epoch(self, epoch: int, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens at places of an epoch, and their documents, numbered in the stream."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self._lengths))
        ends = self._lengths[order].cumsum()
        turn = np.searchsorted(ends, place, side="right")
        index = self._starts[order[turn]] + place - (ends - self._lengths[order])[turn]
        return self._flat[index], epoch * len(order) + turn
