"""Logs of experiments: what made them is in them, and a bad one is not written."""

import json
import math

import pytest
import torch

from minids.learn import log


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(log, "_folder", lambda: tmp_path)
    return tmp_path


def test_log_says_what_made_it_and_comes_back():
    results = {"loss": [4.5, 2.25], "seeds": [0, 1]}
    log.write("planted", results, command="python -m planted", seconds=12.6)
    stamped = log.read("planted")
    assert stamped["results"] == results
    assert stamped["command"] == "python -m planted"
    assert stamped["seconds"] == 13
    assert stamped["machine"]["torch"] == torch.__version__
    assert {"date", "cpu", "threads", "python"} <= set(stamped["machine"])


def test_same_results_are_the_same_bytes(folder):
    log.write("planted", {"b": 1, "a": 2}, command="c", seconds=1)
    first = (folder / "planted.json").read_bytes()
    log.write("planted", {"a": 2, "b": 1}, command="c", seconds=1)
    assert (folder / "planted.json").read_bytes() == first


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"loss": math.nan}, "must be plain JSON"),
        ({"loss": torch.zeros(1)}, "must be plain JSON"),
        ({"loss": [0.123456789] * 20_000}, "must stay under 200,000 B"),
    ],
)
def test_bad_results_are_refused_and_the_old_log_stays(folder, results, message):
    log.write("planted", {"loss": 1}, command="c", seconds=1)
    with pytest.raises(ValueError, match=message):
        log.write("planted", results, command="c", seconds=1)
    assert json.loads((folder / "planted.json").read_text())["results"] == {"loss": 1}


def test_missing_log_says_how_to_make_it():
    with pytest.raises(ValueError, match=r"`python -m minids\.learn\.experiments\.none` makes it"):
        log.read("none")
