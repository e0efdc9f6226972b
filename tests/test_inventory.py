"""minids/files/inventory.py: what is in the files, what is missing, without reading a value."""

import json
import math
import re
import struct
from collections import Counter
from pathlib import Path

import pytest
import torch
from folders import INDEX, edit_json, edit_shard, make, retype, shards, tensors
from typer.testing import CliRunner

from minids import cli, load, preset, save
from minids.cli.report import contents
from minids.files.hf import to_hf
from minids.files.inventory import read_headers, take_inventory
from minids.files.shards import CODES, FP8, tensor_names

NORM = "model.norm.weight"
UP = "model.layers.1.mlp.experts.0.up_proj.weight"
ELSE = "model-00001-of-00001.safetensors"
TOY = make().cfg


@pytest.fixture
def folder(tmp_path) -> Path:
    save(make(), tmp_path / "model", "fp8", max_shard_bytes=1500)
    return tmp_path / "model"


@pytest.mark.parametrize("stored", ["fp8", "bf16", "fp32"])
def test_a_whole_folder(tmp_path, stored):
    """Counted again from the tensors themselves."""
    save(make(), tmp_path / "m", stored, max_shard_bytes=3000)
    held = take_inventory(tmp_path / "m", TOY)
    assert held.complete
    assert held.layout == stored
    want: dict[str, Counter] = {}
    for tensor in tensors(tmp_path / "m").values():
        size = Counter(tensors=1, elements=tensor.numel(), bytes=tensor.nbytes)
        want.setdefault(CODES[tensor.dtype], Counter()).update(size)
    assert held.dtypes == want
    assert held.expected == sum(size["tensors"] for size in want.values())
    assert held.files == len(shards(tmp_path / "m")) > 1
    assert held.file_bytes == sum(path.stat().st_size for path in shards(tmp_path / "m"))


def test_headers_by_hand(tmp_path):
    """Eight bytes of length, JSON, then the values: `b` ends behind the file."""
    about = {
        "a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
        "b": {"dtype": "F32", "shape": [], "data_offsets": [12, 16]},
    }
    text = json.dumps(about | {"__metadata__": {"format": "pt"}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    assert read_headers(path) == (
        {"a": ("BF16", (2, 3), 12, path.name), "b": ("F32", (), 4, path.name)},
        "",
    )
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(15))
    found, problem = read_headers(path)
    size = 8 + len(text) + 15
    assert found == {"a": ("BF16", (2, 3), 12, path.name)}
    assert problem == f"has {size} bytes, {size + 1} are the whole file: fetch it again"


def test_a_folder_with_only_its_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_hf(TOY)))
    assert take_inventory(tmp_path, TOY) is None


# spoilt folders: what is told, and that `load` refuses each of them


def half_downloaded(folder: Path) -> None:
    """The index came first, and half of the files."""
    for path in shards(folder)[::2]:
        path.unlink()


def cut(size: int):
    def spoil(folder: Path) -> None:
        path = shards(folder)[1]
        path.write_bytes(path.read_bytes()[:size])

    return spoil


def write(content: bytes):
    return lambda folder: shards(folder)[1].write_bytes(content)


def index(**changes: str):
    def spoil(folder: Path) -> None:
        places = json.loads((folder / INDEX).read_text())["weight_map"]
        edit_json(folder / INDEX, weight_map=places | changes)

    return spoil


def twice(folder: Path) -> None:
    one = edit_shard(folder, lambda t: None, NORM)
    other = next(path for path in shards(folder) if path != one)
    held = tensors(folder)[NORM]
    edit_shard(folder, lambda t: t.update({NORM: held}), first_of(other))


def unlisted(folder: Path) -> None:
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    del places[NORM]
    edit_json(folder / INDEX, weight_map=places)


def in_bf16(folder: Path) -> None:
    """BF16 weights with the config.json of FP8 ones."""
    config = (folder / "config.json").read_text()
    save(make(), folder, "bf16")
    (folder / "config.json").write_text(config)


