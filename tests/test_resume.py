"""minids/files/resume.py: killed at any moment a run goes on to the same bits; damage is named."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minids import Config, Transformer, preset
from minids.data import Packed
from minids.files import resume, state
from minids.schedule import Schedule
from minids.train import make_optimizer, train

STEPS, SAVE_EVERY = 16, 4


def slow_run(folder: str, seed: int) -> None:
    """What a process does until it is killed: a pause each step, others around a save's parts."""
    torch.set_num_threads(1)
    real_rows, real_save, real_replace = Packed.rows, state.save_file, os.replace
    pause = random.Random(seed).uniform

    def slowly(function, longest=0.1):
        def call(*given):
            time.sleep(pause(0, longest))
            result = function(*given)
            time.sleep(pause(0, longest))
            return result

        return call

    Packed.rows, state.save_file = slowly(real_rows, 0.01), slowly(real_save)
    os.replace = slowly(real_replace)
    run(folder)


TOY = preset("toy", bias_speed=0.01)


def run(folder: str | Path | None, steps: int = STEPS, cfg: Config = TOY, **options):
    """Train a toy on a fixed stream: weights, batches and rates all change on the way."""
    documents = [[(start + 7 * n) % 32 for n in range(11 + start)] for start in range(20)]
    tokens = 8.0 * 8 * steps
    schedule = Schedule(peak_lr=3e-3, warmup_steps=3, constant=tokens / 2, cosine=tokens / 4,
                        tail=tokens / 8, last_tail=tokens / 8, batch=8, first_batch=8)  # fmt: skip
    data = Packed(documents, 8, 0)
    model = Transformer(cfg)
    options = dict(save_every=SAVE_EVERY, progress=False) | options
    return train(model, data, schedule, folder=folder, **options)


def facts(log: list[dict]) -> list[dict]:
    """Return a log without what the clock says."""
    return [{key: value for key, value in line.items() if key != "tokens_per_s"} for line in log]


def read_log(folder: Path) -> list[dict]:
    return facts([json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()])


def states(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "state").iterdir())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Return folder and log of a run that nothing stops."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    return folder, facts(run(folder).log)


class Stopped(Exception):
    """Stands for the end of the process at a chosen step."""


def stop_at(step: int, monkeypatch):
    """Make the next run end as step `step` begins."""
    rows, calls = Packed.rows, []

    def limited(self, start, count):
        calls.append(start)
        if len(calls) == 1 + 8 * step + 1:  # one to know the data by, eight a step
            raise Stopped
        return rows(self, start, count)

    monkeypatch.setattr(Packed, "rows", limited)


# worked example


def test_a_state_holds_weights_moments_biases_and_counters(tmp_path):
    """Two steps of 8 rows of 8 tokens: everything is in the file, bit for bit."""
    ended = run(tmp_path, steps=2)
    path = tmp_path / "state/step_000000002.safetensors"
    tensors = load_file(path)
    for name, value in ended.model.state_dict().items():
        assert torch.equal(tensors[f"model.{name}"], value)
    assert any(name.endswith("router.bias") and tensors[name].any() for name in tensors)
    moments = [name for name in tensors if name.startswith("optimizer.")]
    assert len(moments) == 3 * len(list(ended.model.parameters()))  # two moments and a step count
    assert tensors["optimizer.0.step"] == 2
    header, _ = resume.read_state(path)
    assert header["position"] == [2, 16, 128]
    assert header["log_bytes"] == (tmp_path / "log.jsonl").stat().st_size


# killed at any moment


