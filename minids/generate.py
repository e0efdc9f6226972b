"""Writing text: choose a word, append it, repeat; MTP modules guess words, the main model checks.

Paper   DeepSeek-V3 (arXiv:2412.19437), sections 2.2 and 5.4.3; top-p: arXiv:1904.09751;
        speculative sampling: arXiv:2211.17192, Algorithm 1.
Dims    B batch, T tokens, D width, `vocab` words, `depth` words guessed at a time.
Book    book/10_generate.ipynb          Kernel  none
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from time import perf_counter

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from minids.cache import Cache
from minids.checks.inputs import check_ids, check_lengths, check_options
from minids.model import Transformer


@dataclass
class Stats:
    """What a generation did; a rate is nan where there was nothing to measure."""

    lengths: list[int] = field(default_factory=list)  # tokens of each row: prompt, new, stop token
    new_tokens: int = 0  # of all rows
    row_calls: int = 0  # main-model calls after the prompt's, each times the rows still written
    drafted: int = 0  # those of them that checked drafts, one of each depth
    accepted: list[int] = field(default_factory=list)  # drafts kept, by depth: it and all before it
    seconds: float = 0.0  # with the prompt, without the caller's time between words

    @property
    def acceptance(self) -> list[float]:
        return [kept / (self.drafted or math.nan) for kept in self.accepted]

    @property
    def tokens_per_call(self) -> float:
        """New tokens a row and call after the prompt's: 1 + p if a draft is kept with chance p."""
        return (self.new_tokens - len(self.lengths)) / (self.row_calls or math.nan)

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / (self.seconds or math.nan)


