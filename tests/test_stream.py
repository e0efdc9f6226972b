"""minids/stream.py and the command: the bits of the model in memory, at most one matrix resident,
a stop at any moment, and files that go bad on the way."""

import json
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import folders
import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from minids import Transformer, cli, generate, load, preset, save
from minids.cli.screen import Stopped
from minids.files import state as states
from minids.files import text_state
from minids.files.mapped import Mapped
from minids.files.on_disk import ExpertsOnDisk
from minids.files.shards import FP8, tensor_names
from minids.generate import Sampler
from minids.stream import Run, Streamed
from minids.tokenizer import train_tokenizer

V2 = dict(score_func="softmax", norm_topk=False, group_score="max", bias_speed=0.0,
          seq_loss_alpha=0.0, n_shared_experts=2, q_lora_rank=0, mtp_depth=0)  # fmt: skip
# 128 divides none; a matrix of an expert has whole 64 bytes, so that all lie as torch aligns them
RAGGED = dict(dim=304, inter_dim=216, moe_inter_dim=136, n_heads=3, q_lora_rank=100,
              kv_lora_rank=36, qk_nope_head_dim=20, v_head_dim=28)  # fmt: skip
MODELS = {
    "fp8": ("micro", "fp8", {}),
    "fp8 ue8m0": ("micro", "fp8", dict(scale_fmt="ue8m0", precision="fp8")),
    "fp8 ragged": ("micro", "fp8", RAGGED),
    "fp8 V2": ("micro", "fp8", V2),
    "bf16": ("nano", "bf16", {}),
    "bf16 ragged": ("micro", "bf16", RAGGED),
    "fp32": ("nano", "fp32", {}),
    "fp32 toy": ("toy", "fp32", {}),
    "fp32 V2": ("nano", "fp32", V2 | RAGGED),
}
PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9]])


def write(folder: Path, name: str, stored: str, seed: int = 1, **changes) -> Path:
    """Save a model whose router biases and gains are not what they are at the start."""
    model = Transformer(preset(name, **changes), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part, gain in model.named_parameters():
            if part.endswith("gain"):
                gain.uniform_(0.5, 1.5, generator=generator)
    for router in model.routers:
        if router.bias is not None:
            router.bias.normal_(0, 0.05, generator=generator)
    words = 256 + 6
    tokenizer = train_tokenizer([], words) if model.cfg.vocab_size >= words else None
    save(model, folder, dtype=stored, tokenizer=tokenizer, max_shard_bytes=300_000)
    return folder


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory):
    name, stored, changes = MODELS[request.param]
    return write(tmp_path_factory.mktemp("model") / "m", name, stored, **changes)


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    """An FP8 folder of several files, with a tokenizer, that no test changes."""
    return write(tmp_path_factory.mktemp("nano") / "nano", "nano", "fp8")


@pytest.fixture
def copy(nano, tmp_path):
    """The same folder, for a test to spoil."""
    target = tmp_path / "copy"
    target.mkdir()
    for path in nano.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def text(model: Streamed, prompt: list[int], count: int, temperature=0.0, top_p=1.0, seed=0):
    run = Run([*prompt], model.new_cache(1, len(prompt) + count), torch.Generator())
    run.generator.manual_seed(seed)
    sampler = Sampler(temperature, top_p, run.generator)
    for _ in range(count):
        model.next_word(run, sampler)
    return run.tokens


# the same bits as in memory


@pytest.mark.parametrize("dtype", [None, "fp32", "bf16"])
def test_logits_have_the_bits_of_the_model_in_memory(folder, dtype):
    """Of each position of a prompt, then of words one at a time, into the absorbed form."""
    model, streamed = load(folder, dtype=dtype), Streamed(folder, dtype=dtype)
    ours, theirs = streamed.new_cache(1, 24), model.new_cache(1, 24)
    assert ours.store.dtype == theirs.store.dtype
    with torch.no_grad():
        assert torch.equal(streamed(PROMPT), model(PROMPT))
        for ids in (PROMPT, *torch.arange(10, 20)[:, None, None]):
            assert torch.equal(streamed(ids, ours), model(ids, cache=theirs))
    assert ours.lengths == theirs.lengths
    assert torch.equal(ours.store, theirs.store)


