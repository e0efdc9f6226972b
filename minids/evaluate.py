"""What a model scores on text it has not seen: nats a character and bits a byte, by domain.

Paper   DeepSeek-V3 (arXiv:2412.19437), section 4.4.1: bits a byte; 4.5.3: expert load by domain.
Dims    B windows, T tokens, E routed experts.
Book    book/14_train.ipynb             Kernel  none
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Int
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minids.balance import expert_load
from minids.config import Config
from minids.data import encode
from minids.model import Transformer


class Score(NamedTuple):
    """Sums over whole documents: every token but bos is a target once, eos too."""

    nats: float
    hits: int  # targets that were the most probable token
    tokens: int
    chars: int
    bytes: int  # of UTF-8
    load: Int[Tensor, "layers E"]  # how often each expert of the MoE layers was chosen

    @property
    def nats_per_char(self) -> float:
        return self.nats / self.chars

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    @property
    def accuracy(self) -> float:
        return self.hits / self.tokens


def evaluate(
    model: Transformer,
    tokenizer: Tokenizer,
    texts: Mapping[str, Sequence[str]],
    *,
    window: int | None = None,
    batch: int = 16,
) -> dict[str, Score]:
    """Return the score of each domain's texts and, under "all", of all their characters together.

    The model reads `window` tokens at once (default `max_seq_len`). A longer document is read in
    windows half a window apart: the first scores all its targets, each later one its second half,
    so that a target sees at least half a window. Raises ValueError where there is no text.
    """
    most = model.cfg.max_seq_len
    window = most if window is None else window
    if not 2 <= window <= most:
        raise ValueError(f"window must lie in 2..{most}, got {window}")
    check_tokenizer(tokenizer, model.cfg)
    if empty := [domain for domain, documents in texts.items() if not any(documents)] or not texts:
        raise ValueError(f"no text to evaluate in {empty if texts else 'texts'}")
    training = model.training
    model.eval()
    try:
        scores = {domain: _score(model, tokenizer, documents, window, batch)
                  for domain, documents in texts.items()}  # fmt: skip
    finally:
        model.train(training)
    nats, hits, tokens, chars, n_bytes, load = zip(*scores.values(), strict=True)
    total_load = torch.stack(load).sum(0)
    pooled = Score(sum(nats), sum(hits), sum(tokens), sum(chars), sum(n_bytes), total_load)
    return scores | {"all": pooled}


def check_tokenizer(tokenizer: Tokenizer, cfg: Config) -> None:
    """Raise ValueError for a tokenizer with more words than the model knows."""
    if (words := tokenizer.get_vocab_size()) > cfg.vocab_size:
        raise ValueError(f"vocab_size must hold the tokenizer's {words}, got {cfg.vocab_size}")


@torch.no_grad()
def _score(model: Transformer, tokenizer, texts: Sequence[str], window: int, batch: int) -> Score:
    documents = encode(texts, tokenizer)
    pieces = [piece for document in documents for piece in _windows(document.tokens, window)]
    pieces.sort(key=lambda piece: len(piece[0]))  # rows of one batch need little padding
    chosen: list[Tensor] = []  # expert ids of each MoE layer
    hooks = [router.register_forward_hook(lambda _router, _x, routed: chosen.append(routed[1]))
             for router in model.routers]  # fmt: skip
    nats, hits, n_tokens, load = 0.0, 0, 0, torch.zeros(0, dtype=torch.int64)
    for some in (pieces[at : at + batch] for at in range(0, len(pieces), batch)):
        tokens, targets = (_pad(part).to(model.embed.device) for part in zip(*some, strict=True))
        chosen.clear()
        logits = model(tokens.clamp(min=0))[asked := targets != _UNASKED]
        nats += F.cross_entropy(logits, targets[asked], reduction="none").double().sum().item()
        hits += int((logits.argmax(-1) == targets[asked]).sum())
        n_tokens += len(logits)
        flat = rearrange(asked, "b t -> (b t)")
        counts = [expert_load(ids[flat], model.cfg.n_routed_experts) for ids in chosen]
        load = torch.stack(counts).cpu() + (load if load.numel() else 0) if counts else load
    for hook in hooks:
        hook.remove()
    n_chars, n_bytes = (sum(getattr(d, name) for d in documents) for name in ("n_chars", "n_bytes"))
    return Score(nats, hits, n_tokens, n_chars, n_bytes, load)


def _pad(rows: Sequence[list[int]]) -> Int[Tensor, "B T"]:
    return pad_sequence([torch.tensor(row) for row in rows], True, _UNASKED)


def _windows(tokens: list[int], window: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield pieces of a document: what is read, and of each place the target or _UNASKED."""
    done, n_targets = 0, len(tokens) - 1
    while done < n_targets:
        start = max(0, done - (window + 1) // 2)
        end = min(n_targets, start + window)
        yield tokens[start:end], [_UNASKED] * (done - start) + tokens[done + 1 : end + 1]
        done = end


_UNASKED = -100  # cross_entropy's own number for a place that is not scored
