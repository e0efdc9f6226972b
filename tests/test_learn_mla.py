"""Chapter 04's experiment, its log and its pictures: numbers that a reader is shown."""

import json

import pytest
import torch
from einops import rearrange

from figures import mla as figures
from figures import style
from minids import Config, Transformer, check, preset
from minids.count import attention_parameters, count
from minids.learn import log
from minids.learn.check import find
from minids.learn.experiments import mla as race

RESULTS = log.read("mla")["results"]


def test_arms_called_same_cache_keep_what_mla_keeps():
    for name, configs in race.candidates().items():
        for cfg in configs:
            assert (cfg.cache_dim == 72) == (name == "MLA" or "same cache" in name)


def test_arms_called_same_heads_have_the_heads_of_mla():
    mla = race.candidates()["MLA"][0]
    for name, configs in race.candidates().items():
        if "same heads" in name:
            shape = [(c.n_heads, c.qk_nope_head_dim, c.v_head_dim) for c in configs]
            assert shape == [(mla.n_heads, mla.qk_nope_head_dim, mla.v_head_dim)]


def test_mla_has_the_proportions_of_v3():
    mla, v3 = race.candidates()["MLA"][0], preset("v3")
    for cfg in (mla, v3):
        assert cfg.kv_lora_rank == 4 * cfg.qk_nope_head_dim
        assert 2 * cfg.qk_rope_head_dim == cfg.qk_nope_head_dim == cfg.v_head_dim
    assert mla.cache_dim / (mla.qk_nope_head_dim + mla.v_head_dim) == 2.25


def test_all_arms_have_the_same_parameters_within_a_thousandth():
    sizes = [count(cfg).total for configs in race.candidates().values() for cfg in configs]
    assert max(sizes) / min(sizes) < 1.001


def test_the_log_tells_of_these_arms():
    assert set(RESULTS["arms"]) == set(race.candidates())
    for name, configs in race.candidates().items():
        arm = RESULTS["arms"][name]
        wanted = [race.describe(cfg) for cfg in configs]
        assert {key: arm[key] for key in wanted[0]} in wanted
        assert [run["seed"] for run in arm["runs"]] == list(race.SEEDS)
        tried = [trial for trial in RESULTS["pilot"] if trial["arm"] == name]
        assert len(tried) == len(race.RATES) * len(configs)
        best = min(tried, key=lambda trial: trial["nats"])
        assert (best["peak_lr"], best["n_heads"]) == (arm["peak_lr"], arm["n_heads"])
    assert race.PILOT_SEED not in race.SEEDS


def test_what_describes_an_arm_is_what_minids_counts():
    cfg = preset("nano", attn="gqa", n_kv_heads=2, mtp_depth=0)
    told = race.describe(cfg)
    assert told["cached"] == cfg.cache_dim == 128
    assert told["attention_parameters"] == attention_parameters(cfg)
    assert told["parameters"] == count(cfg).total
    assert told["kv_heads"] == 2


def test_fill_meets_the_other_size_by_the_ffn_alone():
    like = race.candidates()["MLA"][0]
    small = Config(**{**vars(like), "attn": "mqa", "inter_dim": 10})
    full = race.fill(small, like)
    assert vars(full) == vars(small) | {"inter_dim": full.inter_dim}
    half_a_channel = 3 * like.dim * like.n_layers / 2
    assert abs(count(full).total - count(like).total) <= half_a_channel


def test_differences_are_taken_seed_by_seed(monkeypatch):
    def arm(*nats: float) -> dict:
        return {"runs": [{"nats": value} for value in nats]}

    arms = {"MLA": arm(1.0, 5.0, 3.0), "MHA": arm(1.5, 5.5, 3.5), "MQA": arm(1.0, 6.0, 2.0)}
    monkeypatch.setattr(race, "candidates", lambda: arms)
    differences = dict(race.against_mla(arms))
    assert differences["MHA"] == (pytest.approx(0.5), pytest.approx(0.0, abs=1e-9))
    # 0, 1 and -1: deviation 1, three runs
    assert differences["MQA"] == (pytest.approx(0.0), pytest.approx(4.303 / 3**0.5, rel=1e-3))


def test_left_over_by_hand():
    # squares of the singular values: 9, 4, 3
    matrix = torch.diag(torch.tensor([3.0, 2.0, 3**0.5]))
    assert race.left_over(matrix) == [pytest.approx(7 / 16), pytest.approx(3 / 16), 0.0]


def mha() -> Transformer:
    return Transformer(preset("toy", attn="mha", mtp_depth=0, init_std=0.5))


