"""minids/checkpoint.py: what is written, what others read of it, what is refused, what survives."""

import errno
import json
import math
import os
import resource
import signal
import struct
import subprocess
import sys
from pathlib import Path

import jaxtyping
import oracle
import pytest
import torch
from folders import (
    INDEX,
    assert_same,
    check_against_transformers,
    compare,
    edit_json,
    edit_shard,
    fill,
    make,
    retype,
    shards,
    tensors,
)
from safetensors.torch import load_file, save_file

from minids import Transformer, checkpoint, load, preset, save
from minids.tokenizer import load_tokenizer, train_tokenizer

V2 = dict(score_func="softmax", group_score="max", norm_topk=False, mtp_depth=0)
YARN = dict(rope_factor=4.0, original_seq_len=16, max_seq_len=64, mscale=0.7)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A saved toy in several shards; the third holds router biases of layer 1."""
    save(make(), tmp_path / "model", max_shard_bytes=4000)
    return tmp_path / "model"


@pytest.fixture
def as_in_use(monkeypatch):
    """Without the hook, which would refuse wrong types before our own messages."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


# what is written


def test_files_by_hand(folder):
    """A safetensors file: eight bytes of header length, the header in JSON, then the values."""
    model = make()
    names = [path.name for path in shards(folder)]
    count = len(names)
    assert count > 2
    assert names == [f"model-{k:05}-of-{count:05}.safetensors" for k in range(1, count + 1)]
    assert {path.name for path in folder.iterdir()} == {*names, "config.json", INDEX}
    index = json.loads((folder / INDEX).read_text())
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    content = (folder / index["weight_map"][name]).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert header["__metadata__"] == {"format": "pt"}
    assert (header[name]["dtype"], header[name]["shape"]) == ("F32", [8, 8])
    start, end = header[name]["data_offsets"]
    values = torch.frombuffer(bytearray(content[8 + length :][start:end]), dtype=torch.float32)
    assert torch.equal(values, model.layers[1].ffn.experts.w_gate_up[5, 1].flatten())
    stored = sum(value.numel() for value in model.state_dict().values()) + 2 * 32 * 8  # copies
    assert index["metadata"]["total_size"] == 4 * stored