@pytest.mark.slow
def test_killed_again_and_again_it_reaches_the_same_bits(tmp_path, uninterrupted):
    """SIGKILL, at random moments, a real process that spends most of its time in saves."""
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    context.set_forkserver_preload(["minids.train"])  # children start with it read
    moments, kills = random.Random(0), 0
    for attempt in range(40):
        process = context.Process(target=slow_run, args=(str(tmp_path), attempt))
        process.start()
        # counted from the first sign of life: on a busy machine the start takes any time
        log, before = tmp_path / "log.jsonl", _size(tmp_path / "log.jsonl")
        while kills < 5 and process.is_alive() and _size(log) == before:
            time.sleep(0.01)
        process.join(moments.uniform(0.0, 0.5) if kills < 5 else None)
        if process.is_alive():
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL
            kills += 1
        elif process.exitcode == 0:
            break
    assert kills >= 3
    whole, log = uninterrupted
    assert read_log(tmp_path) == log
    assert states(tmp_path) == states(whole)
    for name in states(whole):
        ours, theirs = (load_file(folder / "state" / name) for folder in (tmp_path, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


@pytest.mark.parametrize("step", [0, 1, 4, 5, 15])
def test_stopped_at_a_chosen_step(step, tmp_path, uninterrupted, monkeypatch):
    with monkeypatch.context() as patched:
        stop_at(step, patched)
        with pytest.raises(Stopped):
            run(tmp_path)
    assert facts(run(tmp_path).log) == uninterrupted[1] == read_log(tmp_path)


@pytest.mark.parametrize("half", ['{"step": 11, "rows": 1', '{"step": 11}\n{"st'])
def test_half_a_log_line_is_cut_off(half, tmp_path, uninterrupted, monkeypatch):
    with monkeypatch.context() as patched:
        stop_at(10, patched)
        with pytest.raises(Stopped):
            run(tmp_path)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write(half)
    assert facts(run(tmp_path).log) == uninterrupted[1] == read_log(tmp_path)


@pytest.mark.parametrize("moment", ["save_file", "fsync", "replace"])
def test_a_failed_save_leaves_the_state_before(moment, tmp_path, uninterrupted, monkeypatch):
    """The disk is full at the third save: what two saves have written is there, and goes on."""
    calls, owner = [], state if moment == "save_file" else os
    real = getattr(owner, moment)

    def failing(*given):
        calls.append(given)
        if len(calls) == (5 if moment == "fsync" else 3):  # log and state are synchronised
            raise OSError("no space left on device")
        return real(*given)

    with monkeypatch.context() as patched:
        patched.setattr(owner, moment, failing)
        with pytest.raises(OSError, match="no space left"):
            run(tmp_path)
    kept = [name for name in states(tmp_path) if name.endswith(".safetensors")]
    assert kept == ["step_000000000.safetensors", "step_000000004.safetensors"]
    assert facts(run(tmp_path).log) == uninterrupted[1]


def test_a_run_in_fp8_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    """Moments are BF16 in the file, FP32 once loaded: widening is exact, the next step the same."""
    few = dict(n_layers=1, n_dense_layers=0, mtp_depth=0, n_routed_experts=2, n_expert_groups=1,
               n_limited_groups=1, n_shared_experts=0)  # fmt: skip
    given = dict(steps=4, cfg=preset("toy", precision="fp8", bias_speed=0.01, **few), save_every=2)
    whole = run(tmp_path / "whole", **given)
    with monkeypatch.context() as patched:
        stop_at(3, patched)
        with pytest.raises(Stopped):
            run(tmp_path / "stopped", **given)
    path = tmp_path / "stopped/state/step_000000002.safetensors"
    kept = {name: t for name, t in load_file(path).items() if ".exp_avg" in name}
    assert len(kept) == 2 * len(list(whole.model.parameters()))
    assert {t.dtype for t in kept.values()} == {torch.bfloat16}
    again = run(tmp_path / "stopped", **given)
    assert facts(again.log) == facts(whole.log) == read_log(tmp_path / "stopped")
    assert states(tmp_path / "stopped") == states(tmp_path / "whole")
    for name in states(tmp_path / "whole"):
        ours, theirs = (load_file(tmp_path / at / "state" / name) for at in ("stopped", "whole"))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_finished_run_is_not_run_again(uninterrupted):
    whole, log = uninterrupted
    before = (whole / "log.jsonl").read_bytes()
    assert facts(run(whole).log) == log
    assert (whole / "log.jsonl").read_bytes() == before


def test_two_states_are_kept(uninterrupted):
    assert states(uninterrupted[0]) == [f"step_{n:09}.safetensors" for n in (12, 16)]


# damage


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip_a_weight(data: bytes) -> bytes:
    return data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]


def flip_a_counter(data: bytes) -> bytes:
    return data.replace(rb"\"position\": [8,", rb"\"position\": [9,")


@pytest.mark.parametrize("damage", [cut, flip_a_weight, flip_a_counter, lambda _: b"not a state"])
def test_a_damaged_state_is_named_and_the_one_before_goes_on(
    damage, tmp_path, uninterrupted, monkeypatch
):
    with monkeypatch.context() as patched:
        stop_at(10, patched)
        with pytest.raises(Stopped):
            run(tmp_path)
    path = tmp_path / "state/step_000000008.safetensors"
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert path.read_bytes() != whole
    with pytest.raises(ValueError, match=r"step_000000008\.safetensors is damaged .*delete it"):
        run(tmp_path)
    path.unlink()
    assert facts(run(tmp_path).log) == uninterrupted[1] == read_log(tmp_path)


def test_a_shortened_log_is_refused(tmp_path):
    run(tmp_path, steps=5)
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"log\.jsonl is shorter than at step 5"):
        run(tmp_path, steps=5)


def test_a_log_without_a_state_is_not_overwritten(tmp_path):
    (tmp_path / "log.jsonl").write_text("mine\n")
    with pytest.raises(ValueError, match="has a log but no state"):
        run(tmp_path)
    assert (tmp_path / "log.jsonl").read_text() == "mine\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(steps=6), "has a run with schedule"),
        (dict(steps=5, micro_batches=2), "has a run with micro_batches 1, not 2: use a new folder"),
    ],
)
def test_another_run_in_the_folder_is_refused(options, message, tmp_path):
    run(tmp_path, steps=5)
    before = {path.name: path.read_bytes() for path in (tmp_path / "state").iterdir()}
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **options)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "state").iterdir()}


def test_planted_mistakes_are_seen(tmp_path, uninterrupted, monkeypatch):
    """A state without the moments, or without the biases, does not give the same bits."""
    for number, lost in enumerate(("optimizer.", "router.bias")):
        folder = tmp_path / str(number)
        with monkeypatch.context() as patched:
            stop_at(10, patched)
            with pytest.raises(Stopped):
                run(folder)
        with monkeypatch.context() as patched:
            read = resume.read_state

            def forgetful(path, lost=lost, read=read):
                header, tensors = read(path)
                kept = {n: t * (lost not in n or n.endswith("step")) for n, t in tensors.items()}
                return header, kept

            patched.setattr(resume, "read_state", forgetful)
            assert facts(run(folder).log) != uninterrupted[1]


def test_optimizer_state_survives_bit_for_bit(tmp_path):
    ended = run(tmp_path, steps=3)
    model = Transformer(ended.model.cfg, seed=1)
    optimizer = make_optimizer(model)
    header, tensors = resume.read_state(next((tmp_path / "state").glob("*3.safetensors")))
    found = resume.load_state(tmp_path, model, optimizer, header["about"])
    assert found is not None
    assert found[0] == (3, 24, 192)
    for index, moments in optimizer.state_dict()["state"].items():
        for key, value in moments.items():
            assert torch.equal(value, tensors[f"optimizer.{index}.{key}"])
