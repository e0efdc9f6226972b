"""The guided tour: in a few minutes a small but complete DeepSeek-V3 learns real text and writes.

Paper   DeepSeek-V3 (arXiv:2412.19437), all of section 2, at a millionth of the size.
Dims    none.
Book    book/00_start.ipynb             Kernel  none
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from math import log as ln
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from minids.config import preset
from minids.data import Packed, encode_train
from minids.evaluate import Score, evaluate
from minids.files.corpus import load_corpus
from minids.generate import generate
from minids.model import Transformer
from minids.schedule import Schedule
from minids.tokenizer import BOS, EOS, train_tokenizer
from minids.train import Run, train

STEPS, BATCH, SEQ_LEN = 1200, 8, 128  # a step of rows, a row of tokens
PEAK_LR = 3e-3
CHARS = 1_000_000  # of each domain
PROMPTS = {"prose": "The statement", "code": "    def __init__(self"}
NEW_TOKENS = 100


def tour(
    folder: str | Path = "runs/tour",
    *,
    seed: int = 0,
    threads: int = 2,
    steps: int = STEPS,
    progress: bool = True,
) -> Run:
    """Train the preset `nano` on Python's own texts, score it, draw it, let it write; print each.

    Writes model/, log.jsonl, state/ and tour.svg under `folder`; a tour broken off there goes on.
    The same seed, machine, Python and number of threads give the same numbers.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _tour(Path(folder), seed, steps, progress)
    finally:
        torch.set_num_threads(before)


def _tour(folder: Path, seed: int, steps: int, progress: bool) -> Run:
    cfg = preset("nano")
    corpus = load_corpus("stdlib", max_chars=CHARS)
    print("1. Text that comes with Python, in two domains")
    for domain, texts in corpus.train.items():
        held = corpus.heldout[domain]
        print(
            f"   {domain:6}{len(texts):4} documents, {sum(map(len, texts)):9,} characters to learn;"
            f" {len(held)} others, {sum(map(len, held)):7,} characters, held out"
        )
    texts = [text for texts in corpus.train.values() for text in texts]
    tokenizer = train_tokenizer(texts, cfg.vocab_size)
    data = Packed(encode_train(corpus, tokenizer, seed=seed), SEQ_LEN, seed)
    per_token = sum(map(len, texts)) / data.n_tokens
    print(f"   a byte-level BPE cuts it into {data.n_tokens:,} tokens of {cfg.vocab_size} kinds,")
    print(f"   {per_token:.2f} characters a token")
    model = Transformer(cfg, seed=seed)
    _introduce(model)
    schedule = make_schedule(steps)
    print(f"3. Training: {steps} steps of {BATCH} rows of {SEQ_LEN} tokens;")
    print(f"   knowing nothing is a loss of ln {cfg.vocab_size} = {ln(cfg.vocab_size):.2f} a token")
    run = train(model, data, schedule, folder=folder, tokenizer=tokenizer, progress=progress)
    last = run.log[-1]
    balance = ", ".join(f"{value:.2f}" for value in last["max_vio"])
    print(f"   the last batch: {last['loss']:.2f} nats a token, MaxVio (0 is balance) {balance}")
    scores = evaluate(run.model, tokenizer, corpus.heldout, window=SEQ_LEN)
    _report(scores)
    usage = {domain: score.load.tolist() for domain, score in scores.items() if domain != "all"}
    print(f"   {_picture(run.log, folder / 'tour.svg', usage)}")
    print(f"   the model is in {folder / 'model'}; `minids generate` lets it write more")
    _write(run.model, tokenizer, seed)
    return run


def make_schedule(steps: int) -> Schedule:
    """Return V3's sequence of phases with another balance: a short run cools down longer."""
    tokens = steps * BATCH * SEQ_LEN
    return Schedule(peak_lr=PEAK_LR, warmup_steps=max(1, steps // 33), constant=0.1 * tokens,
                    cosine=0.88 * tokens, tail=0.02 * tokens, last_tail=0.0, cosine_end=0.01,
                    batch=BATCH, first_batch=BATCH)  # fmt: skip


def _introduce(model: Transformer) -> None:
    cfg = model.cfg
    n_parameters = sum(weight.numel() for weight in model.parameters())
    n_mtp = sum(weight.numel() for weight in model.mtp.parameters())
    print(f"2. A DeepSeek-V3 of {n_parameters:,} parameters, {n_mtp:,} of them in its MTP module:")
    print(f"   {cfg.n_layers} layers of latent attention ({cfg.cache_dim} numbers cached a token);")
    visits = f"{cfg.n_activated_experts} of {cfg.n_routed_experts} experts and the shared one"
    print(f"   behind it, in all but the first, each token visits {visits}")


def _report(scores: Mapping[str, Score]) -> None:
    print("4. Held-out text, whole documents; `all` is the sum of nats over the sum of characters")
    for domain, score in scores.items():
        print(
            f"   {domain:6}{score.nats_per_char:6.3f} nats a character, {score.bits_per_byte:6.3f}"
            f" bits a byte, next token right {score.accuracy:4.0%}"
        )


def _picture(
    log: Sequence[Mapping[str, Any]], path: Path, usage: Mapping[str, list[list[int]]]
) -> str:
    try:
        save_plot(log, path, usage)
    except ImportError as error:
        return f"no picture: {error}"
    return f"the picture of this run is {path}"


def save_plot(
    log: Sequence[Mapping[str, Any]],
    path: str | Path,
    usage: Mapping[str, list[list[int]]] | None = None,
) -> None:
    """Draw a run's log as SVG; ImportError says what to install where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise ImportError("pictures need matplotlib: pip install 'minids[book]'")
    from figures import style
    from figures.tour import draw

    style.save(draw(log, usage), path)


def _write(model: Transformer, tokenizer: Tokenizer, seed: int) -> None:
    print("5. It writes; its MTP module guesses one token ahead, the main model checks each guess")
    for domain, prompt in PROMPTS.items():
        ids = torch.tensor([[BOS, *tokenizer.encode(prompt, add_special_tokens=False).ids]])
        made = generate(
            model, ids, max_new_tokens=NEW_TOKENS, temperature=0.7, top_p=0.9, stop_tokens=(EOS,),
            draft="mtp", seed=seed, return_stats=True,
        )  # fmt: skip
        assert isinstance(made, tuple), "return_stats=True returns stats too"
        out, stats = made
        text = tokenizer.decode(out[0].tolist(), skip_special_tokens=True)
        print(f"\n   {domain}: {stats.acceptance[0]:.0%} of {stats.drafted} guesses accepted, "
              f"{stats.tokens_per_call:.2f} tokens a call of the main model")  # fmt: skip
        print("   | " + text.replace("\n", "\n   | "))