@dataclass(frozen=True)
class Sampler:
    """The rule that turns logits into words."""

    temperature: float  # 0 = greedy: the likeliest word, among equals the one with the lowest id
    top_p: float
    generator: torch.Generator

    def distribution(self, logits: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows vocab"]:
        """Return what words are drawn from: softmax(logits / temperature), cut to the top-p set."""
        if self.temperature == 0:
            return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
        prob = (logits / self.temperature).softmax(-1)
        if self.top_p == 1:
            return prob
        ranked, ids = prob.sort(dim=-1, descending=True, stable=True)
        # the smallest set of likeliest words with mass >= top_p; among equals low ids enter first
        mass_before = F.pad(ranked.cumsum(-1)[..., :-1], (1, 0))
        kept = ranked * (mass_before < self.top_p)
        return torch.zeros_like(prob).scatter(-1, ids, kept / kept.sum(-1, keepdim=True))

    def draw(self, weight: Float[Tensor, "B vocab"]) -> Int[Tensor, " B"]:
        """Return one word a row, with probability proportional to its weight."""
        if self.temperature == 0:
            return weight.argmax(-1)
        return torch.multinomial(weight, 1, generator=self.generator)[:, 0]

    def verify(
        self,
        p: Float[Tensor, "B n1 vocab"],
        q: Float[Tensor, "B n vocab"],
        draft: Int[Tensor, "B n"],
    ) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"]]:
        """Return how many drafts each row keeps, and its word behind them (arXiv:2211.17192).

        Drafts were drawn from `q`; `p` is the main model's distribution there and behind the last.
        A draft is kept with probability min(1, p/q), the first refused one replaced by a draw from
        max(0, p - q): so words are distributed as p, whatever q is.
        """
        if not draft.shape[1]:
            return torch.zeros_like(draft.sum(-1)), self.draw(p[:, 0])
        p_draft, q_draft = (dist.gather(-1, draft[..., None]) for dist in (p[:, :-1], q))
        u = torch.rand(q_draft.shape, generator=self.generator, device=p.device)
        kept = (u * q_draft < p_draft)[..., 0].long().cumprod(-1).sum(-1)
        row = torch.arange(len(p), device=p.device)
        p_next, q_next = p[row, kept], F.pad(q, (0, 0, 0, 1))[row, kept]  # q = 0 behind the last
        rest = (p_next - q_next).clamp(min=0)
        nothing = rest.sum(-1, keepdim=True) == 0  # p and q differ by rounding alone: p will do
        return kept, self.draw(torch.where(nothing, p_next, rest))


class Drafter:
    """The MTP modules as a draft model: their cache, and the states and words that they read.

    State h_i and word t_(i+1) lie at position i. Module k merges h^(k-1)_i with t_(i+k), so at the
    last depth - 1 positions some module reads drafts: the next round does these again.
    """

    def __init__(self, model: Transformer, sampler: Sampler, main: Cache):
        self.model, self.sampler, self.depth = model, sampler, len(model.mtp)
        rows = len(main.lengths), main.capacity
        self.cache = model.new_cache(*rows, mtp=True)
        self.known = [0 for _ in main.lengths]  # positions with confirmed state and next word
        self.states = model.embed.new_zeros(*rows, model.cfg.dim)
        self.words = F.pad(self.states[..., 0].long(), (0, self.depth))

    def propose(
        self, fed: Int[Tensor, "B T"], states: Float[Tensor, "B T D"], kept, word: Int[Tensor, " B"]
    ) -> tuple[Int[Tensor, "B depth"], Float[Tensor, "B depth vocab"]]:
        """Return guesses and their distributions; of `fed` 1 + kept words hold, then `word`."""
        model, held, row = self.model, self.cache.lengths, torch.arange(len(fed))[:, None]
        at = torch.tensor(self.known)[:, None] + torch.arange(fed.shape[1])
        self.states[row, at], self.words[row, at] = states, F.pad(fed[:, 1:], (0, 1))
        self.known = [known + 1 + count for known, count in zip(self.known, kept, strict=True)]
        new = [known - count for known, count in zip(self.known, held, strict=True)]
        end, at = torch.tensor(self.known)[:, None], self.cache.positions(max(new)).cpu()
        self.words[row, end - 1] = word[:, None]
        states, last, q = self.states[row, at], torch.tensor(new)[:, None] - 1, []
        for k, module in enumerate(model.mtp, start=1):
            phase, visible = model.positions(*at.shape, cache=self.cache, offset=k)
            embedding = F.embedding(self.words[row, at + k - 1], model.embed)  # t_(i+k)
            states, _ = module(states, embedding, phase, visible, self.cache.layer(k - 1))
            q.append(self.sampler.distribution(model.head(states[row, last]).float()))
            self.words[row, end + k - 1] = self.sampler.draw(q[-1][:, 0])[:, None]
        self.cache.advance([max(0, count - self.depth + 1) for count in new])
        return self.words[row, end + torch.arange(self.depth)], torch.cat(q, dim=1)


def stream(
    model: Transformer,
    ids: Int[Tensor, "B T"],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_tokens: Collection[int] = (),
    draft: str | None = None,
    lengths: Sequence[int] | Int[Tensor, " B"] | None = None,
    seed: int = 0,
    stats: Stats | None = None,
) -> Iterator[list[list[int]]]:
    """Yield new words as they are made, a list for each row; else as generate. Fills `stats`."""
    check_ids(ids.cpu(), model.cfg.vocab_size)
    lengths = check_lengths(ids, lengths) or [ids.shape[1]] * len(ids)
    check_options(model, max(lengths), max_new_tokens, temperature, top_p, stop_tokens, draft)
    device, depth = model.embed.device, len(model.mtp) if draft else 0
    sampler = Sampler(temperature, top_p, torch.Generator(device).manual_seed(seed))
    cache = model.new_cache(len(ids), max(lengths) + max_new_tokens + 2 * depth)
    drafter = Drafter(model, sampler, cache) if draft else None
    stats = Stats() if stats is None else stats
    stats.lengths, stats.accepted, left = list(lengths), [0] * depth, [max_new_tokens] * len(ids)
    ids = ids[:, : max(lengths)].to(device)
    return _rounds(model, cache, ids, left, set(stop_tokens), sampler, drafter, stats)


@torch.no_grad()
def _rounds(model, cache, ids, left, stop, sampler, drafter, stats) -> Iterator[list[list[int]]]:
    """Yield the words of each main-model call; `left` words of each row are still to come."""
    start = perf_counter()
    fed, states = ids, model.hidden(ids, lengths=stats.lengths, cache=cache)
    kept = [length - 1 for length in stats.lengths]  # a prompt is a draft that is kept whole
    p = sampler.distribution(model.head(states[range(len(ids)), kept]).float())
    word, no_draft = sampler.draw(p), (ids[:, :0], p[:, None][:, :0])
    made = [[new] for new in word.tolist()]
    while True:
        for row, words in enumerate(made):
            ends = [n for n, new in enumerate(words[: left[row]], start=1) if new in stop]
            made[row] = words[: ends[0] if ends else left[row]]  # with the stop token
            left[row] = 0 if ends else left[row] - len(made[row])
            stats.lengths[row] += len(made[row])
        stats.new_tokens += sum(map(len, made))
        stats.seconds += perf_counter() - start
        yield made
        if not any(left):
            return
        start = perf_counter()
        if drafter and max(cache.lengths) + 2 * drafter.depth >= model.cfg.max_seq_len:
            drafter = None  # refused drafts would leave the context: the last words come one by one
        draft, q = drafter.propose(fed, states, kept, word) if drafter else no_draft
        fed = torch.cat([word[:, None], draft], dim=1)
        states = model.hidden(fed, cache=cache)
        p = sampler.distribution(model.head(states).float())
        count, word = sampler.verify(p, q, draft)
        # a row that has stopped takes part, and forgets it at once
        kept = [n if room else -1 for n, room in zip(count.tolist(), left, strict=True)]
        cache.rollback([draft.shape[1] - n for n in kept])
        stats.row_calls += len(kept) - kept.count(-1)
        stats.drafted += (len(kept) - kept.count(-1)) * bool(drafter)
        stats.accepted = [sum(n > k for n in kept) + old for k, old in enumerate(stats.accepted)]
        rows = zip(fed.tolist(), kept, word.tolist(), strict=True)
        made = [[*words[1 : n + 1], new] for words, n, new in rows]


def generate(
    model: Transformer,
    ids: Int[Tensor, "B T"],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_tokens: Collection[int] = (),
    draft: str | None = None,
    lengths: Sequence[int] | Int[Tensor, " B"] | None = None,
    seed: int = 0,
    return_stats: bool = False,
) -> Int[Tensor, "B T_new"] | tuple[Int[Tensor, "B T_new"], Stats]:
    """Return prompts and new words, int64, as wide as the longest row; Stats too if asked for.

    `lengths` are the true lengths of prompts padded on the right; new words stand right behind the
    true prompt. A row ends after `max_new_tokens` or with its first stop token, which is part of
    it; from there (`Stats.lengths`) on it holds the lowest stop token, or 0. `draft="mtp"` guesses
    words: greedy, the same text (FP32, up to logits that tie within rounding); sampled, another
    from the same distribution. One seed serves the batch: a sampled row depends on its neighbours.
    Raises ValueError for a prompt that is empty or, with its new words, longer than `max_seq_len`,
    for ids outside the vocabulary, and for options outside their ranges.
    """
    stats = Stats()
    options = (max_new_tokens, temperature, top_p, stop_tokens, draft, lengths, seed, stats)
    words = [[*chain(*made)] for made in zip(*stream(model, ids, *options), strict=True)]
    done = zip(ids.tolist(), stats.lengths, words, strict=True)
    rows = [row[: length - len(new)] + new for row, length, new in done]
    width, pad = max(stats.lengths), min(stop_tokens, default=0)
    tokens = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=ids.device)
    return (tokens, stats) if return_stats else tokens
