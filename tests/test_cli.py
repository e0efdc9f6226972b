"""The command minids: what it prints, and that every error is one line and an exit code."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from minids import cli
from minids.config import preset
from minids.count import count
from minids.files.hf import to_hf
from minids.tokenizer import train_tokenizer

VERBS = ["tour", "count", "train", "evaluate", "generate", "stream", "make-checkpoint", "bench",
         "doctor"]  # fmt: skip
TEXT = "The quick brown fox jumps over the lazy dog, again and again.\n"


def run(*arguments: str):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def fails(result, code: int, says: str) -> None:
    """Check for one line on stderr, without a traceback, and the exit code."""
    assert result.exit_code == code
    assert result.stderr.startswith("minids: ")
    assert result.stderr.count("\n") == 1
    assert says in result.stderr


@pytest.fixture
def config(tmp_path):
    """A config.json of a model so small that training it takes a moment."""
    cfg = preset("toy", vocab_size=270)
    (tmp_path / "config.json").write_text(json.dumps(to_hf(cfg)))
    return cfg, tmp_path


def test_help_names_every_verb():
    text = run("--help").stdout
    assert all(verb in text for verb in VERBS)


def test_module_and_version():
    done = subprocess.run(
        [sys.executable, "-m", "minids", "--version"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("minids ")


def test_count_prints_a_table():
    assert "671,026,419,200" in run("count", "v3").stdout


def test_count_prints_json():
    result = run("count", "v3", "--json", "--seq-len", "2048")
    printed = json.loads(result.stdout)
    assert printed.pop("files")["fp8"]["tensors"] == 91_991
    assert printed == count(preset("v3"), 2048).as_dict()


def test_count_reads_a_file_or_its_folder(config):
    cfg, folder = config
    for name in (folder, folder / "config.json"):
        assert json.loads(run("count", name, "--json").stdout)["parts"] == count(cfg).parts


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "Expecting property name"),
        ("[1, 2]", "must be a JSON object, got [1, 2]"),
        ('{"model_type": "gpt2"}', "model_type must be"),
    ],
)
def test_bad_config_file(tmp_path, text, says):
    path = tmp_path / "config.json"
    path.write_text(text)
    result = run("count", path)
    fails(result, 2, says)
    assert str(path) in result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("count", "v4"), "'v4' is neither a file nor a preset: toy, nano"),
        (("count", "nano", "--seq-len", "0"), "seq_len must be at least 1, got 0"),
        (("generate", "no/such/folder"), "no/such/folder"),
        (("evaluate", "no/such/folder"), "no/such/folder"),
        (("train", "nowhere", "--corpus", "no/such/text"), "no/such/text"),
    ],
)
def test_bad_arguments(arguments, says):
    fails(run(*arguments), 2, says)


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (ValueError("two\nlines"), 2, "two lines"),
        (PermissionError(13, "not yours", "a/b"), 2, "a/b"),
        (FloatingPointError("loss is nan"), 2, "loss is nan"),
        (ImportError("needs minids[book]"), 1, "minids[book]"),
        (KeyboardInterrupt(), 130, "go on from their last saved state"),
    ],
)
def test_errors_end_in_one_line(monkeypatch, error, code, says):
    def stop(_):
        raise error

    monkeypatch.setattr(cli.machine, "doctor", stop)
    fails(run("doctor"), code, says)


def test_a_bug_is_no_user_error(monkeypatch):
    monkeypatch.setattr(cli.machine, "doctor", lambda _: {}["missing"])
    assert isinstance(run("doctor").exception, KeyError)


@pytest.mark.parametrize(("works", "code"), [(True, 0), (False, 1)])
def test_doctor_tells_by_its_exit_code(monkeypatch, works, code):
    monkeypatch.setattr(cli.machine, "doctor", lambda _: works)
    assert run("doctor").exit_code == code


def test_text_comes_when_its_characters_are_whole():
    tokenizer = train_tokenizer(["a"], 262)  # bytes alone: é is two tokens, the sign € three
    words = ([[id_]] for id_ in tokenizer.encode("aé€").ids)
    assert list(cli.decode_stream(tokenizer, words)) == ["a", "é", "€", ""]
    half = ([[id_]] for id_ in tokenizer.encode("é").ids[:1])
    assert list(cli.decode_stream(tokenizer, half)) == ["\ufffd"]


def test_train_then_evaluate_then_generate(config, tmp_path):
    _, folder = config
    (tmp_path / "a.txt").write_text("".join(f"{n} {TEXT}" for n in range(40)))
    out = tmp_path / "run"
    small = ("--steps", "2", "--batch-size", "2", "--seq-len", "16")
    text = ("--corpus", tmp_path / "a.txt")
    trained = run("train", out, "--config", folder, *text, *small)
    assert trained.exit_code == 0, trained.output
    assert (out / "model/config.json").is_file()
    assert (out / "loss.svg").stat().st_size > 0
    scores = run("evaluate", out / "model", *text, "--window", "16", "--json")
    assert scores.exit_code == 0, scores.output
    assert json.loads(scores.stdout)["prose"]["nats_per_char"] > 0
    table = run("evaluate", out / "model", *text, "--window", "16").stdout
    assert [line.split()[0] for line in table.splitlines()] == ["prose", "all"]
    asked = ("generate", out / "model", "The quick", "--max-new-tokens", "8")
    plain, drafted = run(*asked, "--no-draft"), run(*asked, "--draft")
    assert plain.exit_code == 0, plain.output
    assert plain.stdout.startswith("The quick")
    assert plain.stdout == drafted.stdout
    assert "guesses right" in drafted.stderr
    assert "guesses right" not in plain.stderr


def test_train_in_fp8_from_a_config_file(tmp_path):
    """A published config.json with a quantization_config is a config that trains in FP8."""
    few = dict(n_layers=1, n_routed_experts=2, n_expert_groups=1, n_limited_groups=1, mtp_depth=0)
    published = to_hf(preset("toy", vocab_size=270, precision="fp8", scale_fmt="ue8m0", **few))
    (tmp_path / "config.json").write_text(json.dumps(published))
    (tmp_path / "a.txt").write_text("".join(f"{n} {TEXT}" for n in range(40)))
    out, small = tmp_path / "run", ("--steps", "2", "--batch-size", "2", "--seq-len", "16")
    given = ("--config", tmp_path / "config.json", "--corpus", tmp_path / "a.txt", *small)
    trained = run("train", out, *given)
    assert trained.exit_code == 0, trained.output
    cfg = cli.read_config(str(out / "model"))
    assert (cfg.precision, cfg.scale_fmt) == ("fp8", "ue8m0")
    asked = run("generate", out / "model", "The quick", "--max-new-tokens", "4")
    assert asked.exit_code == 0, asked.output
    assert asked.stdout.startswith("The quick")
