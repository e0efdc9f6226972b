"""minids/files/scaled.py: FP8 folders as in the release, read bit for bit, bad ones refused."""

import json
import math
import struct
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from folders import (
    INDEX,
    assert_same,
    check_against_transformers,
    edit_json,
    edit_shard,
    make,
    retype,
    shards,
    tensors,
)

from minids import Transformer, checkpoint, load, preset, save
from minids.files import scaled
from minids.files.inventory import take_inventory
from minids.files.shards import FP8, slots, tensor_names

FORMATS = pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
# fmt: off
# latent and rotary key have V3's own widths, 512 + 64 = 576; 128 divides almost nothing here
RAGGED = dict(dim=200, inter_dim=300, moe_inter_dim=144, n_heads=3, q_lora_rank=72,
              kv_lora_rank=512, qk_nope_head_dim=24, qk_rope_head_dim=64, v_head_dim=40)
WHOLE = dict(dim=128, inter_dim=256, moe_inter_dim=128, n_heads=2, q_lora_rank=128, init_std=0.12,
             kv_lora_rank=128, qk_nope_head_dim=128, qk_rope_head_dim=128, v_head_dim=128)
# fmt: on


@pytest.fixture
def folder(tmp_path) -> Path:
    """A toy in FP8, in several shards."""
    save(make(), tmp_path / "model", "fp8", max_shard_bytes=1500)
    return tmp_path / "model"


# an independent reader: the bytes of the files, the definition of E4M3, loops over blocks


