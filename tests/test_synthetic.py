"""minids/files/synthetic.py: an invented checkpoint is one that everything else reads."""

import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import folders
import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from minids import cli, generate, load, preset
from minids.files import synthetic
from minids.files.shards import FP8, deal, tensor_names
from minids.files.synthetic import RELEASED_SHARD_BYTES, check_room, make_checkpoint

NANO = preset("nano", precision="fp8")


@pytest.fixture(autouse=True)
def small_pool(monkeypatch):
    """A pool that tensors go round several times."""
    monkeypatch.setattr(synthetic, "_POOL", 65_537)


def headers(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    found = {}
    for path in folders.shards(folder):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # no dict
                part = file.get_slice(name)
                found[name] = (tuple(part.get_shape()), part.get_dtype())
    return found


def test_v3_has_as_many_files_and_bytes_as_the_release():
    """91,991 tensors, 688,574,839,360 bytes, 163 files: the release's metadata and index."""
    names = tensor_names(preset("v3"), FP8)
    tensors = [synthetic.Tensors(name, *rest) for name, rest in names.items()]
    sizes = [tensor.nbytes for tensor in tensors]
    assert (len(sizes), sum(sizes)) == (91_991, 688_574_839_360)
    assert len(deal(tensors, sizes, RELEASED_SHARD_BYTES)) == 163


@pytest.mark.parametrize("fill", synthetic.FILLS)
@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_names_shapes_and_dtypes_are_those_of_a_saved_model(tmp_path, fill, scale_fmt):
    cfg = replace(NANO, scale_fmt=scale_fmt)
    make_checkpoint(tmp_path / "m", cfg, fill, max_shard_bytes=200_000)
    expected = {
        name: (shape, {FP8: "F8_E4M3", torch.bfloat16: "BF16", torch.float32: "F32"}[dtype])
        for name, (shape, dtype) in tensor_names(cfg, FP8).items()
    }
    assert headers(tmp_path / "m") == expected
    assert len(folders.shards(tmp_path / "m")) > 5
    index = json.loads((tmp_path / "m" / folders.INDEX).read_text())
    assert index["weight_map"].keys() == expected.keys()
    model = load(tmp_path / "m")  # copies are copies, scales good, all of it finite
    assert model.cfg.scale_fmt == scale_fmt
    tokens = generate(model, torch.tensor([[0, 5, 9]]), max_new_tokens=8)
    assert len(set(tokens[0, 3:].tolist())) > 1
    assert tokens.max() < synthetic._WORDS, "the tokenizer cannot spell what it writes"


def test_weights_have_the_spread_of_the_config_and_rows_differ(tmp_path):
    make_checkpoint(tmp_path / "m", replace(NANO, init_std=0.01))
    model = load(tmp_path / "m", dtype="fp32")
    weight = model.layers[1].ffn.experts.w_gate_up.detach()
    assert weight.std() == pytest.approx(0.01, rel=0.3)  # of scales from half to double
    assert len(weight.flatten(0, 2).unique(dim=0)) == weight.flatten(0, 2).shape[0]
    values = folders.tensors(tmp_path / "m")["model.layers.1.mlp.experts.0.up_proj.weight"].float()
    assert values.isfinite().all()
    assert values.abs().max() > 300


def test_routing_is_spread(tmp_path):
    make_checkpoint(tmp_path / "m", NANO)
    model = load(tmp_path / "m")
    ids = torch.randint(0, 1024, (4, 64))
    load_of = model.losses(ids).load
    assert (load_of > 0).all(), load_of


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(tmp_path):
    read = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_checkpoint(tmp_path / name, NANO, seed=seed)
        read[name] = folders.shards(tmp_path / name)[0].read_bytes()
    assert read["a"] == read["b"] != read["c"]


@pytest.mark.skipif(sys.platform != "linux", reason="holes are counted as Linux does")
def test_sparse_weights_take_no_disk(tmp_path):
    wide = replace(NANO, dim=512, moe_inter_dim=512, n_routed_experts=32, mtp_depth=0)
    held = {}
    for fill in synthetic.FILLS:
        make_checkpoint(tmp_path / fill, wide, fill)
        status = [path.stat() for path in folders.shards(tmp_path / fill)]
        held[fill] = sum(512 * s.st_blocks for s in status), sum(s.st_size for s in status)
    assert held["sparse"][1] == held["random"][1] > 25e6
    assert held["sparse"][0] < held["sparse"][1] / 10
    assert held["random"][0] >= held["random"][1]


def run(*arguments):
    return CliRunner().invoke(cli.app, ["make-checkpoint", *map(str, arguments)])


def test_the_command_keeps_the_dense_layers_and_says_what_it_wrote(tmp_path):
    result = run(tmp_path / "m", "--preset", "micro", "--layers", 3, "--no-mtp")
    assert result.exit_code == 0, result.output
    cfg = load(tmp_path / "m").cfg
    assert (cfg.n_layers, cfg.n_dense_layers, cfg.mtp_depth) == (3, 1, 0)
    size = sum(path.stat().st_size for path in (tmp_path / "m").iterdir())
    assert f"{size:,} bytes" in result.stdout
    text = CliRunner().invoke(
        cli.app,
        ["stream", str(tmp_path / "m"), "--prompt", "a", "--state", str(tmp_path / "state")],
    )
    assert text.exit_code == 0, text.output
    assert len(text.stdout) > 10


def test_fewer_layers_than_dense_ones(tmp_path):
    assert run(tmp_path / "m", "--preset", "nano", "--layers", 1).exit_code == 0
    cfg = load(tmp_path / "m").cfg
    assert (cfg.n_layers, cfg.n_dense_layers, cfg.mtp_depth) == (1, 1, 1)


def test_a_vocabulary_too_small_for_bytes_has_no_tokenizer(tmp_path):
    make_checkpoint(tmp_path / "m", preset("toy"))
    assert not (tmp_path / "m/tokenizer.json").exists()
    assert load(tmp_path / "m").cfg.vocab_size == 32


# refusals


def fails(result, says: str) -> None:
    assert result.exit_code == 2, result.output
    assert says in result.stderr
    assert result.stderr.splitlines()[-1].startswith("minids: ")


def test_what_exists_is_not_overwritten(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes").write_text("mine")
    fails(run(tmp_path / "full", "--preset", "nano"), "exists: choose a new folder")
    (tmp_path / "file").write_text("mine")
    fails(run(tmp_path / "file", "--preset", "nano"), "exists: choose a new folder")
    assert (tmp_path / "full/notes").read_text() == (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "says"),
    [(("--preset", "v9"), "unknown preset 'v9'"),
     (("--preset", "nano", "--fill", "full"), "fill must be one of random, sparse, got 'full'"),
     (("--preset", "nano", "--max-shard-bytes", 0), "max_shard_bytes must be at least 1, got 0"),
     (("--preset", "nano", "--scale-fmt", "e8"), "scale_fmt must be one of")],
)  # fmt: skip
def test_bad_options(tmp_path, options, says):
    fails(run(tmp_path / "m", *options), says)
    assert not list(tmp_path.iterdir())


def test_a_disk_without_the_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    with pytest.raises(OSError, match=r"1,000,000\.0 GB are needed, .* GB are free"):
        check_room(tmp_path / "a/b", 10**15)
    usage = shutil.disk_usage(tmp_path)._replace(free=99)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    fails(run(tmp_path / "m", "--preset", "nano"), "GB are needed")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_on_the_way_leaves_nothing(tmp_path, monkeypatch):
    real, calls = synthetic._write_shard, []

    def full(*given):
        calls.append(given)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        real(*given)

    monkeypatch.setattr(synthetic, "_write_shard", full)
    fails(run(tmp_path / "m", "--preset", "nano", "--max-shard-bytes", 100_000), "No space left")
    assert len(calls) == 3
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_leaves_nothing(tmp_path, monkeypatch, number):
    real, calls = synthetic._write_shard, []

    def interrupted(*given):
        calls.append(given)
        if len(calls) == 3:
            signal.raise_signal(number)
        real(*given)

    monkeypatch.setattr(synthetic, "_write_shard", interrupted)
    result = run(tmp_path / "m", "--preset", "nano", "--max-shard-bytes", 100_000)
    assert result.exit_code == 128 + number
    assert "nothing is left" in result.stderr
    assert not list(tmp_path.iterdir())


def test_what_a_kill_left_is_cleared_by_the_next_run(tmp_path):
    left = tmp_path / ".m.new"
    left.mkdir()
    (left / "model-00001-of-00009.safetensors").write_bytes(os.urandom(100))
    assert run(tmp_path / "m", "--preset", "nano").exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
