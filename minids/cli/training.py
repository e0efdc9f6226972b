"""What `minids train` does: from a corpus to a tokenizer, to packed rows, to a trained model.

Paper   DeepSeek-V3 (arXiv:2412.19437), section 4.2: the schedule, scaled down.
Dims    none.
Book    book/14_train.ipynb             Kernel  none
"""

from pathlib import Path

from minids.config import Config
from minids.data import Packed, encode_train
from minids.files.corpus import Corpus
from minids.model import Transformer
from minids.schedule import V3
from minids.tokenizer import train_tokenizer
from minids.train import Run, check_run, train


def train_from_corpus(
    cfg: Config,
    corpus: Corpus,
    folder: str | Path,
    *,
    steps: int = 1000,
    batch_size: int = 16,
    seq_len: int = 128,
    peak_lr: float = 4e-3,
    micro_batches: int = 1,
    fim_rate: float = 0.1,
    seed: int = 0,
    device: str = "cpu",
    save_every: int = 100,
    recompute: bool = False,
    impl: str = "torch",
    progress: bool = True,
) -> Run:
    """Train a tokenizer of `vocab_size` words and a new model, with V3's schedule scaled down.

    `steps` are full batches of `batch_size` rows; a tenth of them, at most 100, warm up.
    Files and errors as in `train`.
    """
    for name, value in (("steps", steps), ("batch_size", batch_size), ("seq_len", seq_len)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    warmup_steps = max(1, min(100, steps // 10))
    schedule = V3.scaled(steps * batch_size * seq_len, peak_lr=peak_lr, warmup_steps=warmup_steps,
                         batch=batch_size)  # fmt: skip
    check_run(cfg, schedule, seq_len, micro_batches, Path(folder), device, save_every)
    model = Transformer(cfg, impl, seed)
    texts = [text for texts in corpus.train.values() for text in texts]
    tokenizer = train_tokenizer(texts, cfg.vocab_size)
    data = Packed(encode_train(corpus, tokenizer, fim_rate, seed), seq_len, seed)
    return train(
        model, data, schedule, micro_batches=micro_batches, folder=folder, tokenizer=tokenizer,
        device=device, save_every=save_every, recompute=recompute, progress=progress,
    )  # fmt: skip