def test_keys_and_values_are_what_the_cache_holds():
    model, ids = mha(), torch.randint(32, (2, 6))
    cache = model.new_cache(batch=2, capacity=6)
    model(ids, cache=cache)
    held = [rearrange(layer, "b t w -> (b t) w") for layer in cache.store]
    for mine, theirs in zip(race.keys_and_values(model, ids, turned=True), held, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_before_rotation_the_rank_is_the_width_at_most():
    model, ids = mha(), torch.randint(32, (4, 16))
    plain, turned = (race.keys_and_values(model, ids, turn)[-1] for turn in (False, True))
    assert plain.shape == turned.shape == (64, 16)
    assert max(race.left_over(plain)[8 - 1 :]) < 1e-5  # D = 8
    assert race.left_over(turned)[8 - 1] > 1e-3


def test_the_logged_layer_obeys_the_same_bound():
    low, width = RESULTS["ranks"], race.candidates()["MHA, same heads"][0].dim
    assert low["plain"][width - 1] == low["untrained"][width - 1] == 0
    assert low["turned"][width - 1] > 0
    assert len(low["sample"]) == race.SAMPLE
    assert {len(row) for row in low["sample"]} == {RESULTS["arms"]["MHA, same heads"]["cached"]}


@pytest.mark.slow
def test_a_run_repeats_itself_and_learns():
    cfg = race.candidates()["MLA"][0]
    once, again = (race.score(race.learn(cfg, 4e-3, 0, steps=30)) for _ in range(2))
    assert once == again
    assert len(once.curve) == 3
    assert once.nats != race.score(race.learn(cfg, 4e-3, 1, steps=30)).nats
    assert once.nats < race.score(race.learn(cfg, 1e-9, 0, steps=1)).nats - 0.3


@pytest.mark.slow
def test_the_whole_experiment_runs_and_can_be_logged(monkeypatch):
    arms = race.candidates()
    few = {name: arms[name] for name in ("MLA", "MHA, same cache", "MHA, same heads")}
    monkeypatch.setattr(race, "candidates", lambda: few)
    monkeypatch.setattr(figures, "candidates", lambda: few)
    monkeypatch.setattr(race, "RATES", (2e-3, 4e-3))
    results = json.loads(json.dumps(race.experiment(seeds=(0, 1), steps=10, pilot_steps=2)))
    assert set(results["arms"]) == set(few)
    assert len(results["pilot"]) == 2 * (1 + 2 + 1)
    assert set(results["ranks"]) == set(RESULTS["ranks"])
    assert set(results["settings"]) == set(RESULTS["settings"])
    figures.draw_race(results)
    figures.draw_ranks(results["ranks"])


@pytest.mark.parametrize("kind", ["mha", "mla"])
@pytest.mark.parametrize("name", ["v3", "toy", "v2_lite"])
def test_framed_boxes_are_what_is_cached(kind, name):
    cfg = figures.preset_as(preset(name), kind)
    boxes = figures._boxes(cfg)
    assert sum(numbers for _, _, numbers, _, cached in boxes if cached) == cfg.cache_dim
    places = {(column, row) for column, row, *_ in boxes}
    assert {end for start, end, _ in figures._links(cfg)} <= places
    assert {start for start, end, _ in figures._links(cfg)} <= places


def test_pictures_are_the_same_bytes_twice():
    for draw in (
        figures.draw,
        lambda: figures.draw_race(RESULTS),
        lambda: figures.draw_ranks(RESULTS["ranks"]),
    ):
        assert style.render(draw()) == style.render(draw())
    assert repr(figures.widget()) == repr(figures.widget())
    assert figures.widget()._repr_html_() == figures.widget()._repr_html_()


def test_the_alt_text_says_the_numbers_that_are_drawn():
    v3 = preset("v3")
    numbers = [figures.preset_as(v3, "mha").cache_dim, v3.kv_lora_rank, v3.qk_rope_head_dim,
               v3.cache_dim, v3.n_heads]  # fmt: skip
    for number in numbers:
        assert f"{number:,}" in figures.ALT


@pytest.mark.skipif(not find("mla.3").solution, reason="NOT RUN: a copy without solutions")
@pytest.mark.parametrize(
    ("which", "spoils"),
    [
        ("mla.3", lambda c, w_ukv, _heads, _nope: (c.zero_(), w_ukv.zero_())),
        ("mla.4", lambda q, w_uk: q.zero_() + w_uk.zero_()[0]),
        ("mla.5", lambda *given: [part.zero_() for part in given[:4]]),
    ],
)
def test_an_answer_that_changes_what_it_is_given_spoils_no_later_one(which, spoils):
    right: dict[str, object] = {}
    exec(find(which).solution, right)
    assert not check(which, spoils).right
    assert check(which, right[find(which).name]).right
