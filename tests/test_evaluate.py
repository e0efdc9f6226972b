"""minids/evaluate.py: ln V of a model that knows nothing, whole documents, windows, domains."""

import math

import pytest
import torch

from minids import Transformer, preset
from minids.data import encode
from minids.evaluate import Score, evaluate
from minids.tokenizer import train_tokenizer

TEXTS = {"prose": ["the cat, the mat: größer", "the the the"], "code": ["x = x + 1\n" * 9]}
TOKENIZER = train_tokenizer([text for texts in TEXTS.values() for text in texts], 280)
CFG = preset("toy", vocab_size=280)
# FP32 logits of two forwards; sums of some dozen nats differ by less than this, relative
ROUNDING = 1e-5


def test_score_by_hand():
    """8 ln 2 nats over 4 characters of 2 bytes each: 2 ln 2 nats a character, 1 bit a byte."""
    score = Score(8 * math.log(2), 3, 6, 4, 8, torch.zeros(1, 2, dtype=torch.int64))
    assert score.nats_per_char == pytest.approx(2 * math.log(2))
    assert score.bits_per_byte == pytest.approx(1.0)
    assert score.accuracy == 0.5


def test_uniform_logits_cost_ln_vocab_a_token():
    model = Transformer(CFG)
    with torch.no_grad():
        model.head.weight.zero_()
    for domain, score in evaluate(model, TOKENIZER, TEXTS).items():
        texts = TEXTS.get(domain) or [text for texts in TEXTS.values() for text in texts]
        n_tokens = sum(len(TOKENIZER.encode(text).ids) + 1 for text in texts)  # eos, not bos
        assert score.tokens == n_tokens
        assert score.nats == pytest.approx(n_tokens * math.log(280), rel=1e-6)
        assert score.chars == sum(map(len, texts))
        assert score.bytes == sum(len(text.encode()) for text in texts)
    assert score.bytes == score.chars + 2  # ö and ß


@pytest.mark.parametrize("window", [2, 3, 8, 13, 64])
def test_windows_score_each_target_once_as_a_loop_does(window):
    """Target i is predicted from half a window or more, once a document is long."""
    model = Transformer(CFG)
    wanted, visits = 0.0, 0
    for document in encode(TEXTS["code"], TOKENIZER):
        ids, done = document.tokens, 0
        for i in range(1, len(ids)):
            if i - 1 == done + (window if done == 0 else window // 2):
                done = i - 1
            start = 0 if i <= window else done - (window + 1) // 2
            assert i - start <= window
            logits = model(torch.tensor([ids[start:i]]))[0, -1]
            wanted -= logits.log_softmax(-1)[ids[i]].item()
            visits += CFG.n_activated_experts
    score = evaluate(model, TOKENIZER, TEXTS, window=window, batch=3)["code"]
    assert score.nats == pytest.approx(wanted, rel=ROUNDING)
    assert score.load.sum().item() == visits  # of the one MoE layer


def test_all_is_the_sum_of_the_domains():
    scores = evaluate(Transformer(CFG), TOKENIZER, TEXTS)
    assert list(scores) == ["prose", "code", "all"]
    for name in ("nats", "hits", "tokens", "chars", "bytes"):
        parts = [getattr(scores[domain], name) for domain in TEXTS]
        assert getattr(scores["all"], name) == pytest.approx(sum(parts))
    assert torch.equal(scores["all"].load, scores["prose"].load + scores["code"].load)


def test_batches_and_the_model_before_change_nothing():
    model = Transformer(CFG).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    one, other = (evaluate(model, TOKENIZER, TEXTS, window=8, batch=batch) for batch in (1, 16))
    for domain in one:
        assert one[domain].nats == pytest.approx(other[domain].nats, rel=ROUNDING)
        assert torch.equal(one[domain].load, other[domain].load)
    assert model.training
    evaluate(model.eval(), TOKENIZER, TEXTS)
    assert not model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
    assert not any(router._forward_hooks for router in model.routers)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ({}, {}, "no text to evaluate"),
        ({"prose": []}, {}, r"no text to evaluate in \['prose'\]"),
        ({"prose": [""]}, {}, r"no text to evaluate in \['prose'\]"),
        (TEXTS, dict(window=1), r"window must lie in 2..64, got 1"),
        (TEXTS, dict(window=65), r"window must lie in 2..64, got 65"),
    ],
)
def test_refuses(texts, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(Transformer(CFG), TOKENIZER, texts, **options)


def test_tokenizer_of_another_model_is_refused():
    with pytest.raises(ValueError, match="vocab_size must hold the tokenizer's"):
        evaluate(Transformer(preset("toy")), TOKENIZER, TEXTS)
