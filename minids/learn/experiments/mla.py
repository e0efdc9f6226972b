"""MLA against MHA, GQA and MQA: the same numbers cached, the same parameters, several seeds.

    python -m minids.learn.experiments.mla     (about 20 minutes of one CPU thread)

Paper   DeepSeek-V2 (arXiv:2405.04434), Tables 1, 8 and 9, at a ten-thousandth of the size.
Dims    H heads, G key heads, N V head widths; cached numbers are counted a token and layer.
Book    book/04_mla.ipynb               Kernel  none
Differs queries are not compressed, as in V2-Lite (appendix B), so that only keys and values differ;
        every layer has a dense FFN, whose width brings each arm to the same number of parameters.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from einops import rearrange
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from minids.config import Config, preset
from minids.count import attention_parameters, count
from minids.data import Packed, encode, encode_train
from minids.evaluate import evaluate
from minids.files.corpus import Corpus, load_corpus
from minids.learn import log
from minids.learn.interval import interval
from minids.model import Transformer
from minids.rope import rotate
from minids.schedule import Schedule
from minids.tokenizer import train_tokenizer
from minids.train import Run, train

SEEDS = (0, 1, 2, 3, 4)
STEPS, BATCH, SEQ_LEN = 800, 4, 64  # steps of rows of tokens: many small ones learn most a second
RATES = (1e-3, 2e-3, 4e-3, 8e-3)  # peak learning rates that the pilot tries
PILOT_SEED, PILOT_STEPS = 100, 300  # a seed that is not reported
VOCAB, CHARS = 512, 400_000  # characters of each domain
SAMPLE = 20  # tokens whose keys and values the log keeps
_SHAPE = dict(
    vocab_size=VOCAB, dim=128, n_layers=2, n_dense_layers=2, inter_dim=256, n_heads=8, mtp_depth=0,
    q_lora_rank=0, kv_lora_rank=64, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
)  # fmt: skip


class Text(NamedTuple):
    """What all runs read: the split corpus, its tokenizer, the training documents as ids."""

    corpus: Corpus
    tokenizer: Tokenizer
    documents: list[list[int]]


class Outcome(NamedTuple):
    """A run's score: held-out nats a character, and the training loss of every tenth step."""

    nats: float
    curve: list[float]


def candidates() -> dict[str, list[Config]]:
    """Return each arm's shapes: where there are several, the pilot chooses one.

    The arms called `same cache` keep exactly as many numbers as MLA, in narrower or fewer heads;
    those called `same heads` have MLA's heads and widths, and cache what that costs.
    """
    mla = preset("nano", **_SHAPE)

    def twins(attn: str, *shapes: tuple[int, int], groups: int = 1) -> list[Config]:
        return [
            fill(
                replace(mla, attn=attn, n_heads=heads, n_kv_heads=groups, qk_nope_head_dim=width,
                        v_head_dim=width),
                mla,
            )
            for heads, width in shapes
        ]  # fmt: skip

    return {
        "MLA": [mla],
        "MHA, same cache": twins("mha", (6, 6), (3, 12)),
        "GQA, same cache": twins("gqa", (8, 18), groups=2),
        "MQA, same cache": twins("mqa", (8, 36)),
        "MHA, same heads": twins("mha", (8, 16)),
        "GQA, same heads": twins("gqa", (8, 16), groups=2),
        "MQA, same heads": twins("mqa", (8, 16)),
    }


def fill(cfg: Config, like: Config) -> Config:
    """Return `cfg` with the FFN width that brings its parameters nearest to those of `like`."""
    missing = count(like, SEQ_LEN).total - count(cfg, SEQ_LEN).total
    return replace(cfg, inter_dim=cfg.inter_dim + round(missing / (3 * cfg.dim * cfg.n_layers)))


@cache
def text() -> Text:
    """Read Python's own texts and learn a tokenizer from them: about a second."""
    corpus = load_corpus("stdlib", max_chars=CHARS)
    tokenizer = train_tokenizer([t for texts in corpus.train.values() for t in texts], VOCAB)
    return Text(corpus, tokenizer, encode_train(corpus, tokenizer, fim_rate=0.0))


