"""Generation: exact rules, drafting that changes nothing, refusals that say why."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from minids import Transformer, preset
from minids.generate import Drafter, Sampler, Stats, generate, stream

SAME = 1e-5  # relative: FP32, the same sums in another order
LOG_CHANCE = 14.0  # a correct sampler fails a chi-square test with probability below e^-14 = 1e-6


def toy(seed=0, **changes):
    """Weights wide enough that words differ clearly in probability."""
    return Transformer(preset("toy", **{"init_std": 0.3} | changes), seed=seed)


def prompts(batch, width, vocab=32, seed=0):
    return torch.randint(vocab, (batch, width), generator=torch.Generator().manual_seed(seed))


def sampler(temperature=1.0, top_p=1.0):
    return Sampler(temperature, top_p, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=[1, 2])
def trained(request):
    """A model that has learned to count modulo 32, in steps that it must read off the prompt."""
    torch.set_num_threads(1)
    model = toy(mtp_depth=request.param, init_std=0.1)
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        start, step = torch.randint(32, (2, 16, 1), generator=generator)
        tokens = (start + (step % 3 + 1) * torch.arange(14)) % 32
        adam.zero_grad()
        model.losses(tokens).total(1.0).backward()
        adam.step()
    return model


# --- worked examples


def test_top_p_is_the_smallest_set_that_reaches_the_mass():
    logits = torch.tensor([0.125, 0.5, 0.125, 0.25]).log()[None]
    expected = {
        0.5: [0, 1, 0, 0],
        0.51: [0, 2 / 3, 0, 1 / 3],
        0.75: [0, 2 / 3, 0, 1 / 3],
        0.8: [1 / 7, 4 / 7, 0, 2 / 7],  # words 0 and 2 tie: the lower id goes in
        0.875: [1 / 7, 4 / 7, 0, 2 / 7],
        0.9: [1 / 8, 1 / 2, 1 / 8, 1 / 4],
        1e-9: [0, 1, 0, 0],
    }
    for top_p, want in expected.items():
        got = sampler(top_p=top_p).distribution(logits)[0]
        torch.testing.assert_close(got, torch.tensor(want, dtype=got.dtype))


def test_temperature_divides_logits_and_zero_takes_the_first_of_equals():
    logits = torch.tensor([[0.0, 2.0, 2.0]])
    cold = sampler(temperature=0.5).distribution(logits)
    torch.testing.assert_close(cold, torch.tensor([[0.0, 4.0, 4.0]]).softmax(-1))
    assert sampler(temperature=0).distribution(logits).tolist() == [[0, 1, 0]]
    assert sampler(temperature=0).draw(logits).tolist() == [1]


def test_verify_by_hand():
    """Row 0: p(d)/q(d) = 2, always kept; row 1: p(d) = 0, always replaced by the other word."""
    q = torch.tensor([[[0.5, 0.5]], [[0.5, 0.5]]])
    p = torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[1.0, 0.0], [0.5, 0.5]]])
    kept, word = sampler().verify(p, q, torch.tensor([[1], [1]]))
    assert kept.tolist() == [1, 0]
    assert word.tolist() == [0, 0]


@pytest.mark.parametrize("chance", [0.85, 0.90])  # fact sheet 2.7: 1.85 and 1.90 tokens a step
def test_one_draft_gives_one_plus_p_tokens_a_call(chance):
    kept = round(100 * chance)
    stats = Stats([200], 1 + 100 + kept, row_calls=100, drafted=100, accepted=[kept])
    assert stats.acceptance == [chance]
    assert stats.tokens_per_call == pytest.approx(1 + chance)
    # verify keeps a draft with probability sum min(p, q): here 1 - chance of q lies outside p
    rows = 40_000
    q = torch.tensor([1 - chance, chance]).expand(rows, 1, 2)
    p = torch.tensor([0.0, 1.0]).expand(rows, 2, 2)
    draft = torch.multinomial(q[:, 0], 1, generator=torch.Generator().manual_seed(1))
    counts, _ = sampler().verify(p, q, draft)
    five_sigma = 5 * math.sqrt(chance * (1 - chance) / rows)
    assert (1 + counts.float()).mean().item() == pytest.approx(1 + chance, abs=five_sigma)


# --- oracles


def slow_greedy(model, prompt, new, stop=()):
    """No cache, no batch: the whole text again for every word."""
    text = list(prompt)
    for _ in range(new):
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
        if text[-1] in stop:
            break
    return text


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("seed", range(2))
def test_drafting_does_not_change_greedy_text(depth, seed):
    model, ids, lengths, stop = toy(seed, mtp_depth=depth), prompts(3, 6, seed=seed), [6, 1, 4], [5]
    for new in (2, 9, 58):  # 58: up to max_seq_len
        plain, stats = generate(model, ids, new, 0.0, 1.0, stop, None, lengths, return_stats=True)
        drafted, more = generate(model, ids, new, 0.0, 1.0, stop, "mtp", lengths, return_stats=True)
        assert torch.equal(plain, drafted)
        assert stats.lengths == more.lengths
        if new == 9:
            for row, length in enumerate(lengths):
                want = slow_greedy(model, ids[row, :length].tolist(), new, stop)
                assert plain[row].tolist() == want + stop * (plain.shape[1] - len(want))
                assert stats.lengths[row] == len(want)


def test_drafting_of_a_trained_model(trained):
    """Drafts are kept here, so caches go on from accepted words too; and it pays."""
    start = torch.arange(8)[:, None]
    ids = (start + (start % 3 + 1) * torch.arange(6)) % 32
    lengths = [6, 5, 4, 6, 3, 6, 5, 6]
    plain, _ = generate(trained, ids, 40, lengths=lengths, return_stats=True)
    drafted, stats = generate(trained, ids, 40, lengths=lengths, draft="mtp", return_stats=True)
    assert torch.equal(plain, drafted)
    assert stats.acceptance[0] > 0.3
    assert all(a >= b for a, b in itertools.pairwise(stats.acceptance))
    assert stats.tokens_per_call > 1.3
    one, alone = generate(trained, ids[:1], 40, draft="mtp", return_stats=True)
    assert torch.equal(one, plain[:1, :46])
    # every call makes its word and what it keeps; the last one may keep more than is wanted
    made = alone.row_calls + sum(alone.accepted)
    assert 39 <= made <= 39 + len(trained.mtp)


def test_drafts_are_those_of_the_modules_without_a_cache(trained, monkeypatch):
    """Each round's distributions, against the chain of Eqs. 21-23 run over the whole text.

    The trained model keeps most drafts, the random one refuses nearly all: both sides of rollback.
    """
    rounds, text, propose = [], [], Drafter.propose

    def recording(self, fed, states, kept, word):
        text.extend(fed[0, : kept[0] + 1].tolist())
        draft, q = propose(self, fed, states, kept, word)
        rounds.append(([*text, int(word)], draft[0].tolist(), q[0]))
        return draft, q

    monkeypatch.setattr(Drafter, "propose", recording)
    for model in (trained, toy(1, mtp_depth=1 + len(trained.mtp))):
        rounds.clear()
        text.clear()
        generate(model, prompts(1, 5), 20, temperature=0.7, draft="mtp")
        assert len(rounds) > 5
        for confirmed, draft, q in rounds:
            assert_drafts_are_right(model, confirmed, draft, q)


@torch.no_grad()
def assert_drafts_are_right(model, confirmed, draft, q):
    words = torch.tensor([[*confirmed, *draft]])
    states, end = model.hidden(words[:, : len(confirmed) - 1]), len(confirmed) - 1
    for k, module in enumerate(model.mtp, start=1):
        phase, visible = model.positions(1, end, offset=k)
        embedding = F.embedding(words[:, k : k + end], model.embed)
        states, _ = module(states, embedding, phase, visible)
        want = (model.head(states[0, -1]) / 0.7).softmax(-1)
        assert (q[k - 1] - want).norm() <= SAME * want.norm()


# --- the distribution of sampled text, by counting

ROWS, VOCAB, NEW = 10_000, 5, 3


def exact_distribution(model, prompt, rule):
    """Probability of each continuation of NEW words, from the model alone."""
    every = torch.tensor(list(itertools.product(range(VOCAB), repeat=NEW)))
    text = torch.cat([prompt.expand(len(every), -1), every], dim=1)
    prob = rule.distribution(model(text)[:, prompt.shape[1] - 1 : -1])
    return prob.gather(-1, every[..., None]).prod(1)[:, 0]


def chi_square(model, draft, temperature, top_p, seed=0):
    """Return the statistic over its bound: chance of more than 1 below e^-LOG_CHANCE if right.

    Bound: Laurent and Massart (2000), Lemma 1. Cells that expect below 10 counts are pooled.
    """
    prompt = torch.tensor([[1, 4, 2]])
    prob = exact_distribution(model, prompt, sampler(temperature, top_p))
    tokens = generate(
        model, prompt.expand(ROWS, -1), NEW, temperature, top_p, draft=draft, seed=seed
    )
    cell = (tokens[:, 3:] * torch.tensor([VOCAB**2, VOCAB, 1])).sum(-1)
    seen, expected = cell.bincount(minlength=VOCAB**NEW).double(), prob.double() * ROWS
    if seen[expected == 0].any():
        return math.inf
    rare = expected < 10
    seen = torch.cat([seen[~rare], seen[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    statistic = ((seen - expected) ** 2 / expected.clamp(min=1)).sum().item()
    free = len(seen) - 1
    assert free >= 8, "too few cells to test anything"
    return statistic / (free + 2 * math.sqrt(free * LOG_CHANCE) + 2 * LOG_CHANCE)


def tiny(depth):
    return toy(3, vocab_size=VOCAB, mtp_depth=depth, init_std=0.25)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.3, 0.8)])
@pytest.mark.parametrize(("draft", "depth"), [(None, 1), ("mtp", 1), ("mtp", 2)])
def test_sampled_text_has_the_models_distribution(draft, depth, temperature, top_p):
    assert chi_square(tiny(depth), draft, temperature, top_p) < 1


def accept_everything(self, p, q, draft):
    return torch.full((len(p),), draft.shape[1]), self.draw(p[:, -1])


def compare_with_the_previous_position(self, p, q, draft, right=Sampler.verify):
    return right(self, torch.cat([p[:, :1], p[:, :-1]], dim=1), q, draft)


def replace_from_p_not_from_the_residual(self, p, q, draft, right=Sampler.verify):
    kept, _ = right(self, p, q, draft)
    return kept, self.draw(p[torch.arange(len(p)), kept])


MISTAKES = [
    accept_everything,  # "draft accepted without verification"
    compare_with_the_previous_position,
    replace_from_p_not_from_the_residual,
]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_counting_exposes_the_mistake(mistake, monkeypatch):
    monkeypatch.setattr(Sampler, "verify", mistake)
    assert chi_square(tiny(2), "mtp", 1.0, 1.0) > 2


@pytest.mark.parametrize("mistake", MISTAKES[:2])
def test_greedy_equality_exposes_the_mistake(mistake, monkeypatch):
    model, ids = tiny(2), prompts(16, 6, VOCAB)  # few words: drafts are often kept
    plain = generate(model, ids, 20)
    monkeypatch.setattr(Sampler, "verify", mistake)
    assert not torch.equal(plain, generate(model, ids, 20, draft="mtp"))


# --- properties


@pytest.mark.parametrize("draft", [None, "mtp"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stream_writes_the_same_words(draft, temperature):
    model, ids, lengths, stats = toy(), prompts(2, 5), [5, 3], Stats()
    tokens = generate(model, ids, 9, temperature, 0.9, [1, 2], draft, lengths, seed=7)
    rows = [ids[row, :length].tolist() for row, length in enumerate(lengths)]
    for made in stream(model, ids, 9, temperature, 0.9, [1, 2], draft, lengths, 7, stats):
        assert any(made), "a step that writes nothing"
        rows = [row + new for row, new in zip(rows, made, strict=True)]
    assert stats.lengths == [len(row) for row in rows]
    assert tokens.tolist() == [row + [1] * (tokens.shape[1] - len(row)) for row in rows]


def test_seeds_and_no_global_state():
    model, ids = toy().train(), prompts(2, 5)
    before = torch.get_rng_state()
    first = generate(model, ids, 20, temperature=1.0, seed=1)
    assert torch.equal(first, generate(model, ids, 20, temperature=1.0, seed=1))
    assert not torch.equal(first, generate(model, ids, 20, temperature=1.0, seed=2))
    assert torch.equal(before, torch.get_rng_state())
    assert model.training
    assert not generate(model.eval(), ids, 2).requires_grad
    assert not model.training
    stats = generate(model, ids, 5, return_stats=True)[1]
    assert torch.is_grad_enabled()
    assert stats.new_tokens == 10
    assert stats.tokens_per_second == 10 / stats.seconds > 0
    assert (stats.acceptance, stats.tokens_per_call) == ([], 1.0)


def test_a_cold_sampler_is_greedy():
    model, ids = toy(), prompts(2, 5)
    assert torch.equal(generate(model, ids, 9), generate(model, ids, 9, temperature=1e-6))


def test_rows_end_alone_and_are_padded():
    model, ids = toy(), prompts(2, 4)
    free = generate(model, ids, 8)
    stop = int(free[0, 5])
    ends = [4 + row.tolist().index(stop) + 1 if stop in row else 12 for row in free[:, 4:]]
    tokens, stats = generate(model, ids, 8, stop_tokens=[stop, 31], return_stats=True)
    assert stats.lengths[0] == ends[0] < 12
    for row, end in enumerate(stats.lengths):
        assert torch.equal(tokens[row, :end], free[row, :end])
        assert (tokens[row, end:] == min(stop, 31)).all()
    ragged = generate(model, ids, 8, lengths=torch.tensor([4, 2]))
    assert ragged.shape == (2, 12)
    assert ragged[1, 10:].tolist() == [0, 0]  # no stop token to pad with


BAD = [
    ({"ids": prompts(1, 0)}, "not empty"),
    ({"ids": torch.tensor([[32]])}, r"0\.\.31"),
    ({"ids": prompts(1, 65)}, r"64 \(max_seq_len\) - 65 \(prompt\) = -1, got 1"),
    ({"max_new_tokens": 61}, r"64 \(max_seq_len\) - 4 \(prompt\) = 60, got 61"),
    ({"max_new_tokens": 0}, "max_new_tokens must be an integer >= 1, got 0"),
    ({"temperature": -0.1}, "temperature must be 0"),
    ({"temperature": math.nan}, "temperature must be 0"),
    ({"top_p": 0.0}, "top_p must be above 0"),
    ({"top_p": 1.1}, "top_p must be above 0"),
    ({"stop_tokens": [32]}, r"stop_tokens must lie in 0\.\.31, got \[32\]"),
    ({"draft": "eagle"}, "draft must be None or 'mtp', got 'eagle'"),
    ({"lengths": [4]}, "lengths must be 2 numbers in 1..4"),
    ({"lengths": [4, 5]}, "lengths must be 2 numbers in 1..4"),
    ({"lengths": [4, 0]}, "lengths must be 2 numbers in 1..4"),
]


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_refusals(bad, message):
    good = {"ids": prompts(2, 4), "max_new_tokens": 1}
    with pytest.raises(ValueError, match=message):
        generate(toy(), **good | bad)
    with pytest.raises(ValueError, match=message):
        stream(toy(), **good | bad)  # at the call, not at the first word


def test_drafting_needs_modules():
    with pytest.raises(ValueError, match="no MTP modules"):
        generate(toy(mtp_depth=0), prompts(1, 4), 2, draft="mtp")
