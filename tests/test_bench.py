"""The benchmark at toy size: its rows, units and arithmetic; no time is compared with another."""

import json
import math
import sys
from dataclasses import replace

import pytest
import torch

from minids.bench import cases, cpu
from minids.model import Transformer

TOLERANCE = 1e-5  # relative; two FP32 programs that add in different orders
TOY = "toy"


@pytest.fixture(scope="module")
def report():
    """The toy benchmark without the fresh processes, which one test of its own starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "peak_memory", lambda key, side, size, threads: 3 * 2**20)
        return cpu.run(threads=1, size=TOY)


def test_row_by_hand():
    """Medians 2 and 6 s for 10 tokens; quartiles of 1, 2, 3 are 1.5, 2.5; the slow side is out."""
    case = cases.Case("x", 3.0, 10, 0.0, 3, ("minids", "slow", "fast"), lambda side: None)
    seconds = {"minids": [1.0, 2.0, 3.0], "slow": [9.0, 9.0, 9.0], "fast": [6.0, 5.0, 7.0]}
    row = cpu.summarise(case, seconds)
    assert row["rival"] == "fast"
    assert row["ratio"] == 3.0
    assert row["ours"] == {"seconds": 2.0, "spread_seconds": 1.0, "tokens_per_second": 5.0}
    assert row["medians"] == {"minids": 2.0, "slow": 9.0, "fast": 6.0}


def test_weights_are_shared_and_logits_equal():
    for cfg in (cases.TOY.train, cases.TOY.lite):
        model = Transformer(cfg)
        peer = cases.twin(model, "eager")
        ids = torch.arange(6)[None]
        ours, theirs = model(ids), peer(ids).logits
        assert (ours - theirs).norm() <= TOLERANCE * theirs.norm()
        assert peer.lm_head.weight.data_ptr() == model.head.weight.data_ptr()


def test_every_race_is_run_and_ratios_come_from_printed_times(report):
    assert list(report["rows"]) == ["train", "nano", "generate", "lite", "absorb", "layer"]
    for row in report["rows"].values():
        for side in (row["ours"], row["theirs"]):
            assert side["seconds"] > 0
            assert side["spread_seconds"] >= 0
            assert side["peak_bytes"] > 0
        assert row["ratio"] == row["theirs"]["seconds"] / row["ours"]["seconds"]
        rivals = {side: t for side, t in row["medians"].items() if side != "minids"}
        assert row["theirs"]["seconds"] == min(rivals.values()) == rivals[row["rival"]]


def test_table_has_rows_units_and_the_machine(report):
    table = cpu.format_table(report)
    head, _, *lines = [line for line in table.splitlines() if line.startswith("|")]
    for column in ("ratio", "time", "spread", "tokens/s", "peak memory"):
        assert column in head
    assert len(lines) == 2 * len(report["rows"])
    assert all(line.count(" ms |") == 2 and line.endswith("3 MiB |") for line in lines)
    for row, line in zip(report["rows"].values(), lines[::2], strict=True):
        assert f"| {row['name']} | {row['ratio']:.2f}x |" in line
        printed = float(line.split("|")[5].removesuffix(" ms ").replace(",", ""))
        assert math.isclose(printed, row["ours"]["seconds"] * 1e3, abs_tol=0.051)  # one digit
    machine = report["machine"]
    for fact in ("date", "cpu", "torch", "transformers", "python"):
        assert machine[fact] in table
    assert f"{machine['threads']} threads" in table


@pytest.mark.slow
def test_peak_memory_is_of_a_fresh_process():
    ours = torch.ones(3 * 2**28)  # 3 GiB, which the other process must not be charged for
    peak = cpu.peak_memory("absorb", "minids", TOY, threads=1)
    assert peak is not None
    assert 50 * 2**20 < peak < 2 * 2**30 < ours.nbytes  # Python with torch, and little more


def test_sides_that_disagree_are_not_timed():
    case = cases.make_cases(cases.TOY)["nano"]

    def start(side):
        call = case.start(side)
        return call if side == "minids" else lambda: call() * 1.01

    with pytest.raises(RuntimeError, match=r"grouped_mm differs from minids by 1\.\de-02|9\.9e-03"):
        cpu.race(replace(case, start=start))


def test_threads_are_checked_and_put_back(monkeypatch):
    monkeypatch.setattr(cpu, "make_cases", lambda size: {})
    torch.set_num_threads(2)
    assert cpu.run(threads=1)["machine"]["threads"] == 1
    assert torch.get_num_threads() == 2
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        cpu.run(threads=0)


def test_main_prints_and_writes_the_same(report, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cpu, "run", lambda threads: report)
    cpu.main(json_file=tmp_path / "bench.json", threads=1)
    assert capsys.readouterr().out == cpu.format_table(report) + "\n"
    assert json.loads((tmp_path / "bench.json").read_text()) == report


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"minids\[test\]"):
        cases.twin(Transformer(cases.TOY.train), "eager")
