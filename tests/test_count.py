"""Counting: by hand at toy size, the fact sheet's golden numbers, formula = meta device."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minids import PRESETS, preset
from minids.cli.report import table
from minids.count import (
    MEASURED_TFLOPS,
    REPORTED_HOURS,
    REPORTED_TOKENS,
    attention_parameters,
    binary,
    count,
    count_files,
    count_meta,
    short,
)

V3 = count(preset("v3"))


def test_toy_by_hand():
    # D 8, H 2, Q 6, C 4, N R V = 4 2 4, one dense layer of F 16, one MoE layer of 8 experts of F 8
    attention = 8 * 6 + 6 + 6 * 2 * 6 + 8 * (4 + 2) + 4 + 4 * 2 * (4 + 4) + 2 * 4 * 8
    expert = 3 * 8 * 8
    counts = count(preset("toy"))
    assert attention_parameters(preset("toy")) == attention == 306
    assert counts.parts == {
        "attention": 2 * attention,
        "dense FFN": 3 * 8 * 16,
        "shared experts": expert,
        "routed experts": 8 * expert,
        "gate matrices": 8 * 8,
        "gate biases": 8,
        "norms": 5 * 8,
        "embedding": 32 * 8,
        "output head": 32 * 8,
    }
    assert counts.mtp == attention + 9 * expert + 64 + 8 + 2 * 8 + 2 * 8 * 8 + 3 * 8
    assert counts.active["with neither"] == counts.total - 2 * 256 - 6 * expert
    assert counts.cache_elements == 2 * (4 + 2)


def test_v3_parts_are_the_fact_sheets():
    assert attention_parameters(preset("v3")) == 187_107_328
    assert V3.parts == {
        "attention": 11_413_547_008,
        "dense FFN": 1_189_085_184,
        "shared experts": 2_554_331_136,
        "routed experts": 653_908_770_816,
        "gate matrices": 106_430_464,
        "gate biases": 14_848,
        "norms": 881_664,
        "embedding": 926_679_040,
        "output head": 926_679_040,
    }
    assert V3.total == 671_026_419_200
    assert (V3.mtp, V3.mtp_stored) == (11_610_068_224, 13_463_426_304)


@pytest.mark.parametrize(
    ("name", "total", "head", "both", "neither"),
    [
        ("v3", 671_026_419_200, 36_625_618_432, 37_552_297_472, 35_698_939_392),
        ("v2", 235_741_434_880, 20_851_512_320, 21_375_800_320, 20_327_224_320),
        ("v2_lite", 15_706_484_224, 2_451_435_008, 2_661_150_208, 2_241_719_808),
    ],
)
def test_published_totals_and_three_conventions(name, total, head, both, neither):
    counts = count(preset(name))
    assert counts.total == total
    assert counts.active == {
        "with head": head,
        "with both tables": both,
        "with neither": neither,
    }


@pytest.mark.parametrize(
    ("name", "elements"), [("v3", 35_136), ("v2", 34_560), ("v2_lite", 15_552)]
)
def test_cache_a_token(name, elements):
    counts = count(preset(name))
    assert (counts.cache_elements, counts.cache_bytes) == (elements, 2 * elements)


def test_training_flops_and_hours_of_v3():
    assert V3.flops_training / 1e9 == pytest.approx(250.5, abs=0.05)  # fact sheet 4.7
    assert V3.flops_training == 3 * V3.flops_forward
    # non-causal attention is twice as dear, as if the context were twice as long
    assert count(preset("v3"), seq_len=8192).flops_training / 1e9 == pytest.approx(281.2, abs=0.05)
    hours = V3.gpu_hours(REPORTED_TOKENS, MEASURED_TFLOPS)
    assert hours == pytest.approx(REPORTED_HOURS["pre-training"], rel=0.005)
    assert sum(REPORTED_HOURS.values()) * 2 == 5_576_000
    # 180 K GPU-hours per trillion tokens
    assert REPORTED_HOURS["pre-training"] == pytest.approx(14.8 * 180_000)


def test_training_memory_of_the_fp8_recipe():
    fp8 = V3.training_bytes["fp8"]
    assert fp8 == {
        "weights": V3.total,
        "master weights": 4 * V3.total,
        "gradients": 4 * V3.total,
        "optimiser": 4 * V3.total,
    }
    assert sum(V3.training_bytes["fp32"].values()) == 16 * V3.total


@pytest.mark.parametrize("name", PRESETS)
def test_formula_equals_the_meta_device(name):
    counts = count(preset(name))
    assert count_meta(preset(name)) == (counts.total, counts.mtp)


@given(
    attn=st.sampled_from(["mla", "mha", "gqa", "mqa"]),
    layers=st.integers(1, 3),
    dense=st.integers(0, 1),
    rank=st.sampled_from([0, 5]),
    shared=st.integers(0, 2),
    depth=st.integers(0, 2),
    softmax=st.booleans(),
    widths=st.lists(st.integers(1, 9), min_size=5, max_size=5),
)
def test_formula_equals_the_meta_device_for_any_config(
    attn, layers, dense, rank, shared, depth, softmax, widths
):
    dim, inter, expert, latent, value = widths
    cfg = replace(
        preset("toy"),
        attn=attn,
        n_layers=layers,
        n_dense_layers=dense,
        q_lora_rank=rank,
        n_shared_experts=shared,
        mtp_depth=depth,
        score_func="softmax" if softmax else "sigmoid",
        dim=dim,
        inter_dim=inter,
        moe_inter_dim=expert,
        kv_lora_rank=latent,
        v_head_dim=value,
    )
    counts = count(cfg)
    assert count_meta(cfg) == (counts.total, counts.mtp)


def test_table_and_json_say_the_same():
    cfg = preset("v3")
    text = table(cfg, V3, REPORTED_TOKENS, MEASURED_TFLOPS, 2.0, count_files(cfg))
    for number in (
        "671,026,419,200",
        "36,625,618,432",
        "13,463,426,304",
        "70,272 B",
        "2,788,000",
        "91,991",
    ):
        assert number in text
    v2 = preset("v2")
    assert "reported" not in table(v2, count(v2), 1e12, 400.0, 2.0, {})
    plain = json.loads(json.dumps(V3.as_dict()))
    assert plain["total"] == V3.total
    assert plain["active"] == V3.active


def test_files_of_v3_are_the_published_ones():
    files = count_files(preset("v3"))
    assert files["fp8"] == {
        "tensors": 91_991,
        "elements": 684_531_386_000,
        "bytes": 688_574_839_360,
    }
    assert files["bf16"]["elements"] == 684_489_845_504


def test_files_of_v2_have_no_mtp_and_no_bias():
    files = count_files(preset("v2_lite"))
    assert files["bf16"]["elements"] == 15_706_484_224
    assert files["bf16"]["bytes"] == 2 * 15_706_484_224


def test_units():
    assert [short(n) for n in (7, 1500, 36_625_618_432)] == ["7", "1.50 K", "36.63 B"]
    assert [binary(n) for n in (7, 1536, 2**40)] == ["7 B", "1.50 KiB", "1.00 TiB"]


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="seq_len must be at least 1, got 0"):
        count(preset("v3"), seq_len=0)
    with pytest.raises(ValueError, match="tokens must be a positive number, got -1"):
        V3.gpu_hours(-1, 100)
    with pytest.raises(ValueError, match="tflops must be a positive number, got nan"):
        V3.gpu_hours(1e9, float("nan"))


def test_figure_groups_every_parameter_once():
    figure = pytest.importorskip("figures.count")
    groups = figure.grouped(V3, preset("v3"))
    assert sum(everything for everything, _ in groups.values()) == V3.total
    assert sum(used for _, used in groups.values()) == V3.active["with head"]


def test_stored_figure_is_what_draw_draws():
    figure = pytest.importorskip("figures.count")
    stored = Path(__file__).parents[1] / "figures" / "count.svg"
    assert figure.style.render(figure.draw()) == stored.read_bytes(), "run: python figures/count.py"
