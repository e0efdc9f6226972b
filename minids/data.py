"""Documents as tokens, some with a hole to fill, packed into rows found by their number.

Paper   DeepSeek-V3 (arXiv:2412.19437), section 4.1: document packing; FIM, rate 0.1, PSM order.
Dims    T targets a row, so T1 = T + 1 tokens.
Book    book/14_train.ipynb             Kernel  none
Differs bos stands before every document, FIM or not (in the report FIM begins with its own token).
        Rows number their documents, for a mask between them; the report masks nothing.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from minids.files.corpus import Corpus, text_hash
from minids.tokenizer import BOS, EOS, FIM_BEGIN, FIM_END, FIM_HOLE, SPECIAL_TOKENS

_Rows = Int[Tensor, "count T1"]


class Document(NamedTuple):
    """The ids of one document, bos and eos included, and the size of its text (in UTF-8)."""

    tokens: list[int]
    n_chars: int
    n_bytes: int


def split_fim(text: str, rate: float, seed: int) -> list[str]:
    """Cut a share `rate` of texts in prefix, middle, suffix; which and where: by text and seed."""
    rng = np.random.default_rng([seed, text_hash(text)])
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
    for text in tqdm(texts, desc="encode", unit=" documents", delay=3, leave=False, disable=None):
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

    def shuffled(self, start: int, count: int) -> tuple[_Rows, _Rows]:
        """Return rows start, start+1, ... of the stream shuffled by epochs, or by 16,384 rows.

        Neighbours in the stream share a document: a batch of them would be one text.
        """
        size, picked = min(16_384, self.n_tokens // self.seq_len), []
        for block, place in (divmod(number, size) for number in range(start, start + count)):
            order = np.random.default_rng([self.seed, block, 1]).permutation(size)
            picked.append(self.rows(block * size + int(order[place]), 1))
        tokens, documents = zip(*picked, strict=True)
        return torch.cat(tokens), torch.cat(documents)

    def _epoch(self, epoch: int, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens at places of an epoch, and their documents, numbered in the stream."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self._lengths))
        ends = self._lengths[order].cumsum()
        turn = np.searchsorted(ends, place, side="right")
        index = self._starts[order[turn]] + place - (ends - self._lengths[order])[turn]
        return self._flat[index], epoch * len(order) + turn