@pytest.mark.parametrize(
    "rule", [{}, dict(temperature=0.8, seed=3), dict(temperature=1.5, top_p=0.6)]
)
def test_words_are_those_of_generate(folder, rule):
    expected = generate(load(folder), PROMPT, max_new_tokens=8, **rule)
    assert text(Streamed(folder), PROMPT[0].tolist(), 8, **rule) == expected[0].tolist()


def test_a_head_in_many_slices_is_the_same_head(nano, monkeypatch):
    monkeypatch.setattr("minids.stream._HEAD_ROWS", 100)  # 1024 words: a ragged last slice
    with torch.no_grad():
        assert torch.equal(Streamed(nano)(PROMPT), load(nano)(PROMPT))


def test_what_a_layer_holds_is_what_the_model_in_memory_holds(nano):
    """Norms, centroids and the routing bias, the last one in FP32; all else is read where used."""
    model, held = load(nano), Streamed(nano).block(1).state_dict()
    expected = model.layers[1].state_dict()
    assert {name for name in expected if "norm" in name or "router" in name} == held.keys()
    for name, value in held.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name


# what is read, and how long it stays


def test_a_word_reads_each_layer_once_and_of_experts_those_it_chose(nano, monkeypatch):
    model, read, chosen = Streamed(nano), [], []
    model_cfg = model.cfg
    real, forward = Mapped.get_tensor, ExpertsOnDisk.forward

    def noted(self, name, *rows):
        read.append(name)
        return real(self, name, *rows)

    def routed(self, x, gate, ids):
        chosen.append((self.layer, set(ids.flatten().tolist())))
        return forward(self, x, gate, ids)

    monkeypatch.setattr(Mapped, "get_tensor", noted)
    monkeypatch.setattr(ExpertsOnDisk, "forward", routed)
    model(PROMPT[:, :1])
    assert len(read) == len(set(read)), "a tensor was read twice"
    found = {(layer, e) for layer, experts in chosen for e in experts}
    assert len(found) == model_cfg.n_activated_experts
    parts = [name.split(".") for name in read if ".experts." in name]
    assert {(int(part[2]), int(part[5])) for part in parts} == found
    assert not [name for name in read if name.startswith(f"model.layers.{model_cfg.n_layers}.")]
    place = model.files.places
    assert model.files.bytes_read == sum(
        place[name].nbytes // (model_cfg.vocab_size if name.endswith("embed_tokens.weight") else 1)
        for name in read
    )


