"""The tokenizer: bytes and merges by hand, equal to transformers, every string comes back."""

import json
import os
import subprocess
import sys

import oracle
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from minids import tokenizer as module
from minids.tokenizer import (
    BOS,
    EOS,
    FIM_BEGIN,
    FIM_END,
    FIM_HOLE,
    PAD,
    SPECIAL_TOKENS,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)

N_SPECIAL = len(SPECIAL_TOKENS)
TEXTS = [
    "def add(a, b):\n    return a + b\n" * 5,
    "The cat sat on the mat, and the dog sat on the cat. It was 1984.\n" * 5,
    "naïve café 日本語のテキスト 😀\r\n",
]
ODD = [
    "",
    " ",
    "\x00\x01\x7f\x85\u2028",
    "👩‍👩‍👧 ﷽ ᎣᏏᏲ",
    "a\r\n\r\n  b\t\n",
    "1234567 日本カナ 12",
    "don't  stop",
    "".join(SPECIAL_TOKENS),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 400)


# worked examples


def test_special_tokens_have_deepseeks_spelling_and_the_first_ids(tokenizer):
    assert (BOS, EOS, FIM_HOLE, FIM_BEGIN, FIM_END, PAD) == (0, 1, 2, 3, 4, 5)
    spelled = [
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜fim▁hole｜>",
        "<｜fim▁begin｜>",
        "<｜fim▁end｜>",
        "<｜▁pad▁｜>",
    ]
    assert [tokenizer.id_to_token(id) for id in range(6)] == spelled


def test_one_merge_by_hand():
    """Room for one merge: "ab" is the most frequent pair, so only it becomes a token."""
    tokenizer = train_tokenizer(["ab ab abc"], 256 + N_SPECIAL + 1)
    assert tokenizer.encode("abcab").tokens == ["ab", "c", "ab"]
    assert tokenizer.get_vocab_size() == 256 + N_SPECIAL + 1


def test_pieces_of_the_fact_sheet(tokenizer):
    """Digits by three, CJK apart, punctuation with letters behind it or line ends after it."""
    text = "12345 日本語x .join(a);\n\n    y"
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    decoded = [tokenizer.decoder.decode([piece]) for piece in pieces]
    assert decoded == ["123", "45", " ", "日本語", "x", " .", "join", "(a", ");\n\n", "   ", " y"]


# oracle


@pytest.mark.parametrize("with_config", [False, True])
def test_transformers_encodes_the_same(tokenizer, tmp_path, with_config):
    """Also with the model's config.json beside it, where transformers goes by the model type."""
    save_tokenizer(tokenizer, tmp_path)
    if with_config:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))
    for theirs in oracle.tokenizers(tmp_path):
        assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (BOS, EOS, PAD)
        for text in TEXTS + ODD:
            ids = theirs(text)["input_ids"]
            assert ids == tokenizer.encode(text).ids
            assert theirs.decode(ids) == text


# properties


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text())
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert all(id >= N_SPECIAL for id in ids)


@pytest.mark.parametrize("text", ODD)
def test_odd_strings_come_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_text_never_becomes_a_special_token(tokenizer, tmp_path):
    """The spelling of bos in a text is text, also after loading; ids alone mean bos."""
    save_tokenizer(tokenizer, tmp_path)
    for which in (tokenizer, load_tokenizer(tmp_path)):
        for token in SPECIAL_TOKENS:
            assert all(id >= N_SPECIAL for id in which.encode(f"a{token}b").ids)
    assert tokenizer.decode([BOS, EOS]) == ""
    assert tokenizer.decode([BOS, EOS], skip_special_tokens=False) == "".join(SPECIAL_TOKENS[:2])


def test_training_is_deterministic():
    """Also in another process with other hash seeds and one thread."""
    code = (  # run_path: the package itself would import torch, which takes seconds
        "import json, runpy, sys; train = runpy.run_path(sys.argv[1])['train_tokenizer']; "
        "sys.stdout.buffer.write(train(json.load(sys.stdin), 400).to_str().encode())"
    )
    env = os.environ | {"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code, module.__file__],
        input=json.dumps(TEXTS).encode(),
        capture_output=True,
        env=env,
        check=True,
    )
    assert run.stdout.decode() == train_tokenizer(iter(TEXTS), 400).to_str()


def test_save_and_load_change_nothing(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path / "new" / "folder")
    loaded = load_tokenizer(tmp_path / "new" / "folder")
    assert loaded.to_str() == tokenizer.to_str()
    for text in TEXTS + ODD:
        assert loaded.encode(text).ids == tokenizer.encode(text).ids


def test_a_small_corpus_gives_a_smaller_vocabulary():
    assert train_tokenizer(["ab"], 5000).get_vocab_size() < 300
    assert train_tokenizer([], 5000).get_vocab_size() == 256 + N_SPECIAL


# bad input


def test_too_small_a_vocabulary():
    with pytest.raises(ValueError, match="vocab_size must be at least 262, got 261"):
        train_tokenizer(TEXTS, 261)


def test_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b'{"version": "1.0"}', b"\xff\x00", b"[1, 2]"])
def test_broken_tokenizer_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        load_tokenizer(tmp_path)