def learn(cfg: Config, peak_lr: float, seed: int, steps: int = STEPS) -> Run:
    """Train one model; a seed fixes its weights and the order of what it reads."""
    tokens = steps * BATCH * SEQ_LEN
    schedule = Schedule(peak_lr=peak_lr, warmup_steps=max(1, steps // 10), constant=0.1 * tokens,
                        cosine=0.9 * tokens, tail=0.0, last_tail=0.0, cosine_end=0.01,
                        batch=BATCH, first_batch=BATCH)  # fmt: skip
    data = Packed(text().documents, SEQ_LEN, seed)
    return train(Transformer(cfg, seed=seed), data, schedule, progress=False)


def score(done: Run) -> Outcome:
    """Score a run on the held-out text."""
    heldout, tokenizer = text().corpus.heldout, text().tokenizer
    nats = evaluate(done.model, tokenizer, heldout, window=SEQ_LEN)["all"].nats_per_char
    return Outcome(nats, [round(line["loss"], 3) for line in done.log[9::10]])


def keys_and_values(model: Transformer, ids: Tensor, turned: bool = False) -> list[Tensor]:
    """Return what MHA caches, layer by layer: [tokens, H (N + V)]; `turned`: as it caches keys."""
    seen: list[Tensor] = []
    linears = [part for name, part in model.named_modules() if name.endswith((".w_k", ".w_v"))]
    hooks = [linear.register_forward_hook(lambda _, _x, y: seen.append(y)) for linear in linears]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    keys, values = seen[::2], seen[1::2]
    if turned:
        phase, _ = model.positions(*ids.shape)
        width = model.cfg.qk_head_dim
        heads = [rearrange(k, "b t (h n) -> b t h n", n=width) for k in keys]
        keys = [rearrange(rotate(k, phase), "b t h n -> b t (h n)") for k in heads]
    pairs = [torch.cat(pair, dim=-1) for pair in zip(keys, values, strict=True)]
    return [rearrange(pair, "b t w -> (b t) w") for pair in pairs]


def left_over(matrix: Tensor) -> list[float]:
    """Return, for rank 1, 2, ..., the share of squares that the best matrix of that rank misses."""
    squares = torch.linalg.svdvals(matrix.double()) ** 2
    missed = (1 - squares.cumsum(0) / squares.sum()).clamp(min=0)
    return [round(share, 5) for share in missed.tolist()]


def ranks(model: Transformer) -> dict[str, Any]:
    """Measure how low the rank of an MHA model's keys and values is, on held-out prose."""
    documents = encode(text().corpus.heldout["prose"], text().tokenizer)
    tokens = torch.tensor([token for document in documents for token in document.tokens])
    ids = rearrange(tokens[: 32 * SEQ_LEN], "(b t) -> b t", t=SEQ_LEN)
    last, turned = (keys_and_values(model, ids, turn)[-1] for turn in (False, True))
    untrained = keys_and_values(Transformer(model.cfg, seed=SEEDS[0]), ids)[-1]
    sample = last[SEQ_LEN // 2 :][:SAMPLE]  # behind the first tokens, which attend to little
    return dict(
        plain=left_over(last), turned=left_over(turned), untrained=left_over(untrained),
        sample=[[round(x, 2) for x in row] for row in sample.tolist()],
    )  # fmt: skip


def describe(cfg: Config) -> dict[str, Any]:
    """Return what a table says of an arm: its shape, its cache, its parameters, its FLOPs."""
    counts = count(cfg, SEQ_LEN)
    return dict(
        attn=cfg.attn, n_heads=cfg.n_heads, kv_heads=cfg.kv_heads if cfg.attn != "mla" else None,
        width=cfg.qk_head_dim, value_width=cfg.v_head_dim, cached=cfg.cache_dim,
        attention_parameters=attention_parameters(cfg), ffn=cfg.inter_dim,
        parameters=counts.total, training_flops=counts.flops_training,
    )  # fmt: skip


def experiment(
    seeds: tuple[int, ...] = SEEDS, steps: int = STEPS, pilot_steps: int = PILOT_STEPS
) -> dict[str, Any]:
    """Run the pilot, then every arm and seed; return what the log keeps."""
    pilot, arms, low, shapes = [], {}, {}, candidates()
    trials = len(RATES) * sum(map(len, shapes.values()))
    total = trials * pilot_steps + len(shapes) * len(seeds) * steps
    with tqdm(total=total, unit=" steps") as bar:
        for name, configs in shapes.items():
            bar.set_description(name)
            tried = []
            for cfg, rate in ((cfg, rate) for cfg in configs for rate in RATES):
                tried.append((score(learn(cfg, rate, PILOT_SEED, pilot_steps)).nats, rate, cfg))
                bar.update(pilot_steps)
            pilot += [dict(arm=name, peak_lr=rate, nats=nats, n_heads=cfg.n_heads)
                      for nats, rate, cfg in tried]  # fmt: skip
            _, rate, cfg = min(tried, key=lambda trial: trial[0])
            arms[name] = describe(cfg) | dict(peak_lr=rate, runs=[])
            for seed in seeds:
                done = learn(cfg, rate, seed, steps)
                arms[name]["runs"].append(dict(seed=seed, **score(done)._asdict()))
                bar.update(steps)
                if name == "MHA, same heads" and seed == seeds[0]:
                    low = ranks(done.model)
    settings = dict(steps=steps, batch=BATCH, seq_len=SEQ_LEN, rates=RATES, chars=CHARS,
                    pilot_seed=PILOT_SEED, pilot_steps=pilot_steps)  # fmt: skip
    return dict(settings=settings, pilot=pilot, arms=arms, ranks=low)


def against_mla(arms: dict[str, Any]) -> Iterator[tuple[str, tuple[float, float]]]:
    """Yield each other arm's loss minus that of MLA, seed by seed: mean and half of its interval.

    Runs of one seed read the same rows in the same order, so their difference varies less.
    """
    mla = [one["nats"] for one in arms["MLA"]["runs"]]
    for name in candidates():
        if name != "MLA":
            theirs = [one["nats"] for one in arms[name]["runs"]]
            yield name, interval([a - b for a, b in zip(theirs, mla, strict=True)])


def main() -> None:
    """Run everything on one thread and write the log."""
    torch.set_num_threads(1)
    print("7 arms of 5 seeds after a pilot: about 20 minutes of one CPU thread")
    start = time.perf_counter()
    results = experiment()
    command = "python -m minids.learn.experiments.mla"
    print(log.write("mla", results, command=command, seconds=time.perf_counter() - start))


if __name__ == "__main__":
    main()