def _peak(folder: str, result) -> None:
    import resource

    torch.set_num_threads(1)
    model = Streamed(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    text(model, [1, 2, 3], 4)
    result.put(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts resident memory as Linux does")
def test_resident_memory_is_a_few_matrices(tmp_path):
    """A checkpoint of 190 MB; a matrix of it, FP8 and BF16, has 9 MB."""
    sizes = dict(dim=1024, inter_dim=3072, moe_inter_dim=1024, n_routed_experts=16, n_layers=5)
    cli_run("make-checkpoint", tmp_path / "m", "--preset", "nano")  # read what it imports
    from minids.files.synthetic import make_checkpoint

    make_checkpoint(tmp_path / "big", preset("nano", **sizes, mtp_depth=0))
    held = sum(path.stat().st_size for path in (tmp_path / "big").iterdir())
    assert held > 190e6
    context = multiprocessing.get_context("spawn")
    result = context.Queue()
    process = context.Process(target=_peak, args=(str(tmp_path / "big"), result))
    process.start()
    peak = result.get()
    process.join()
    assert peak < 60e6


# the command


def cli_run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def stream(folder: Path, state: Path, *more, prompt: str = "The quick", new: int = 5):
    options = ["--prompt", prompt, "--max-new-tokens", new, "--state", state]
    return cli_run("stream", folder, *options, *more)


def fails(result, says: str) -> None:
    assert result.exit_code == 2, result.output
    line = result.stderr.splitlines()[-1]
    assert line.startswith("minids: ")
    assert says in line


def test_the_command_writes_what_generate_writes(nano, tmp_path):
    ours = stream(nano, tmp_path / "state")
    theirs = cli_run("generate", nano, "The quick", "--max-new-tokens", 5, "--no-draft")
    assert ours.exit_code == 0, ours.output
    assert ours.stdout == theirs.stdout
    assert all(word in ours.stderr for word in ("GB read", "dense layer", "MoE layer", "peak"))


def test_more_words_go_on_from_the_state_and_fewer_are_shown(nano, tmp_path):
    expected = {new: stream(nano, tmp_path / f"{new}", new=new).stdout for new in (3, 7)}
    state = tmp_path / "state"
    assert stream(nano, state, new=3).stdout == expected[3]
    more = stream(nano, state, new=7)
    assert "new token 4, layer 0 of 2" in more.stderr
    assert more.stdout == expected[7]
    assert stream(nano, state, new=3).stdout == expected[3]


def test_ids_go_without_a_tokenizer(copy, tmp_path):
    (copy / "tokenizer.json").unlink()
    fails(stream(copy, tmp_path / "a"), "has no tokenizer.json: put it there, or give --ids")
    result = cli_run(
        "stream", copy, "--ids", "3 1 4", "--max-new-tokens", 4, "--state", tmp_path / "b"
    )
    expected = generate(load(copy), torch.tensor([[3, 1, 4]]), max_new_tokens=4, stop_tokens=(1,))
    assert result.stdout.split() == [str(word) for word in expected[0].tolist()]


def test_a_stop_token_ends_the_text(copy, tmp_path):
    ids = generate(load(copy), torch.tensor([[3, 1, 4]]), max_new_tokens=6)[0].tolist()
    folders.edit_json(copy / "config.json", eos_token_id=ids[4])
    (copy / "tokenizer.json").unlink()
    result = cli_run(
        "stream", copy, "--ids", "3 1 4", "--max-new-tokens", 6, "--state", tmp_path / "b"
    )
    end = 3 + ids[3:].index(ids[4]) + 1
    assert [int(word) for word in result.stdout.split()] == ids[:end]


def test_the_default_state_is_in_the_working_folder(nano, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli_run("stream", nano, "--max-new-tokens", 1).exit_code == 0
    assert cli_run("stream", nano, "--max-new-tokens", 1, "--seed", 1).exit_code == 0
    assert len(list((tmp_path / "runs/stream").glob("nano-*.safetensors"))) == 2
    monkeypatch.chdir(nano)
    fails(cli_run("stream", ".", "--max-new-tokens", 1), "lies in the checkpoint")


# stopped at any moment


@pytest.mark.parametrize("moment", [0, 1, 7, 20, 33, 47, 70])
def test_stopped_between_two_matrices_it_goes_on(nano, tmp_path, monkeypatch, moment):
    """The state holds the layer and what goes into it; nothing that is done is done again."""
    expected, state = stream(nano, tmp_path / "whole").stdout, tmp_path / "state"
    real, reads = Mapped.get_tensor, []

    def counted(self, name, *rows):
        reads.append(name)
        if len(reads) == moment + 1:
            signal.raise_signal(signal.SIGTERM if moment % 2 else signal.SIGINT)
        return real(self, name, *rows)

    with monkeypatch.context() as patched:
        patched.setattr(Mapped, "get_tensor", counted)
        stopped = stream(nano, state)
    assert stopped.exit_code == (143 if moment % 2 else 130)
    line = stopped.stderr.splitlines()[-1]
    assert "go on with: minids" in line
    header, _ = states.read_state(state)
    new = len(header["tokens"]) - 10  # the prompt's bytes and the token before them
    assert (f"new token {new + 1}, " if new else "the 10 tokens of the prompt, ") in line
    assert f"layer {header['layer']} of 2" in line
    begun = []
    real_block = Streamed.block
    monkeypatch.setattr(Streamed, "block", lambda self, n: begun.append(n) or real_block(self, n))
    result = stream(nano, state)
    assert result.stdout == expected
    assert len(begun) == 2 * (5 - new) - header["layer"]


def test_a_second_signal_does_not_wait(nano, tmp_path, monkeypatch):
    def twice(self, *_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Mapped, "get_tensor", twice)
    assert stream(nano, tmp_path / "state").exit_code == 143


def slow_stream(folder: str, state: str, out: str) -> None:
    """What a process does until a signal comes: a pause before each tensor."""
    torch.set_num_threads(1)
    real = Mapped.get_tensor

    def slowly(self, *given):
        Path(out + ".reads").touch()
        time.sleep(0.004)
        return real(self, *given)

    Mapped.get_tensor = slowly
    with open(out, "w") as sys.stdout, open(out + ".err", "w") as sys.stderr:
        arguments = ["stream", folder, "--prompt", "The quick", "--max-new-tokens", "5"]
        cli.app([*arguments, "--state", state])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_real_signals_at_random_moments(nano, tmp_path, number):
    expected, state = stream(nano, tmp_path / "whole").stdout, tmp_path / "state"
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    context.set_forkserver_preload(["minids.cli"])
    moments, held, stops = random.Random(int(number)), [0], 0
    for attempt in range(30):
        out = tmp_path / f"{attempt}.txt"
        process = context.Process(target=slow_stream, args=(str(nano), str(state), str(out)))
        process.start()
        while not Path(f"{out}.reads").exists() and process.is_alive():
            time.sleep(0.01)
        process.join(moments.uniform(0.1, 0.6) * (1 + attempt / 4))  # a slow machine ends too
        if process.is_alive():
            stops += 1
            os.kill(process.pid, number)
            process.join()
            if out.read_text() == expected:
                break  # the signal came when all was done
            if number != signal.SIGKILL:
                assert process.exitcode == 128 + number
                assert "go on with: minids" in Path(f"{out}.err").read_text()
        if state.exists():
            header, _ = states.read_state(state)  # whole, whenever the signal came
            held.append(len(header["tokens"]))
        if process.exitcode == 0:
            break
    assert stops >= 2
    assert held == sorted(held), "a token that was done was lost"
    assert out.read_text() == expected


# bad input


def moved_at(name: str, monkeypatch, action) -> None:
    """Do `action` to the file of a tensor just before it is read."""
    real, done = Mapped.get_tensor, []

    def spoilt(self, asked, *rows):
        if asked == name and not done:
            done.append(action(self.places[name].path))
        return real(self, asked, *rows)

    monkeypatch.setattr(Mapped, "get_tensor", spoilt)


LATE = "model.layers.1.self_attn.o_proj.weight"


def test_a_shard_that_disappears_is_named_and_once_back_the_run_goes_on(
    copy, tmp_path, monkeypatch
):
    expected, state = stream(copy, tmp_path / "whole").stdout, tmp_path / "state"
    gone = []

    def hide(path: Path) -> None:
        gone.append(path.rename(tmp_path / "gone"))
        gone.append(path)

    with monkeypatch.context() as patched:
        moved_at(LATE, patched, hide)
        result = stream(copy, state)
    fails(result, f"{gone[1]}: cannot be read any more, at {LATE}: No such file")
    fails(result, "stopped in the 10 tokens of the prompt, layer 1 of 2; the same command goes on")
    fails(stream(copy, state), f"{gone[1]}: no such file")
    gone[0].rename(gone[1])
    assert stream(copy, state).stdout == expected


def test_a_shard_that_is_cut_while_it_is_read_is_named(copy, tmp_path, monkeypatch):
    moved_at(LATE, monkeypatch, lambda path: os.truncate(path, path.stat().st_size - 1))
    fails(stream(copy, tmp_path / "state"), f"changed while it was read, at {LATE}")


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to read the pages at once")
def test_a_disk_that_fails_is_an_error_and_not_the_end_of_the_process(copy, monkeypatch):
    """Pages behind the end of a file stand for a disk that cannot give them: both are SIGBUS."""
    files = Streamed(copy).files
    place = files.places[LATE]
    os.truncate(place.path, 4096)
    version = (4096, place.path.stat().st_mtime_ns)
    monkeypatch.setitem(files.places, LATE, place._replace(version=version, start=8192))
    with pytest.raises((OSError, ValueError), match=r"cannot be read any more|greater than file"):
        files.get_tensor(LATE)


def test_a_file_cut_before_the_run_is_named(copy, tmp_path):
    path = folders.shards(copy)[1]
    os.truncate(path, path.stat().st_size - 1)
    fails(stream(copy, tmp_path / "state"), f"{path}: not a whole safetensors file")


WEIGHT = "model.layers.1.mlp.shared_experts.up_proj.weight"
SCALE = WEIGHT + "_scale_inv"


@pytest.mark.parametrize(
    ("value", "says"),
    [(0.0, "got 0.0 for block [0, 0]"), (-1.0, "got -1.0"), (torch.nan, "got nan"),
     (torch.inf, "got inf")],
)  # fmt: skip
def test_a_bad_scale_is_named(copy, tmp_path, value, says):
    path = folders.edit_shard(copy, lambda t: t[SCALE].view(-1)[:1].fill_(value), SCALE)
    fails(stream(copy, tmp_path / "state"), f"{path}: {SCALE} must be finite and above 0, {says}")


@pytest.mark.parametrize(
    ("change", "says"),
    [(lambda t: t.pop(SCALE), f"tensor {SCALE} is missing"),
     (lambda t: t.update({SCALE: torch.ones(2, 1)}), f"{SCALE} must be ('F32', [1, 1])")],
)  # fmt: skip
def test_a_missing_or_misshapen_scale_is_named(copy, tmp_path, change, says):
    folders.edit_shard(copy, change, SCALE, index=True)
    fails(stream(copy, tmp_path / "state"), says)


def test_a_nan_code_is_named(copy, tmp_path):
    folders.edit_shard(copy, lambda t: t[WEIGHT].view(torch.uint8)[3, :1].fill_(0x7F), WEIGHT)
    fails(stream(copy, tmp_path / "state"), f"{WEIGHT} is not finite, code 0x7F at [3, 0] is NaN")


def test_a_layer_whose_output_is_not_finite_is_named(copy, tmp_path):
    gain = "model.layers.1.input_layernorm.weight"
    folders.fill(gain, torch.nan)(copy)
    fails(stream(copy, tmp_path / "state"), "layer 1 gives no finite output")


def test_a_folder_that_is_incomplete_is_named(copy, tmp_path):
    path = folders.shards(copy)[0]
    path.unlink()
    fails(stream(copy, tmp_path / "state"), f"{path}: no such file")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--device", "tpu9"), "device 'tpu9' cannot be used"),
        (("--dtype", "fp8"), "dtype must be 'fp32' or 'bf16'"),
        (("--top-p", "0"), "top_p must be above 0"),
        (("--ids", "1"), "give --prompt or --ids, not both"),
        (("--max-new-tokens", "0"), "max_new_tokens must be an integer >= 1"),
        (("--max-new-tokens", "1020"), "must be at most 1024 (max_seq_len) - 10 (prompt)"),
    ],
)
def test_bad_options(nano, tmp_path, options, says):
    fails(stream(nano, tmp_path / "state", *options), says)


@pytest.mark.parametrize(
    ("ids", "says"),
    [("1 x", "--ids must be numbers"), ("5 4096", "ids must lie in 0..1023, got 5..4096"),
     (" ".join(["7"] * 1024), "the prompt has 1024 tokens, max_seq_len is 1024")],
)  # fmt: skip
def test_bad_ids(nano, tmp_path, ids, says):
    fails(cli_run("stream", nano, "--ids", ids, "--state", tmp_path / "state"), says)


def test_a_state_of_another_run_is_refused(nano, copy, tmp_path):
    state = tmp_path / "state"
    assert stream(nano, state).exit_code == 0
    before = state.read_bytes()
    fails(stream(nano, state, prompt="The slow"), "of another run: its prompt is [0, ")
    fails(stream(nano, state, "--temperature", "1"), "its temperature is 0.0, not 1.0")
    fails(stream(nano, state, "--dtype", "fp32"), "its dtype is 'bfloat16', not 'float32'")
    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    for path in folders.shards(copy):  # the last bytes of every file are in the fingerprint
        with open(path, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last[0] ^ 1]))
    assert name in folders.tensors(copy)
    fails(stream(copy, state), "its checkpoint is '")
    assert state.read_bytes() == before