def first_of(path: Path) -> str:
    return next(iter(read_headers(path)[0]))


SPOILT = {
    "half of the files": (half_downloaded, "missing_files", "model-00001-of-"),
    "half, tensors": (half_downloaded, "missing", "model.embed_tokens.weight"),
    "cut off": (cut(-10), "damaged_files", "-00002-.* are the whole file: fetch it again"),
    "cut off, tensors": (cut(-10), "missing", r"model\."),
    "cut in the header": (cut(20), "damaged_files", "-00002-.* ends inside its header,.*: 20 b"),
    "four bytes": (cut(4), "damaged_files", "-00002-.* ends inside its header"),
    "empty": (cut(0), "damaged_files", "-00002-.* ends inside its header"),
    "text": (write(b"hello world, " * 9), "damaged_files", "is no safetensors file: 117 bytes"),
    "a pointer": (
        write(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "damaged_files",
        "is a pointer of git-lfs: git lfs pull fetches the file",
    ),
    "no JSON": (write(struct.pack("<Q", 9) + b"{" * 9), "damaged_files", "header cannot be read"),
    "deep JSON": (
        write(struct.pack("<Q", 10**5) + b"[" * 10**5),
        "damaged_files",
        "header cannot be read",
    ),
    "JSON of another kind": (
        write(struct.pack("<Q", 9) + b'{"a":"b"}'),
        "damaged_files",
        "header cannot be read",
    ),
    "too long": (
        lambda f: shards(f)[1].write_bytes(shards(f)[1].read_bytes() + b"more"),
        "damaged_files",
        "fetch it again",
    ),
    "no index": (lambda f: (f / INDEX).unlink(), "missing_files", f"^{INDEX}$"),
    "no scale": (
        lambda f: edit_shard(f, lambda t: t.pop(f"{UP}_scale_inv"), UP, index=True),
        "missing",
        f"^{UP}_scale_inv$",
    ),
    "another tensor": (
        lambda f: edit_shard(f, lambda t: t.update(x=torch.ones(1)), index=True),
        "unexpected",
        "^x$",
    ),
    "in BF16": (
        retype(UP, torch.bfloat16),
        "wrong",
        rf"^{UP} must be \('F8_E4M3', \[8, 8\]\), is \('BF16', \[8, 8\]\) in model-",
    ),
    "shape": (
        lambda f: edit_shard(f, lambda t: t.update({NORM: torch.ones(9).bfloat16()})),
        "wrong",
        rf"^{NORM} must be \('BF16', \[8\]\), is \('BF16', \[9\]\) in model-",
    ),
    "elsewhere": (index(**{NORM: ELSE}), "missing_files", f"^{ELSE}$"),
    "elsewhere, the tensor": (
        index(**{NORM: ELSE}),
        "wrong",
        f"^{NORM} is in model-.*, {INDEX} says {ELSE}$",
    ),
    "in two files": (twice, "wrong", f"^{NORM} is in model-.*(says|and in) model-"),
    "not in the index": (unlisted, "wrong", f"^{NORM} is in model-.*, {INDEX} says nothing$"),
    "nowhere": (lambda f: index(x=shards(f)[0].name)(f), "missing", "^x$"),
    "not quantised": (
        lambda f: edit_json(f / "config.json", quantization_config=None),
        "unexpected",
        "_scale_inv$",
    ),
    "quantised by name": (in_bf16, "wrong", r"^\S+ must be \('F8_E4M3', .*, is \('BF16'"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT)
def test_what_is_wrong_is_told(folder, case):
    spoil, where, says = SPOILT[case]
    spoil(folder)
    held = take_inventory(folder, TOY)
    assert not held.complete
    told = getattr(held, where)
    lines = [f"{k} {v}" for k, v in told.items()] if isinstance(told, dict) else told
    assert any(re.search(says, line) for line in lines), lines
    with pytest.raises((ValueError, FileNotFoundError)):
        load(folder)


def test_files_that_lead_out_are_refused(folder):
    index(**{NORM: "../x.safetensors"})(folder)
    with pytest.raises(ValueError, match="points outside the folder"):
        take_inventory(folder, TOY)


# what the command prints


def count(*arguments: str | Path):
    result = CliRunner().invoke(cli.app, ["count", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_whole_folder_is_printed(folder):
    text = count(folder)
    n, size = len(tensor_names(TOY, FP8)), sum(t.nbytes for t in tensors(folder).values())
    assert f"{n} tensors, {size:,} bytes" in text.split("really in the files")[1]
    assert text.endswith(f"complete: all tensors, the {n} that config.json describes in fp8\n")


def test_half_a_folder_is_printed_and_is_no_error(folder):
    whole, n_files = len(tensors(folder)), len(shards(folder))
    half_downloaded(folder)
    here, n_left = len(tensors(folder)), len(shards(folder))
    text = count(folder)
    assert (
        f"incomplete: {whole - here} tensors missing of the {whole} that" in text.splitlines()[-1]
    )
    missing = next(line for line in text.splitlines() if "missing tensors" in line)
    assert missing.split()[2] == str(whole - here)
    assert missing.endswith(", ...")
    assert "model.embed_tokens.weight, " in missing
    assert re.search(rf"missing files +{n_files - n_left}  model-00001-of-", text)
    assert re.search(rf"files, with headers +{n_left}  ", text)


def test_json_has_every_name(folder):
    whole = tensor_names(TOY, FP8)
    half_downloaded(folder)
    found = json.loads(count(folder, "--json"))["found"]
    assert found["complete"] is False
    assert set(found["missing"]) == whole.keys() - tensors(folder).keys()
    assert found["dtypes"] == take_inventory(folder, TOY).dtypes


def test_a_folder_that_only_lacks_its_index(folder):
    (folder / INDEX).unlink()
    assert count(folder).endswith("not as it must be: load refuses this folder\n")


def test_weights_without_a_config(folder):
    (folder / "config.json").unlink()
    result = CliRunner().invoke(cli.app, ["count", str(folder)])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"minids: {folder}/config.json: no such file, ")


def test_names_without_files_are_counted_as_before(folder):
    for path in [*shards(folder), folder / INDEX]:
        path.unlink()
    for name in (folder, folder / "config.json", "nano"):
        assert "really" not in count(name)
        assert "found" not in json.loads(count(name, "--json"))


@pytest.mark.slow
def test_the_release_is_counted_from_its_headers(tmp_path):
    """Headers of all 163 files of V3, the values a hole: the metadata of the release, exactly."""
    cfg, names = preset("v3"), tensor_names(preset("v3"), FP8)
    per_file = math.ceil(len(names) / 163)
    rest, places = list(names.items()), {}
    for number in range(1, 164):
        part, rest = rest[:per_file], rest[per_file:]
        path = tmp_path / f"model-{number:05}-of-000163.safetensors"
        places |= dict.fromkeys((name for name, _ in part), path.name)
        write_hollow(path, part)
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (tmp_path / "config.json").write_text(json.dumps(to_hf(cfg)))
    held = take_inventory(tmp_path, cfg)
    assert held.complete
    assert held.files == 163
    assert {dtype: size["elements"] for dtype, size in held.dtypes.items()} == {
        "F8_E4M3": 680_571_043_840, "BF16": 3_918_786_560, "F32": 41_555_600,
    }  # fmt: skip
    assert sum(size["tensors"] for size in held.dtypes.values()) == 91_991
    assert sum(size["bytes"] for size in held.dtypes.values()) == 688_574_839_360
    assert contents(held).endswith(
        "complete: all tensors, the 91,991 that config.json describes in fp8"
    )


def write_hollow(path: Path, part: list[tuple[str, tuple[tuple[int, ...], torch.dtype]]]) -> None:
    """Write a header, and leave the values out: a hole takes no room on the disk."""
    header, end = {}, 0
    for name, (shape, dtype) in part:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
