"""A byte-level BPE tokenizer: every string has tokens, and they give back the very same string.

Paper   DeepSeek-V3 (arXiv:2412.19437), section 4.1; pre-tokenizer: llama.cpp, deepseek3-llm.
Dims    none.
Book    book/02_model.ipynb             Kernel  none
Differs FIM and pad ids follow bos 0 and eos 1 at once, so that small vocabularies hold them. Text
        never becomes a special token (the release parses them): callers put the ids in.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜fim▁hole｜>",
                  "<｜fim▁begin｜>", "<｜fim▁end｜>", "<｜▁pad▁｜>"]  # fmt: skip
BOS, EOS, FIM_HOLE, FIM_BEGIN, FIM_END, PAD = range(len(SPECIAL_TOKENS))  # their ids
_PIECES = (  # digits; CJK and kana; then words, punctuation, line breaks, spaces
    r"\p{N}{1,3}", "[一-龥\u3040-ゟ\u30a0-ヿ]+",
    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)  # fmt: skip
_HF_CONFIG = dict(
    tokenizer_class="PreTrainedTokenizerFast", add_bos_token=False, split_special_tokens=True,
    bos_token=SPECIAL_TOKENS[BOS], eos_token=SPECIAL_TOKENS[EOS], pad_token=SPECIAL_TOKENS[PAD],
    clean_up_tokenization_spaces=False,
)  # fmt: skip


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn merges from `texts`; fewer than `vocab_size` tokens if nothing is left to merge.

    Raises ValueError when `vocab_size` cannot hold the 256 bytes and the special tokens.
    """
    if vocab_size < (least := 256 + len(SPECIAL_TOKENS)):
        raise ValueError(f"vocab_size must be at least {least}, got {vocab_size}")
    tokenizer, Split = Tokenizer(models.BPE()), pre_tokenizers.Split
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = [Split(Regex(pattern), "isolated") for pattern in _PIECES]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*pieces, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, show_progress=False,
        initial_alphabet=byte_level.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.encode_special_tokens = True  # their spelling in a text is text
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, as transformers' AutoTokenizer reads them."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    config = json.dumps(_HF_CONFIG, indent=2, ensure_ascii=False)
    (Path(folder) / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")
    tokenizer.save(str(Path(folder) / "tokenizer.json"))


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Read a folder's tokenizer.json; FileNotFoundError or ValueError names a bad file."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer at {path}: save one there, or name another folder")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower class
        raise ValueError(f"{path} cannot be read as a tokenizer: {error}") from None
    tokenizer.encode_special_tokens = True
    return tokenizer
