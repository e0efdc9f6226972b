"""Text to rows: the split shares nothing, each token is a target once, rows are found by number."""

import itertools
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minids.data import Packed, encode, encode_train, split_fim
from minids.files.corpus import Corpus
from minids.tokenizer import BOS, EOS, FIM_BEGIN, FIM_END, FIM_HOLE, train_tokenizer

# a share of 0.1 of 2,000 documents lies within 5 standard deviations (p = 6e-7) of its mean
N_FIM, FIM_BOUND = 2000, 5 * (2000 * 0.1 * 0.9) ** 0.5
DOCUMENTS = [[BOS, 10 * n, *range(10 * n + 1, 10 * n + 1 + n % 5), EOS] for n in range(1, 8)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def f(x):\n    return x\n", "Some words of prose.\n"], 270)


def stream(packed: Packed, rows: int) -> list[int]:
    """Put rows back together: all of the first, then the targets of each."""
    tokens, _ = packed.rows(0, rows)
    return tokens[0].tolist() + tokens[1:, 1:].flatten().tolist()


# worked examples


def test_packing_by_hand():
    """Two documents of 3 and 4 tokens in rows of 3 targets: a row starts at the last one's end."""
    a, b = [0, 8, 1], [0, 6, 7, 1]
    tokens, documents = Packed([a, b], seq_len=3, seed=0).rows(0, 2)
    if tokens[0, 1] == 8:  # chance decides which one leads; these are a b and b a
        assert tokens.tolist() == [[0, 8, 1, 0], [0, 6, 7, 1]]
        assert documents.tolist() == [[0, 0, 0, 1], [0, 0, 0, 0]]
    else:
        assert tokens.tolist() == [[0, 6, 7, 1], [1, 0, 8, 1]]
        assert documents.tolist() == [[0, 0, 0, 0], [0, 1, 1, 1]]


def test_fim_layout_by_hand(tokenizer):
    """bos, begin, prefix, hole, suffix, end, middle, eos: fact sheet 3.2, behind a bos."""
    text = "def f(x):\n    return x\n"
    prefix, middle, suffix = (tokenizer.encode(p).ids for p in split_fim(text, 1.0, 3))
    (document,) = encode([text], tokenizer, fim_rate=1.0, seed=3)
    rest = [FIM_BEGIN, *prefix, FIM_HOLE, *suffix, FIM_END, *middle, EOS]
    assert document.tokens == [BOS, *rest]


def test_plain_layout_and_sizes(tokenizer):
    documents = encode(["words", "né😀", ""], tokenizer)
    assert documents[0].tokens == [BOS, *tokenizer.encode("words").ids, EOS]
    assert [(d.n_chars, d.n_bytes) for d in documents] == [(5, 5), (3, 7), (0, 0)]
    assert documents[2].tokens == [BOS, EOS]


# the corpus


def test_fim_rate_is_a_tenth_and_pieces_give_the_text_back():
    texts = [f"document {n}\n" * (n % 7) for n in range(N_FIM)]
    pieces = [split_fim(text, 0.1, seed=0) for text in texts]
    assert ["".join(piece) for piece in pieces] == texts
    # the 7th part of the texts is empty, so equal: leave those out of the count
    full = [len(piece) == 3 for piece, text in zip(pieces, texts, strict=True) if text]
    assert abs(sum(full) - 0.1 * len(full)) < FIM_BOUND
    assert [split_fim(text, 0.1, seed=0) for text in texts] == pieces
    assert [split_fim(text, 0.1, seed=1) for text in texts] != pieces


@given(st.text(), st.integers(0, 2**32))
def test_fim_of_any_text_gives_it_back(text, seed):
    pieces = split_fim(text, 1.0, seed)
    assert len(pieces) == 3
    assert "".join(pieces) == text
    assert split_fim(text, 0.0, seed) == [text]


def test_fim_places_are_uniform():
    """All 66 cuts of 10 characters (two places of 11, sorted) come up, equal ones 1 in 11."""
    cuts = Counter(tuple(map(len, split_fim("0123456789", 1.0, seed))) for seed in range(N_FIM))
    assert len(cuts) == 66
    middle_is_empty = sum(n for (_, middle, _), n in cuts.items() if middle == 0)
    assert abs(middle_is_empty - N_FIM / 11) < FIM_BOUND  # 1/11 varies less than 1/10


def test_fim_is_for_code_alone(tokenizer):
    texts = [f"text {n}" for n in range(300)]
    corpus = Corpus({"prose": texts, "code": [t + ";" for t in texts]}, {})
    encoded = encode_train(corpus, tokenizer, fim_rate=0.5, seed=0)
    has_fim = [FIM_HOLE in tokens for tokens in encoded]
    assert not any(has_fim[:300])
    assert 100 < sum(has_fim[300:]) < 200
    assert len(encode_train(Corpus({"prose": texts}, {}), tokenizer)) == 300


def test_text_that_spells_a_special_token_stays_text(tokenizer):
    (document,) = encode(["a<｜end▁of▁sentence｜>b"], tokenizer)
    assert document.tokens.count(EOS) == 1


def test_a_tokenizer_with_other_ids_is_refused():
    from tokenizers import Tokenizer, models

    with pytest.raises(ValueError, match=r"tokenizer must have .* as ids 0, 1"):
        encode(["a"], Tokenizer(models.BPE()))


# packing


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    seq_len=st.integers(1, 20),
    seed=st.integers(0, 2**32),
)
def test_each_token_is_a_target_once_an_epoch(lengths, seq_len, seed):
    """The stream, cut by epochs, is all documents whole, in any order; ids tell them apart."""
    documents = [[100 * n + place for place in range(length)] for n, length in enumerate(lengths)]
    epoch = sum(lengths)
    if epoch <= seq_len:
        with pytest.raises(ValueError, match="must fill a row"):
            Packed(documents, seq_len, seed)
        return
    tokens = stream(Packed(documents, seq_len, seed), rows=-(-3 * epoch // seq_len))
    for start in range(0, 3 * epoch, epoch):
        left = tokens[start : start + epoch]
        while left:
            document = documents[left[0] // 100]
            assert left[: len(document)] == document
            left = left[len(document) :]
        assert Counter(tokens[start : start + epoch]) == Counter(itertools.chain(*documents))


def test_rows_overlap_by_one_token():
    tokens, _ = Packed(DOCUMENTS, 5, seed=0).rows(0, 40)
    assert (tokens[1:, 0] == tokens[:-1, -1]).all()


def test_a_row_depends_on_its_number_alone():
    """One by one, in any order and by another object: what resume and 1x64 = 4x16 rest on."""
    tokens, documents = Packed(DOCUMENTS, 5, seed=1).rows(0, 60)
    packed = Packed(DOCUMENTS, 5, seed=1)
    for n in np.random.default_rng(0).permutation(60).tolist():
        row, numbers = packed.rows(n, 1)
        assert row[0].equal(tokens[n])
        assert numbers[0].equal(documents[n])


def test_far_rows_cost_nothing_more():
    tokens, _ = Packed(DOCUMENTS, 5, seed=1).rows(10**9, 2)
    assert tokens.shape == (2, 6)


def test_epochs_and_seeds_differ():
    epoch = sum(map(len, DOCUMENTS))
    tokens = stream(Packed(DOCUMENTS, epoch - 1, seed=0), rows=4)
    epochs = [tuple(tokens[start : start + epoch]) for start in range(0, 3 * epoch, epoch)]
    other = stream(Packed(DOCUMENTS, epoch - 1, seed=1), rows=1)
    assert len({*epochs, tuple(other)}) == 4


def test_document_numbers_change_exactly_at_bos():
    tokens, documents = Packed(DOCUMENTS, 11, seed=0).rows(0, 50)
    steps = documents[:, 1:] - documents[:, :-1]
    assert steps.equal((tokens[:, 1:] == BOS).long())
    assert (documents[:, 0] == 0).all()


def test_lone_document_is_numbered_anew_each_time():
    tokens, documents = Packed([[BOS, 7, EOS]], 2, seed=0).rows(0, 4)
    assert tokens.tolist() == [[0, 7, 1], [1, 0, 7], [7, 1, 0], [0, 7, 1]]
    assert documents.tolist() == [[0, 0, 0], [0, 1, 1], [0, 0, 1], [0, 0, 0]]


def test_bad_packing_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"must fill a row of 8 tokens, got lengths \[3 4\]"):
        Packed([[0, 8, 1], [0, 6, 7, 1]], 7, seed=0)
    with pytest.raises(ValueError, match=r"must not be empty .* got lengths \[3 0\]"):
        Packed([[0, 8, 1], []], 2, seed=0)
    with pytest.raises(ValueError, match="seq_len must be >= 1 and seed >= 0, got 0 and -1"):
        Packed(DOCUMENTS, 0, seed=-1)
    with pytest.raises(ValueError, match="start >= 0 and count >= 1, got -1 and 0"):
        Packed(DOCUMENTS, 4, seed=0).rows(-1, 0)


def test_rows_of_a_batch_are_not_neighbours():
    """Each row of an epoch once, and a step's rows from all over it; any row can be had alone."""
    data = Packed([[BOS, *range(n, n + 30), EOS] for n in range(10, 400, 10)], seq_len=8, seed=3)
    size = data.n_tokens // data.seq_len
    straight, mixed = data.rows(0, size)[0].tolist(), data.shuffled(0, size)[0].tolist()
    assert sorted(mixed) == sorted(straight)
    at = [straight.index(row) for row in mixed[:8]]
    assert sum(abs(a - b) == 1 for a, b in pairwise(at)) < 3
    assert data.shuffled(5, 1)[0][0].tolist() == mixed[5]
    assert data.shuffled(size, size)[0].tolist() != mixed
