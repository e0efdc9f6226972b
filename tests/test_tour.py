"""minids/learn/tour.py, figures/tour.py: a few steps of the tour, what it writes, its picture."""

import re

import pytest
import torch

from figures import style
from figures.tour import BLOCKS, draw, means
from minids import checkpoint, preset
from minids.learn import tour as guide
from minids.tokenizer import load_tokenizer

LOG = [
    dict(tokens=100 * n, loss=7 / n, mtp=[7.1 / n], max_vio=[1 / n, 0.5 / n]) for n in range(1, 251)
]
USAGE = {"prose": [[5, 3, 8, 0]], "code": [[1, 7, 0, 8]]}


@pytest.fixture(scope="module")
def toured(tmp_path_factory):
    """Return folder, run and printed words of a tour of two steps."""
    folder, said = tmp_path_factory.mktemp("tour"), []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("builtins.print", lambda *words: said.append(" ".join(map(str, words))))
        run = guide.tour(folder, threads=1, steps=2, progress=False)
    return folder, run, "\n".join(said)


def test_nano_is_the_size_that_the_tour_promises():
    model = guide.Transformer(preset("nano"))
    assert 600_000 <= sum(weight.numel() for weight in model.parameters()) <= 1_000_000


def test_schedule_warms_up_cools_down_and_rests_the_bias():
    cfg, schedule = preset("nano"), guide.make_schedule(1000)
    assert schedule.tokens == 1000 * guide.BATCH * guide.SEQ_LEN
    first, peak, last = (
        schedule.rates(cfg, step, step * guide.BATCH * guide.SEQ_LEN) for step in (0, 50, 999)
    )
    assert first.lr < peak.lr == guide.PEAK_LR
    assert last.lr == pytest.approx(0.01 * guide.PEAK_LR)
    assert (peak.bias_speed, last.bias_speed) == (cfg.bias_speed, 0.0)


def test_it_leaves_a_model_a_log_and_a_picture(toured):
    folder, run, _ = toured
    assert len((folder / "log.jsonl").read_text().splitlines()) == len(run.log) == 2
    assert (folder / "tour.svg").read_bytes().startswith(b"<?xml")
    ids = torch.tensor([[0, 300, 301, 302]])
    model = checkpoint.load(folder / "model")
    assert torch.equal(model.eval()(ids), run.model.eval()(ids))
    assert load_tokenizer(folder / "model").get_vocab_size() == model.cfg.vocab_size == 1024


def test_it_says_what_it_does(toured):
    _, run, said = toured
    assert f"{sum(weight.numel() for weight in run.model.parameters()):,} parameters" in said
    for domain in ("prose", "code", "all"):
        assert re.search(rf"{domain} +\d\.\d{{3}} nats a character, +\d\.\d{{3}} bits a byte", said)
    assert len(re.findall(r"\d+% of \d+ guesses accepted", said)) == 2
    assert all(prompt.splitlines()[0] in said for prompt in guide.PROMPTS.values())


@pytest.mark.slow
def test_a_tour_taken_again_says_the_same_and_sets_the_threads_back(toured, capsys):
    folder, _, said = toured
    guide.tour(folder, threads=1, steps=2, progress=False)
    assert capsys.readouterr().out.strip() == said.strip()
    assert torch.get_num_threads() == 1


def test_no_matplotlib_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(guide, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'minids\[book\]'"):
        guide.save_plot(LOG, tmp_path / "loss.svg")
    assert "no picture: " in guide._picture(LOG, tmp_path / "loss.svg", USAGE)


# the picture


def test_means_by_hand():
    assert means([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]
    halves = means([float(n) for n in range(2 * BLOCKS)])
    assert halves[:2] == [0.5, 2.5]
    assert len(halves) == BLOCKS


def test_picture_shows_the_numbers():
    loss, balance, use = draw(LOG, USAGE).axes
    assert list(loss.lines[0].get_ydata()) == means([line["loss"] for line in LOG])
    assert list(balance.lines[1].get_ydata()) == means([line["max_vio"][1] for line in LOG])
    heights = [bar.get_height() for bar in use.patches]
    assert heights == pytest.approx([31.25, 18.75, 50, 0, 6.25, 43.75, 0, 50])


def test_picture_is_the_same_bytes_twice():
    assert style.render(draw(LOG, USAGE)) == style.render(draw(LOG, USAGE))


def test_picture_of_a_dense_model_without_mtp():
    log = [line | dict(mtp=[], max_vio=[]) for line in LOG]
    assert len(draw(log).axes) == 2
    assert style.render(draw(log))


def test_picture_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one step"):
        draw([])