def test_config_is_published(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "deepseek_v3"
    assert config["num_nextn_predict_layers"] == 1
    assert config["torch_dtype"] == "float32"
    save(make(q_lora_rank=0, mtp_depth=0), folder, dtype="bf16")
    config = json.loads((folder / "config.json").read_text())
    assert (config["q_lora_rank"], config["num_nextn_predict_layers"]) == (None, 0)
    assert config["torch_dtype"] == "bfloat16"


def test_mtp_layer_with_its_copies(folder):
    """The toy has layers 0 and 1, so the MTP module is layer 2."""
    held = tensors(folder)
    at = "model.layers.2."
    assert torch.equal(held[f"{at}embed_tokens.weight"], held["model.embed_tokens.weight"])
    assert torch.equal(held[f"{at}shared_head.head.weight"], held["lm_head.weight"])
    assert torch.equal(held[f"{at}eh_proj.weight"], make().mtp[0].w_merge.weight)


@pytest.mark.parametrize("max_shard_bytes", [1, 1000, 10**9])
def test_shards_are_no_larger_than_asked(tmp_path, max_shard_bytes):
    save(make(), tmp_path / "m", max_shard_bytes=max_shard_bytes)
    for path in shards(tmp_path / "m"):
        tensors = load_file(path)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= max_shard_bytes
    assert_same(load(tmp_path / "m"), make())


def test_saving_holds_no_second_copy(tmp_path, monkeypatch):
    """What goes to the file is the model's own memory, but for the copies in MTP's layer."""
    model, second = make(), []
    own = {value.untyped_storage().data_ptr() for value in model.state_dict().values()}

    def watch(tensors, *args, **options):
        second.extend(n for n, t in tensors.items() if t.untyped_storage().data_ptr() not in own)
        return save_file(tensors, *args, **options)

    monkeypatch.setattr(checkpoint, "save_file", watch)
    save(model, tmp_path / "m")
    assert second == [
        "model.layers.2.embed_tokens.weight",
        "model.layers.2.shared_head.head.weight",
    ]


# what is read


@pytest.mark.parametrize(
    "changes",
    [{}, dict(mtp_depth=2), dict(mtp_depth=0, q_lora_rank=0, n_shared_experts=0), YARN, V2,
     dict(bias_speed=0.5, mtp_weight=0.7, precision="bf16", aux_loss_alpha=0.1)],
    ids=["toy", "mtp 2", "v2_lite parts", "yarn", "softmax", "training fields"],
)  # fmt: skip
def test_round_trip(tmp_path, changes):
    model = make(**changes)
    save(model, tmp_path / "m", max_shard_bytes=3000)
    assert_same(load(tmp_path / "m"), model)


@pytest.mark.parametrize("dtype", ["bf16", torch.bfloat16])
def test_bf16_but_for_the_router_bias(tmp_path, dtype):
    model = make()
    save(model, tmp_path / "m", dtype=dtype)
    found = load(tmp_path / "m")
    for name, value in model.state_dict().items():
        kept = torch.float32 if name.endswith("router.bias") else torch.bfloat16
        assert found.state_dict()[name].dtype == kept
        assert torch.equal(found.state_dict()[name], value.to(kept))
    assert found.freq.dtype == torch.float32
    wide = load(tmp_path / "m", dtype="fp32")
    assert wide.embed.dtype == torch.float32
    assert torch.equal(wide.embed, model.embed.bfloat16().float())
    save(found, tmp_path / "again")
    assert_same(load(tmp_path / "again"), found)


def test_a_loaded_model_is_in_eval_mode(folder):
    """In training mode a model whose precision is FP8 rounds; what is read is used as it is."""
    assert not any(module.training for module in load(folder).modules())


def test_one_file_without_an_index(folder):
    held = tensors(folder)
    for path in [*shards(folder), folder / INDEX]:
        path.unlink()
    save_file(held, folder / "model.safetensors")
    assert_same(load(folder), make())


def test_the_hubs_cache_is_read(folder):
    """There a snapshot is a folder of links into `blobs`, outside itself."""
    hub = folder.parent / "models--x"
    (hub / "blobs").mkdir(parents=True)
    (hub / "snapshots" / "abc").mkdir(parents=True)
    for number, path in enumerate(folder.iterdir()):
        path.rename(hub / "blobs" / str(number))
        (hub / "snapshots" / "abc" / path.name).symlink_to(f"../../blobs/{number}")
    assert_same(load(hub / "snapshots" / "abc"), make())


# what transformers reads


MODELS = {
    "toy": {},
    "mtp 2, yarn": dict(mtp_depth=2, **YARN),
    "no query latent, two shared": dict(q_lora_rank=0, n_shared_experts=2, mtp_depth=0),
    "v2": V2,
    "v2_lite": V2 | YARN | dict(q_lora_rank=0, n_expert_groups=1, n_limited_groups=1),
}


@pytest.mark.parametrize("case", MODELS)
def test_transformers_reads_the_folder(tmp_path, case):
    model = make(seed=2, **MODELS[case])  # of seed 1 the toy repeats one word
    save(model, tmp_path / "m", max_shard_bytes=4000)
    check_against_transformers(model, tmp_path / "m")


@pytest.mark.slow
def test_layer_61_as_transformers_knows_it(tmp_path):
    """Unpatched, transformers looks for MTP behind 61 layers: so here are 61 narrow ones."""
    model = make(
        n_layers=61, n_dense_layers=60, n_routed_experts=4, n_expert_groups=1, n_limited_groups=1,
        init_std=0.25,
    )  # fmt: skip
    with torch.no_grad():
        model.embed.mul_(10)  # so that words are still told apart behind 61 layers
    save(model, tmp_path / "m")
    compare(model, oracle.from_folder(tmp_path / "m", model.cfg), new_tokens=6)


def test_what_transformers_saves_is_read(tmp_path):
    model = make(mtp_depth=0)
    save(model, tmp_path / "m")
    oracle.from_folder(tmp_path / "m", model.cfg).main.save_pretrained(tmp_path / "theirs")
    assert_same(load(tmp_path / "theirs"), model)


def test_tokenizer_travels_along(tmp_path):
    texts = ["the cat sat on the mat", "def f(x): return x"]
    tokenizer = train_tokenizer(texts, 270)
    model = make(vocab_size=300)
    save(model, tmp_path / "m", tokenizer=tokenizer)
    ids = tokenizer.encode("the mat sat").ids
    for theirs in oracle.tokenizers(tmp_path / "m"):
        assert theirs("the mat sat")["input_ids"] == ids
    save(model, tmp_path / "m")  # without one the folder keeps it
    assert load_tokenizer(tmp_path / "m").encode("the mat sat").ids == ids
    other = train_tokenizer(["xyzzy xyzzy xyzzy"], 265)
    save(model, tmp_path / "m", tokenizer=other)  # the one that is given is not the one kept
    assert load_tokenizer(tmp_path / "m").encode("xyzzy").ids == other.encode("xyzzy").ids
    assert load_tokenizer(tmp_path / "m").get_vocab_size() == other.get_vocab_size()
    with pytest.raises(ValueError, match=r"tokenizer has .* tokens, vocab_size is 32"):
        save(make(), tmp_path / "n", tokenizer=tokenizer)


# what is refused: each case spoils a folder and says what the message must name


def point(folder: Path, target: str) -> None:
    """Let the index put one tensor into another file."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = target
    (folder / INDEX).write_text(json.dumps(index))


def truncate(size: int):
    def spoil(folder: Path) -> None:
        content = shards(folder)[1].read_bytes()
        shards(folder)[1].write_bytes(content[:size])

    return spoil


def link_out(folder: Path) -> None:
    outside = shards(folder)[0].rename(folder.parent / "outside.safetensors")
    (folder / f"model-00001-of-{len(shards(folder)) + 1:05}.safetensors").symlink_to(outside)


def duplicate(folder: Path) -> None:
    one, two = shards(folder)[:2]
    save_file(load_file(one) | load_file(two), two)


def bias_name(k: int) -> str:
    return f"model.layers.{k}.mlp.gate.e_score_correction_bias"


def shard(k: int):
    return lambda folder: shards(folder)[k]


NORM = "model.norm.weight"
UP = "model.layers.1.mlp.experts.0.up_proj.weight"
COPY = "model.layers.2.embed_tokens.weight"
BIAS = bias_name(1)
DEEP = "[" * 200_000
REFUSED = {
    "truncated values": (truncate(-10), "-00002-.*not a whole safetensors file"),
    "truncated header": (truncate(20), "-00002-.*not a whole safetensors file"),
    "four bytes": (truncate(4), "-00002-.*not a whole safetensors file"),
    "empty shard": (truncate(0), "-00002-.*not a whole safetensors file"),
    "text": (lambda f: shards(f)[0].write_text("hello" * 99), "-00001-.*not a whole safetensors"),
    "huge header": (
        lambda f: shards(f)[0].write_bytes(struct.pack("<Q", 2**62) + b"{}" * 99),
        "-00001-.*not a whole safetensors file",
    ),
    "trailing bytes": (
        lambda f: shards(f)[0].write_bytes(shards(f)[0].read_bytes() + b"more"),
        "-00001-.*not a whole safetensors file",
    ),
    "missing tensor": (lambda f: edit_shard(f, lambda t: t.pop(NORM)), f"{NORM} is missing"),
    "missing everywhere": (
        lambda f: edit_shard(f, lambda t: t.pop(NORM), index=True),
        f"{NORM} is missing",
    ),
    "unexpected in a shard": (
        lambda f: edit_shard(f, lambda t: t.update(x=torch.ones(1))),
        "safetensors: unexpected tensor x",
    ),
    "unexpected everywhere": (
        lambda f: edit_shard(f, lambda t: t.update(x=torch.ones(1)), index=True),
        "safetensors: unexpected tensor x$",
    ),
    "shape": (
        lambda f: edit_shard(f, lambda t: t.update({NORM: torch.ones(9)})),
        rf"{NORM} must be \('F32', \[8\]\), got \('F32', \[9\]\)",
    ),
    "half": (retype(NORM, torch.float16), r"must be \('F32', \[8\]\), got \('F16', \[8\]\)"),
    "double": (retype("model.embed_tokens.weight", torch.float64), "must be .*'F32'.*got .*'F64'"),
    "mixed": (retype(UP, torch.bfloat16), f"{UP} must be .*'F32'.*got .*'BF16'"),
    "bias in BF16": (retype(BIAS, torch.bfloat16), f"{BIAS} must be .*'F32'.*got .*'BF16'"),
    "FP8": (
        retype(UP, torch.float8_e4m3fn),
        f"{UP} must be .*'F32'.*got .*'F8_E4M3'.*: FP8 needs .* quantization_config",
    ),
    "up": (lambda f: point(f, "../model/x.safetensors"), "../model/x.safetensors: no such file"),
    "up and out": (lambda f: point(f, "../x.safetensors"), "'../x.safetensors' points outside"),
    "absolute": (lambda f: point(f, "/etc/passwd"), "'/etc/passwd' points outside the folder"),
    "link out": (link_out, "-00001-.* points outside the folder, to .*outside.safetensors"),
    "NUL": (lambda f: point(f, "a\0b"), "cannot hold a file"),
    "long": (lambda f: point(f, "a" * 5000), "cannot hold a file 'aaa"),
    "folder as shard": (lambda f: point(f, "."), "no such file"),
    "twice": (duplicate, "-00002-.* is in model-00001-of-"),
    "number as shard": (lambda f: point(f, 7), "weight_map must map tensors to files"),
    "no weight_map": (lambda f: (f / INDEX).write_text("{}"), f"{INDEX}: weight_map must map"),
    "index is a list": (lambda f: (f / INDEX).write_text("[]"), f"{INDEX}: must be a JSON object"),
    "index is no JSON": (lambda f: (f / INDEX).write_text("{"), f"{INDEX}: not JSON"),
    "missing shard": (lambda f: shards(f)[0].unlink(), "-00001-.*no such file"),
    "no weights": (lambda f: [p.unlink() for p in f.glob("model*")], "model.safetensors: no such"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("x"), "config.json: not JSON"),
    "config in Latin-1": (lambda f: (f / "config.json").write_bytes(b'"\xff"'), "config.json: not"),
    "config is deep": (lambda f: (f / "config.json").write_text(DEEP), "config.json: not JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "must be a JSON object"),
    "unknown key": (lambda f: edit_json(f / "config.json", x=1), "config.json: unknown key 'x'"),
    "impossible value": (
        lambda f: edit_json(f / "config.json", num_experts_per_tok=9),
        "config.json: num_experts_per_tok must be at most",
    ),
    "another model": (
        lambda f: edit_json(f / "config.json", model_type="llama"),
        "config.json: model_type must be",
    ),
    "a billion layers": (
        lambda f: edit_json(f / "config.json", num_hidden_layers=10**9),
        "config.json: describes more than",
    ),
    "a billion rotary channels": (
        lambda f: edit_json(f / "config.json", qk_rope_head_dim=2 * 10**9),
        "config.json: describes more than",
    ),
    "a billion experts": (
        lambda f: edit_json(f / "config.json", n_routed_experts=10**9),
        r"gate.weight must be \('F32', \[1000000000, 8\]\)",
    ),
    "too wide to count": (
        lambda f: edit_json(f / "config.json", hidden_size=10**18),
        "config.json: impossible sizes",
    ),
    "wider than 64 bits": (
        lambda f: edit_json(f / "config.json", hidden_size=10**30),
        "config.json: impossible sizes",
    ),
    "NaN": (fill(UP, math.nan), f"safetensors: {UP} is not finite"),
    "infinity": (fill(BIAS, -math.inf), f"safetensors: {BIAS} is not finite"),
    "copy that differs": (fill(COPY, 7.0), f"{COPY} is not the copy of model.embed_tokens.weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(folder, case):
    spoil, message = REFUSED[case]
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


def test_pickle_is_never_opened(folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "went off"), "w")

    torch.save({"x": Bomb()}, shards(folder)[0])
    with pytest.raises(ValueError, match=r"-00001-.*not a whole safetensors file"):
        load(folder)
    assert not (tmp_path / "went off").exists()


def test_headers_come_before_values_and_memory(folder, monkeypatch):
    """The last shard's wrong header stops loading before any memory is taken."""
    monkeypatch.setattr(checkpoint, "_allocate", lambda *_: pytest.fail("took memory first"))
    retype("model.layers.2.enorm.weight", torch.float16)(folder)
    with pytest.raises(ValueError, match=r"enorm.weight must be"):
        load(folder)


def test_nonfinite_on_request(folder):
    fill("model.embed_tokens.weight", math.nan)(folder)
    fill(COPY, math.nan)(folder)
    assert load(folder, allow_nonfinite=True).embed.isnan().sum() == 1


def test_what_overflows_in_bf16_is_not_finite(folder):
    fill(UP, 3.4e38)(folder)
    assert load(folder).layers[1].ffn.experts.w_gate_up.max() == torch.tensor(3.4e38)
    with pytest.raises(ValueError, match="is not finite"):
        load(folder, dtype="bf16")


def test_wrong_arguments(folder, tmp_path, as_in_use):
    with pytest.raises(FileNotFoundError, match="nothing: no such folder"):
        load(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"config.json is not a folder"):
        load(folder / "config.json")
    for dtype in ("fp16", torch.float16, 3):
        with pytest.raises(ValueError, match="must be 'fp32' or 'bf16', got"):
            load(folder, dtype=dtype)
    for dtype in ("fp8", torch.float8_e4m3fn):
        with pytest.raises(ValueError, match=r"got .*; FP8 weights are read as one of them"):
            load(folder, dtype=dtype)
    for dtype in ("fp16", torch.float8_e5m2):
        with pytest.raises(ValueError, match=r"must be 'fp32' or 'bf16' or 'fp8', got [^;]*$"):
            save(make(), folder, dtype=dtype)
    for device in ("gpu", "cuda:99", "meta"):
        with pytest.raises(ValueError, match=f"device '{device}' cannot be used"):
            load(folder, device=device)


def test_what_cannot_be_saved(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="attn must be 'mla' to be published, got 'mqa'"):
        save(make(attn="mqa", mtp_depth=0), tmp_path / "m")
    with torch.device("meta"):
        shapes = Transformer(preset("toy"))
    with pytest.raises(ValueError, match="no values to save"):
        save(shapes, tmp_path / "m")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file is a file"):
        save(make(), tmp_path / "file")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"thesis.txt is no part of a checkpoint"):
        save(make(), tmp_path / "notes")
    monkeypatch.chdir(tmp_path / "notes")
    for path in (".", "..", "/"):
        with pytest.raises(ValueError, match="is or holds the current folder"):
            save(make(), path)
    found = sorted(path.name for path in tmp_path.rglob("*"))
    assert found == ["file", "notes", "thesis.txt"]