def test_a_damaged_state_is_refused(nano, tmp_path):
    state = tmp_path / "state"
    assert stream(nano, state).exit_code == 0
    state.write_bytes(state.read_bytes()[:-1])
    fails(stream(nano, state), f"{state} is damaged")


def test_a_full_disk_costs_the_state_and_not_the_text(nano, tmp_path, monkeypatch):
    expected = stream(nano, tmp_path / "whole").stdout

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(states, "save_file", full)
    result = stream(nano, tmp_path / "state")
    assert result.exit_code == 0
    assert result.stdout == expected
    said = [line for line in result.stderr.splitlines() if "No space left" in line]
    assert len(said) == 1
    assert said[0].endswith("the text goes on")
    assert not list(tmp_path.glob("state*"))


def test_a_state_is_whole_or_the_one_before(nano, tmp_path, monkeypatch):
    """A rename is the last thing that happens: killed before it, the old state is read."""
    state = tmp_path / "state"
    assert stream(nano, state, new=2).exit_code == 0
    model = Streamed(nano)
    said = states.read_state(state)[0]["about"]
    run = text_state.start_or_go_on(state, model, said, 4)
    model.next_word(run, Sampler(0.0, 1.0, run.generator))

    def killed(*_):
        raise Stopped(137)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(Stopped):
        text_state.save_run(state, said, run)
    assert len(text_state.start_or_go_on(state, model, said, 4).tokens) == len(run.tokens) - 1