def raw(folder: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Return dtype and undecoded numbers of every tensor."""
    numbers = {"F8_E4M3": np.uint8, "BF16": np.uint16, "F32": np.float32}
    found = {}
    for path in shards(folder):
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        for name, about in header.items():
            if name != "__metadata__":
                start, end = about["data_offsets"]
                flat = np.frombuffer(content[8 + length :][start:end], numbers[about["dtype"]])
                found[name] = about["dtype"], flat.reshape(about["shape"])
    return found


def e4m3(code: int) -> float:
    """1 sign, 4 exponent, 3 mantissa bits; bias 7; the last code of either sign is NaN."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    if (exponent, mantissa) == (15, 7):
        return math.nan
    size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -size if sign else size


TABLE = np.array([e4m3(code) for code in range(256)], np.float32)


def decoded(found: dict[str, tuple[str, np.ndarray]], name: str) -> np.ndarray:
    """Return a tensor in FP32; an FP8 one block by block."""
    dtype, value = found[name]
    if dtype == "BF16":
        return (value.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F32":
        return value
    out, scale = TABLE[value], found[name + "_scale_inv"][1]
    assert scale.shape == tuple(-(-width // 128) for width in value.shape)
    for row in range(scale.shape[0]):
        for column in range(scale.shape[1]):
            at = slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128)
            out[at] *= scale[row, column]
    return out


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Round to the nearest number of 8 significant bits, a tie to the even one."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).view(np.float32)


def assert_read_exactly(folder: Path) -> None:
    found = raw(folder)
    wide, narrow = load(folder, dtype="fp32"), load(folder)
    assert narrow.embed.dtype == torch.bfloat16
    for in_fp32, in_bf16 in zip(slots(wide), slots(narrow), strict=True):
        want = decoded(found, in_fp32.name)
        assert np.array_equal(in_fp32.value.numpy(force=True), want), in_fp32.name
        if in_bf16.value.dtype == torch.bfloat16:
            want = to_bf16(want)
        assert np.array_equal(in_bf16.value.float().numpy(force=True), want), in_fp32.name


@FORMATS
@pytest.mark.parametrize(
    "changes",
    [{}, dict(mtp_depth=2), RAGGED, dict(WHOLE, q_lora_rank=0), dict(score_func="softmax",
     group_score="max", norm_topk=False, mtp_depth=0)],
    ids=["toy", "mtp 2", "ragged", "whole blocks", "v2"],
)  # fmt: skip
def test_read_exactly(tmp_path, changes, scale_fmt):
    save(make(scale_fmt=scale_fmt, **changes), tmp_path / "m", "fp8")
    assert_read_exactly(tmp_path / "m")


@FORMATS
@pytest.mark.parametrize("name", ["nano", "micro"])
def test_presets_are_read_exactly(tmp_path, name, scale_fmt):
    save(Transformer(preset(name, scale_fmt=scale_fmt), seed=0), tmp_path / "m", "fp8")
    assert_read_exactly(tmp_path / "m")


def test_every_code_with_an_uneven_scale(folder):
    """All 254 finite codes, times a scale that no power of two divides: one rounding, in FP32."""
    name = "model.embed_tokens.weight"  # in BF16: not concerned
    weight = "model.layers.0.mlp.gate_proj.weight"  # [16, 8]
    codes = torch.arange(256, dtype=torch.uint8).view(2, 16, 8)
    for half in codes:
        half = half.where(half & 0x7F != 0x7F, torch.tensor(0, dtype=torch.uint8))
        edit_shard(
            folder,
            lambda t, half=half: t.update({weight: half.view(FP8), scale_of(weight): SCALES}),
            weight,
        )
        assert_read_exactly(folder)
    assert raw(folder)[name][0] == "BF16"


SCALES = torch.tensor([[0.1234567]])


def scale_of(name: str) -> str:
    return f"{name}_scale_inv"


# what is written


@FORMATS
def test_weight_and_scale_by_hand(tmp_path, scale_fmt):
    """The largest weight lands on 448; a power of two is the next one above."""
    model = make(scale_fmt=scale_fmt)
    save(model, tmp_path / "m", "fp8")
    found = raw(tmp_path / "m")
    weight = model.layers[0].attn.w_o.weight.numpy(force=True)  # [8, 8], one block
    (dtype, codes), (scale_dtype, scale) = (
        found[f"model.layers.0.self_attn.o_proj.weight{end}"] for end in ("", "_scale_inv")
    )
    assert (dtype, codes.shape, scale_dtype, scale.shape) == ("F8_E4M3", (8, 8), "F32", (1, 1))
    largest = np.abs(weight).max()
    want = largest / np.float32(448)
    if scale_fmt:
        want = 2.0 ** math.ceil(math.log2(want))
    else:
        assert np.abs(TABLE[codes]).max() == 448
    assert scale[0, 0] == want
    assert np.abs(TABLE[codes] * want - weight).max() <= largest / 28  # half a step of 2^-3
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert config["quantization_config"] == {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
        "weight_block_size": [128, 128],
    } | ({"scale_fmt": "ue8m0"} if scale_fmt else {})  # fmt: skip


@pytest.mark.parametrize("max_shard_bytes", [1, 40_000, 10**9])
def test_files_hold_what_the_release_would(tmp_path, max_shard_bytes):
    """Names, shapes and dtypes of a V3 in small; every scale lies in the file of its weight."""
    cfg = preset("toy", **RAGGED | dict(n_layers=3))
    save(Transformer(cfg), tmp_path / "m", "fp8", max_shard_bytes=max_shard_bytes)
    found = tensors(tmp_path / "m")
    names = tensor_names(cfg, FP8)
    assert {name: (tuple(t.shape), t.dtype) for name, t in found.items()} == names
    assert Counter(dtype for _, dtype in names.values()).keys() == {
        FP8,
        torch.bfloat16,
        torch.float32,
    }
    index = json.loads((tmp_path / "m" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    places = index["weight_map"]
    assert all(places[scale_of(n)] == places[n] for n, t in found.items() if t.dtype == FP8)
    for path in shards(tmp_path / "m"):
        held = {name for name, place in places.items() if place == path.name}
        weights = {name for name in held if not name.endswith("_scale_inv")}
        assert len(weights) == 1 or sum(found[n].nbytes for n in held) <= max_shard_bytes


def test_saving_and_loading_hold_one_tensor(folder, tmp_path, monkeypatch):
    """Of values made for the file at most a shard lives, of values read from it at most one."""
    alive: dict[int, weakref.ref] = {}

    def watch(module, name, limit):
        real = getattr(module, name)

        def call(*args, **options):
            living = [t for t in (ref() for ref in alive.values()) if t is not None]
            assert sum(t.nbytes for t in living) <= limit, [t.shape for t in living]
            result = real(*args, **options)
            made = result if isinstance(result, torch.Tensor) else result.values
            alive[id(made)] = weakref.ref(made)
            return result

        monkeypatch.setattr(module, name, call)

    model = make()
    watch(scaled, "quantise", limit=1500)
    save(model, tmp_path / "m", "fp8", max_shard_bytes=1500)
    assert len(alive) > 10
    alive.clear()
    monkeypatch.undo()
    watch(scaled, "dequantise", limit=0)
    load(folder)
    assert len(alive) > 10


# saved again


def blobs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def saved_again(folder: Path, dtype: str, times: int) -> list[Path]:
    """Read as `dtype` and write in FP8, so often; return the new folders."""
    made = []
    for k in range(times):
        target = folder.with_name(f"{folder.name} {dtype} {k}")
        save(load(made[-1] if made else folder, dtype=dtype), target, "fp8")
        made.append(target)
    return made


def parts(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return codes and scales by the weight's name."""
    held = tensors(folder)
    codes = {name: value.view(torch.uint8) for name, value in held.items() if value.dtype == FP8}
    return codes, {name: held[scale_of(name)] for name in codes}


@pytest.fixture
def first(tmp_path, request) -> Path:
    """A toy, its scales in the format that the test asks for."""
    cfg = preset("toy", scale_fmt=request.param)
    save(Transformer(cfg, seed=1), tmp_path / "m", "fp8")
    return tmp_path / "m"


@pytest.mark.parametrize("first", [None], indirect=True)
def test_fp32_scales_saved_again_from_fp32_are_the_same_files(first):
    """s = a/448 rounded, 448 s rounded is a again: the same quotient, so the same codes."""
    assert blobs(saved_again(first, "fp32", 1)[0]) == blobs(first)


@pytest.mark.parametrize("first", [None], indirect=True)
def test_fp32_scales_saved_again_from_bf16_keep_their_codes(first):
    """BF16 moves the largest weight by 2^-9 at most, and so the scale; then no more."""
    one, two = saved_again(first, "bf16", 2)
    (codes, scales), (new_codes, new_scales) = parts(first), parts(one)
    assert all(torch.equal(value, new_codes[name]) for name, value in codes.items())
    moved = [(new_scales[name] / scale - 1).abs().max() for name, scale in scales.items()]
    assert 2**-12 < max(moved) <= 2**-8
    assert blobs(two) == blobs(one)


@pytest.mark.parametrize("first", ["ue8m0"], indirect=True)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_powers_of_two_saved_again_keep_their_values(first, dtype):
    """Where a block's largest weight was rounded down to 224, half the scale is enough now."""
    one, two = saved_again(first, dtype, 2)
    assert_same(load(one, dtype="fp32"), load(first, dtype="fp32"))
    (codes, scales), (new_codes, new_scales) = parts(first), parts(one)
    halved = [name for name, scale in scales.items() if torch.equal(new_scales[name], scale / 2)]
    assert 0 < len(halved) < len(codes)
    for name, value in codes.items():
        if name in halved:
            assert TABLE[value & 0x7F].max() == 224
            assert TABLE[new_codes[name] & 0x7F].max() == 448
        else:
            assert torch.equal(value, new_codes[name])
    assert blobs(two) == blobs(one)


# what transformers reads


@FORMATS
@pytest.mark.parametrize("depth", [0, 1])
def test_transformers_reads_the_folder(tmp_path, scale_fmt, depth):
    """128 divides every width: transformers takes rows // scale rows for the size of a block."""
    model = make(seed=2, scale_fmt=scale_fmt, mtp_depth=depth, **WHOLE)
    save(model, tmp_path / "m", "fp8", max_shard_bytes=200_000)
    found = load(tmp_path / "m", dtype="fp32")
    assert not torch.equal(found.layers[0].attn.w_o.weight, model.layers[0].attn.w_o.weight)
    check_against_transformers(found, tmp_path / "m", torch.float32)


@FORMATS
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_transformers_reads_the_same_bits(tmp_path, scale_fmt, dtype):
    """Asked for no dtype both take BF16. MTP then is another matter: see tests/oracle.py."""
    model = make(seed=2, scale_fmt=scale_fmt, **WHOLE)
    save(model, tmp_path / "m", "fp8")
    ours = load(tmp_path / "m", dtype=dtype).state_dict()
    with oracle.mtp_layers_known(model.cfg):
        theirs = oracle.from_folder(tmp_path / "m", model.cfg, dtype).tensors
    for mine, its in oracle.weight_names(model.cfg).items():
        if dtype is None and mine.startswith("mtp."):
            continue
        value = theirs[its].reshape(ours[mine].shape)
        assert ours[mine].dtype == value.dtype, mine
        assert torch.equal(ours[mine], value), mine


# other folders that are right


def test_the_hubs_cache_is_read(folder):
    """There a snapshot is a folder of links into `blobs`, outside itself."""
    want = load(folder)
    hub = folder.parent / "models--x"
    (hub / "blobs").mkdir(parents=True)
    (hub / "snapshots" / "abc").mkdir(parents=True)
    for number, path in enumerate(folder.iterdir()):
        path.rename(hub / "blobs" / str(number))
        (hub / "snapshots" / "abc" / path.name).symlink_to(f"../../blobs/{number}")
    assert_same(load(hub / "snapshots" / "abc"), want)
    assert take_inventory(hub / "snapshots" / "abc", want.cfg).complete


def test_a_scale_may_lie_in_another_file(folder):
    want, taken = load(folder), {}
    edit_shard(folder, lambda t: taken.update({SCALE: t.pop(SCALE)}), UP, index=True)
    edit_shard(folder, lambda t: t.update(taken), index=True)
    assert_same(load(folder), want)


def test_scales_that_are_no_powers_of_two_are_read_whatever_the_config_says(folder):
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_json(folder / "config.json", quantization_config=config | {"scale_fmt": "ue8m0"})
    assert_read_exactly(folder)


def test_a_bf16_folder_of_a_config_that_trains_in_fp8(tmp_path):
    """The precision of training says nothing about the files: quantization_config does."""
    model = make(precision="fp8", scale_fmt="ue8m0").bfloat16()
    save(model, tmp_path / "m")
    assert "quantization_config" not in json.loads((tmp_path / "m" / "config.json").read_text())
    found = load(tmp_path / "m")
    assert found.cfg == model.cfg
    assert torch.equal(found.layers[0].attn.w_o.weight, model.layers[0].attn.w_o.weight)


# what is refused: each case spoils a folder and says what the message must name


UP = "model.layers.1.mlp.experts.0.up_proj.weight"
SCALE = scale_of(UP)
EMBED = "model.embed_tokens.weight"
QUANTISED = {"fmt": "e4m3", "quant_method": "fp8", "activation_scheme": "dynamic",
             "weight_block_size": [128, 128]}  # fmt: skip


def change(name: str, value, near: str = UP):
    """Put another tensor in the place of one (None: nothing)."""

    def edit(held: dict[str, torch.Tensor]) -> None:
        held.pop(name, None)
        held.update({} if value is None else {name: value})

    return lambda folder: edit_shard(folder, edit, near, index=True)


def scaled_by(number: float):
    return change(SCALE, torch.tensor([[number]]))


def with_code(code: int):
    def edit(held: dict[str, torch.Tensor]) -> None:
        held[UP].view(torch.uint8)[5, 3] = code

    return lambda folder: edit_shard(folder, edit, UP)


def configured(value):
    return lambda folder: edit_json(folder / "config.json", quantization_config=value)


def stored_as(dtype: str):
    def spoil(folder: Path) -> None:
        config = (folder / "config.json").read_text()
        save(make(), folder, dtype)
        (folder / "config.json").write_text(config)

    return spoil


IN_FILE = r"model-000\d\d-of-000\d\d.safetensors: "
NOT_ABOVE_0 = f"{IN_FILE}{SCALE} must be finite and above 0, got "
AT = r" at \[5, 3\] is NaN: fetch this file again"
AGAIN = r" for block \[0, 0\]: fetch this file again"
MUST_HOLD = "config.json: quantization_config must hold {'activation_scheme': 'dynamic', .*, got "
REFUSED = {
    "no scale": (change(SCALE, None), f"tensor {SCALE} is missing"),
    "no scale, but in the index": (
        lambda f: edit_shard(f, lambda t: t.pop(SCALE), UP),
        rf"{IN_FILE}tensor {SCALE} is missing",
    ),
    "a row of scales": (
        change(SCALE, torch.ones(2, 1)),
        rf"{IN_FILE}{SCALE} must be \('F32', \[1, 1\]\), got \('F32', \[2, 1\]\): a FP32 scale",
    ),
    "a scale without axes": (change(SCALE, torch.tensor(1.0)), r"got \('F32', \[\]\): a FP32"),
    "scales of each weight": (change(SCALE, torch.ones(8, 8)), r"got \('F32', \[8, 8\]\): a FP32"),
    "BF16 scale": (change(SCALE, torch.ones(1, 1).bfloat16()), f"{SCALE} must be .*got .*'BF16'"),
    "FP64 scale": (change(SCALE, torch.ones(1, 1).double()), f"{SCALE} must be .*got .*'F64'"),
    "E8M0 scale": (
        change(SCALE, torch.ones(1, 1).to(torch.float8_e8m0fnu)),
        f"{SCALE} must be .*got .*'F8_E8M0'.*: a FP32 scale",
    ),
    "zero": (scaled_by(0.0), f"{NOT_ABOVE_0}0.0{AGAIN}"),
    "negative": (scaled_by(-0.5), f"{NOT_ABOVE_0}-0.5{AGAIN}"),
    "NaN": (scaled_by(math.nan), f"{NOT_ABOVE_0}nan{AGAIN}"),
    "infinity": (scaled_by(math.inf), f"{NOT_ABOVE_0}inf{AGAIN}"),
    "minus infinity": (scaled_by(-math.inf), f"{NOT_ABOVE_0}-inf{AGAIN}"),
    "overflow": (scaled_by(1e38), f"{IN_FILE}{UP} is not finite"),
    "code 7F": (with_code(0x7F), f"{IN_FILE}{UP} is not finite, code 0x7F{AT}"),
    "code FF": (with_code(0xFF), f"{IN_FILE}{UP} is not finite, code 0xFF{AT}"),
    "a scale too many": (
        change(scale_of(EMBED), torch.ones(1, 1), EMBED),
        f"{IN_FILE}unexpected tensor {EMBED}_scale_inv, {EMBED} is not in FP8 and has no scales",
    ),
    "a scale of nothing": (
        change("x_scale_inv", torch.ones(1, 1)),
        f"{IN_FILE}unexpected tensor x_scale_inv$",
    ),
    "blocks of 64": (
        configured(QUANTISED | {"weight_block_size": [64, 64]}),
        rf"{MUST_HOLD}.*\[64, 64\]",
    ),
    "blocks of one axis": (configured(QUANTISED | {"weight_block_size": [128]}), MUST_HOLD),
    "E5M2 by name": (configured(QUANTISED | {"fmt": "e5m2"}), f"{MUST_HOLD}.*e5m2"),
    "another scale format": (
        configured(QUANTISED | {"scale_fmt": "e4m3"}),
        "config.json: scale_fmt must be one of .*, got 'e4m3'",
    ),
    "another method": (configured({"quant_method": "gptq", "bits": 4}), f"{MUST_HOLD}.*gptq"),
    "a word": (configured("fp8"), f"{MUST_HOLD}'fp8'"),
    "a list": (configured([128, 128]), rf"{MUST_HOLD}\[128, 128\]"),
    "an empty object": (configured({}), f"{MUST_HOLD}{{}}"),
    "no quantization_config": (
        configured(None),
        f"{IN_FILE}{UP.replace('1.mlp.experts.0', '0.self_attn').replace('up', 'q_a')} must be "
        ".*'BF16'.*got .*'F8_E4M3'.*: FP8 needs its scales and the quantization_config of the",
    ),
    "weights in BF16": (
        stored_as("bf16"),
        "q_a_proj.weight must be .*'F8_E4M3'.*, got .*'BF16'.*: other weights than FP8 need a "
        "config.json without quantization_config",
    ),
    "weights in FP32": (stored_as("fp32"), f"{EMBED} must be .*'BF16'.*, got .*'F32'"),
    "one weight in BF16": (retype(UP, torch.bfloat16), f"{UP} must be .*'F8_E4M3'.*got .*'BF16'"),
    "one weight in E5M2": (retype(UP, torch.float8_e5m2), f"{UP} must be .*got .*'F8_E5M2'"),
    "router in FP8": (
        retype("model.layers.1.mlp.gate.weight", FP8),
        "mlp.gate.weight must be .*'BF16'.*got .*'F8_E4M3'",
    ),
    "cut off": (
        lambda f: shards(f)[1].write_bytes(shards(f)[1].read_bytes()[:-10]),
        "-00002-.*not a whole safetensors file",
    ),
    "gone": (lambda f: shards(f)[1].unlink(), "-00002-.*no such file"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(folder, case):
    spoil, message = REFUSED[case]
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


def test_refused_before_memory_is_taken(folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "_allocate", lambda *_: pytest.fail("took memory first"))
    REFUSED["a row of scales"][0](folder)
    with pytest.raises(ValueError, match=f"{SCALE} must be"):
        load(folder)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_nonfinite_scales_on_request(folder, number):
    scaled_by(number)(folder)
    read = load(folder, allow_nonfinite=True).layers[1].ffn.experts.w_gate_up[0, 1]
    assert not read.isfinite().any()


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nonfinite_codes_on_request(folder, code):
    with_code(code)(folder)
    read = load(folder, allow_nonfinite=True).layers[1].ffn.experts.w_gate_up[0, 1]
    assert read.isnan().nonzero().tolist() == [[5, 3]]


@pytest.mark.parametrize("number", [0.0, -0.5, -math.inf])
def test_no_request_makes_a_scale_of_these(folder, number):
    scaled_by(number)(folder)
    with pytest.raises(ValueError, match=f"{SCALE} must be finite and above 0, got {number}"):
        load(folder, allow_nonfinite=True)


def test_what_is_not_finite_is_saved_as_nan(tmp_path):
    """Its block of 128 x 128 is lost, as the format has no infinity; told when it is read."""
    model = make()
    with torch.no_grad():
        model.layers[1].ffn.experts.w_down[3, 0, 0] = math.inf
    save(model, tmp_path / "m", "fp8")
    with pytest.raises(ValueError, match=r"experts.3.down_proj.weight_scale_inv .* got inf"):
        load(tmp_path / "m")
    read = load(tmp_path / "m", allow_nonfinite=True).layers[1].ffn.experts.w_down
    assert read[3].isnan().all()
    assert read[:3].isfinite().all()