# what survives


def assert_only(folder: Path, model: Transformer) -> None:
    """The folder holds this model, and nothing is left beside it."""
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert_same(load(folder), model)


STORED = pytest.mark.parametrize("stored", ["fp32", "fp8"])


@STORED
def test_disk_full(folder, monkeypatch, stored):
    """The second shard cannot be written: errno is what a full disk gives."""

    def fail(tensors, path, **options):
        if "-00002-" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save_file(tensors, path, **options)

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match=r"what it held is untouched: .*No space left"):
        save(make(seed=2), folder, stored, max_shard_bytes=2000)
    assert_only(folder, make())


@STORED
def test_file_size_limit(folder, stored):
    """Not injected: the operating system itself refuses to write on."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(OSError, match="what it held is untouched"):
            save(make(seed=2), folder, stored)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert_only(folder, make())


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_rename_fails(folder, monkeypatch, error):
    rename = os.rename

    def fail(source, target):
        if source.suffix == ".new":
            raise error("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(error):
        save(make(seed=2), folder)
    assert_only(folder, make())


KILLED = """
import os, shutil, signal, sys, time, torch
from pathlib import Path
from minids import Transformer, checkpoint, preset
torch.set_num_threads(1)
write, rename, remove = checkpoint.save_file, os.rename, shutil.rmtree
die = lambda: os.kill(os.getpid(), signal.SIGKILL)