def test_a_state_holds_no_more_of_the_cache_than_is_used(nano, tmp_path):
    assert stream(nano, tmp_path / "state", new=3).exit_code == 0
    with safe_open(tmp_path / "state", "pt") as file:
        assert file.get_slice("cache").get_shape() == [2, 1, 12, 48]
        about = json.loads(file.metadata()["state"])["about"]
    assert about["prompt"][0] == 0  # the token before a text, of config.json


# what a token costs


PARTS = {
    "routed": ".experts.", "shared": "shared_experts", "routers": "mlp.gate.", "dense": ".mlp.",
    "head": "lm_head", "attention": "self_attn", "the rest": "",
}  # fmt: skip


def token_bytes(cfg) -> dict[str, int]:
    """Return what a token reads of an FP8 checkpoint, by part, counted from names and shapes."""
    parts = dict.fromkeys(PARTS, 0)
    for name, (shape, dtype) in tensor_names(cfg, FP8).items():
        nbytes = math.prod(shape) * dtype.itemsize
        if name.startswith(f"model.layers.{cfg.n_layers}."):
            continue  # MTP
        if name == "model.embed_tokens.weight":
            nbytes //= cfg.vocab_size
        part = next((part for part, sign in PARTS.items() if sign in name), "the rest")
        parts[part] += nbytes
    return parts | {"routed": parts["routed"] * cfg.n_activated_experts // cfg.n_routed_experts}


def test_a_token_reads_what_is_counted(nano):
    model = Streamed(nano)
    model(PROMPT[:, :1])
    assert model.files.bytes_read == sum(token_bytes(model.cfg).values())


def test_the_page_shows_what_is_counted():
    page = (Path(__file__).parents[1] / "book/run.md").read_text(encoding="utf-8")
    parts, names = token_bytes(preset("v3")), tensor_names(preset("v3"), FP8)
    total = sum(parts.values())
    whole = sum(math.prod(shape) * dtype.itemsize for shape, dtype in names.values())
    assert f"{len(names):,} tensors, {whole:,} bytes" in page
    for nbytes in (total, *parts.values()):
        assert f"{nbytes:,}" in page
    assert f"{(total - parts['routed']) / 1e9:.1f} GB without routed experts" in page
    floors = re.findall(r"^\| ([\d.]+) GB/s .*\| ([\d.]+) \|$", page, flags=re.MULTILINE)
    assert len(floors) == 4
    for speed, seconds in floors:
        assert float(seconds) == pytest.approx(total / 1e9 / float(speed), rel=0.01)