def save_and_die(folder, where):
    def write_some(tensors, path, **options):
        write(tensors, path, **options)
        if where.startswith("writing") and "-00002-" in path.name:
            die()

    def rename_some(source, target):
        rename(source, target)
        if where == "between renames" and str(target).endswith(".old"):
            die()

    def remove_some(path, **options):
        if where == "after both" and str(path).endswith(".old") and path.exists():
            die()
        remove(path, **options)

    checkpoint.save_file, os.rename, shutil.rmtree = write_some, rename_some, remove_some
    dtype = "fp8" if where.endswith("fp8") else None
    for seed in range(2, 1000):
        model = Transformer(preset("toy"), seed=seed)
        checkpoint.save(model, folder, dtype, max_shard_bytes=2000)
        (folder.parent / f"saved {seed}").touch()

for folder, where in zip(sys.argv[1::2], sys.argv[2::2]):
    child = os.fork()
    if not child:
        save_and_die(Path(folder), where)
        os._exit(1)
    if where.startswith("any moment"):
        while not (Path(folder).parent / "saved 4").exists():
            time.sleep(0.001)
        time.sleep(0.0037)
        os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, where
"""
MOMENTS = (
    "writing",
    "writing fp8",
    "between renames",
    "after both",
    "any moment",
    "any moment fp8",
)


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> dict[str, Path]:
    """Folders that held make(), then a save of seed 2 (and more) was killed at some moment."""
    folders = {where: tmp_path_factory.mktemp("killed") / "model" for where in MOMENTS}
    for folder in folders.values():
        save(make(), folder)
    pairs = [str(word) for where, folder in folders.items() for word in (folder, where)]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", KILLED, *pairs], env=env, check=True, timeout=300)
    return folders


def beside(folder: Path) -> set[str]:
    return {path.name for path in folder.parent.iterdir() if not path.name.startswith("saved")}


@pytest.mark.parametrize("moment", ["writing", "writing fp8"])
def test_killed_while_writing(killed, moment):
    folder = killed[moment]
    assert_same(load(folder), make())
    assert beside(folder) == {"model", ".model.new"}
    save(make(seed=3), folder)  # the next save clears up
    assert_only(folder, make(seed=3))


def test_killed_between_the_renames(killed):
    folder = killed["between renames"]
    assert beside(folder) == {".model.old", ".model.new"}
    with pytest.warns(UserWarning, match="its last save was killed, reading the one before"):
        assert_same(load(folder), make())
    save(make(seed=3), folder)
    assert_only(folder, make(seed=3))


def test_killed_after_both_renames(killed):
    folder = killed["after both"]
    assert beside(folder) == {"model", ".model.old"}
    assert_same(load(folder), Transformer(preset("toy"), seed=2))
    save(make(seed=3), folder)
    assert_only(folder, make(seed=3))


@pytest.mark.filterwarnings("ignore:.*its last save was killed")
@pytest.mark.parametrize("moment", ["any moment", "any moment fp8"])
def test_killed_at_any_moment(killed, moment):
    """Whole, and one of the last that were saved: never part of one, never something older."""
    folder = killed[moment]
    last = max(int(path.name.split()[1]) for path in folder.parent.glob("saved *"))
    found = load(folder)
    assert found.embed.dtype == (torch.bfloat16 if moment.endswith("fp8") else torch.float32)
    assert any(
        torch.equal(found.embed, Transformer(preset("toy"), seed=seed).embed.to(found.embed.dtype))
        for seed in (last, last + 1)
    )
