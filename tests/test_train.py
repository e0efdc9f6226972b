"""minids/train.py: one step by hand, accumulation, biases, what a run writes, what it refuses."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from minids import Transformer, checkpoint, preset
from minids.cli.training import train_from_corpus
from minids.data import Packed
from minids.files.corpus import Corpus
from minids.schedule import Rates, Schedule
from minids.train import make_optimizer, take_step, train

CFG = preset("toy", bias_speed=0.01)
# few products: each costs the same whatever its size
IN_FP8 = replace(CFG, precision="fp8", n_layers=1, n_dense_layers=0, n_routed_experts=2,
                 n_expert_groups=1, n_limited_groups=1, n_activated_experts=1)  # fmt: skip
RATES = Rates(lr=1e-3, mtp_weight=0.3, bias_speed=0.01)
# other pieces of a batch are added in another order; the planted mistake moves sums by 1e-2
ROUNDING = 1e-5


def schedule(steps: int = 6, batch: int = 4, seq_len: int = 8, **changes) -> Schedule:
    tokens = float(steps * batch * seq_len)
    shape = Schedule(peak_lr=3e-3, warmup_steps=2, constant=tokens / 2, cosine=tokens / 2, tail=0.0,
                     last_tail=0.0, batch=batch, first_batch=batch)  # fmt: skip
    return replace(shape, **changes)


def stream(seq_len: int = 8, words: int = 32, seed: int = 0) -> Packed:
    """Documents of 3 to 40 tokens in which each word depends on the one before."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 40, (30,), generator=generator).tolist()
    starts = torch.randint(words, (30,), generator=generator).tolist()
    pairs = zip(starts, lengths, strict=True)
    return Packed([[(s + 5 * i) % words for i in range(n)] for s, n in pairs], seq_len, seed)


def losses(run) -> list:
    return [(line["loss"], line["mtp"], line["balance"], line["grad_norm"]) for line in run.log]


def biases(model: Transformer) -> torch.Tensor:
    return torch.stack([router.bias for router in model.routers])


# by hand


def test_first_step_of_adamw_by_hand():
    """m / (sqrt(v) + eps) of the first step is the gradient's sign; matrices shrink by lr * 0.1."""
    model, (tokens, documents) = Transformer(CFG), stream().rows(0, 4)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    twin = Transformer(CFG)
    twin.losses(tokens, mask=documents).total(RATES.mtp_weight).backward()
    norm = math.sqrt(sum(weight.grad.square().sum() for weight in twin.parameters()))
    line = take_step(model, make_optimizer(model), tokens, documents, RATES)
    assert line["grad_norm"] == pytest.approx(norm, rel=ROUNDING)
    grads = {name: weight.grad / max(1.0, norm) for name, weight in twin.named_parameters()}
    for name, weight in model.named_parameters():
        grad, shrunk = grads[name], before[name] * (1 - RATES.lr * 0.1 * (weight.ndim > 1))
        torch.testing.assert_close(weight, shrunk - RATES.lr * grad / (grad.abs() + 1e-8))


def test_every_parameter_is_optimised_once_and_gains_do_not_decay():
    model = Transformer(CFG)
    decay, keep = make_optimizer(model).param_groups
    assert {id(p) for p in decay["params"] + keep["params"]} == {id(p) for p in model.parameters()}
    assert (decay["weight_decay"], keep["weight_decay"]) == (0.1, 0.0)
    gains = {id(p) for name, p in model.named_parameters() if name.endswith("gain")}
    assert gains == {id(p) for p in keep["params"]}
    assert decay["betas"] == (0.9, 0.95)


def test_gradient_is_clipped_to_norm_1():
    """Words of a large head give a large gradient; AdamW hides its size, its moments do not."""
    model = Transformer(CFG)
    with torch.no_grad():
        model.head.weight *= 1000
    optimizer = make_optimizer(model)
    line = take_step(model, optimizer, *stream().rows(0, 4), RATES)
    assert line["grad_norm"] > 2
    moments = [state["exp_avg"] for state in optimizer.state.values()]
    clipped = math.sqrt(sum((moment / 0.1).square().sum() for moment in moments))
    assert clipped == pytest.approx(1.0, rel=1e-3)


# FP8: moments wait in BF16, weights and the step itself are FP32 (report 3.3.3)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Round FP32 to its upper 16 bits, ties to even, by the bits."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)


def adamw(weight: np.ndarray, grads: list[np.ndarray], lr: float, decay: float, kept) -> np.ndarray:
    """AdamW in FP64, a line a formula; `kept` is what becomes of a moment between two steps."""
    m, v = np.zeros_like(weight), np.zeros_like(weight)
    for step, grad in enumerate(grads, start=1):
        m = 0.9 * m + 0.1 * grad
        v = 0.95 * v + 0.05 * grad**2
        weight = weight * (1 - lr * decay)
        weight = weight - lr * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.95**step)) + 1e-8)
        m, v = kept(m), kept(v)
    return weight


def test_moments_wait_in_bf16_and_steps_are_those_of_a_loop():
    model, lr, steps = Transformer(IN_FP8), 1e-2, 6
    before = {name: w.detach().double().numpy() for name, w in model.named_parameters()}
    optimizer = make_optimizer(model)
    for group in optimizer.param_groups:
        group["lr"] = lr
    grads = {name: [] for name in before}
    for _ in range(steps):
        for name, weight in model.named_parameters():
            weight.grad = torch.randn_like(weight) * 1e-3
            grads[name].append(weight.grad.double().numpy())
        optimizer.step()
        moments = [state[key] for state in optimizer.state.values() for key in MOMENTS]
        assert {moment.dtype for moment in moments} == {torch.bfloat16}
    for name, weight in model.named_parameters():
        assert weight.dtype == torch.float32
        given = (before[name], grads[name], lr, 0.1 * (weight.ndim > 1))
        moved = np.linalg.norm(weight.detach().numpy() - before[name])
        gap, other = (
            np.linalg.norm(weight.detach().numpy() - adamw(*given, kept)) / moved
            for kept in (to_bf16, lambda moment: moment)
        )
        # FP32 arithmetic may round a moment in 10,000 the other way; FP32 moments lie further off
        assert gap < 1e-4 < 3e-4 < other, name


MOMENTS = ("exp_avg", "exp_avg_sq")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_moments_are_fp32_in_other_precisions(precision):
    model = Transformer(replace(CFG, precision=precision))
    optimizer = make_optimizer(model)
    take_step(model, optimizer, *stream().rows(0, 4), RATES)
    assert {state[key].dtype for state in optimizer.state.values() for key in MOMENTS} == {
        torch.float32
    }


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["weight", "activation", "gradient"])
def test_what_is_not_finite_stops_fp8_training(where, poison):
    """E4M3 has no infinity: it must come through the scale of its group, in either direction."""
    model = Transformer(IN_FP8)
    layer = model.layers[0].attn.w_dkv
    optimizer, rows = make_optimizer(model), stream().rows(0, 4)
    take_step(model, optimizer, *rows, RATES)

    def spoil(x):
        spoiled = x.clone()
        spoiled[..., 0] = poison
        return spoiled

    if where == "weight":
        layer.weight.data = spoil(layer.weight.data)
    elif where == "activation":
        layer.register_forward_pre_hook(lambda _module, inputs: (spoil(inputs[0]),))
    else:
        layer.register_forward_hook(lambda _module, _in, y: y.register_hook(spoil) and None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
    with pytest.raises(FloatingPointError, match="not finite"):
        take_step(model, optimizer, *rows, RATES)
    for name, value in model.state_dict().items():
        assert torch.equal(before[name].nan_to_num(), value.nan_to_num()), name
    for state, moment in zip(optimizer.state.values(), moments, strict=True):
        assert state["exp_avg"].equal(moment)


def test_a_run_in_fp8_is_written_and_goes_on_in_fp8(tmp_path):
    """The folder holds FP32 master weights and says how they were trained."""
    run = train(Transformer(IN_FP8), stream(), schedule(3), folder=tmp_path, progress=False)
    loaded = checkpoint.load(tmp_path / "model")
    assert loaded.cfg == IN_FP8
    for one, other in zip(loaded.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(one, other)
    tokens = stream().rows(0, 4)[0]
    with torch.no_grad():
        assert loaded.losses(tokens).main.equal(run.model.eval().losses(tokens).main)
        evaluated = loaded.losses(tokens).main
        assert loaded.train().losses(tokens).main.equal(run.model.train().losses(tokens).main)
        assert not loaded.losses(tokens).main.equal(evaluated)
    again = train(Transformer(IN_FP8), stream(), schedule(3), progress=False, recompute=True)
    assert losses(again) == losses(run)


def test_micro_batches_change_fp8_gradients_by_rounding_alone():
    """Weight gradients share a scale among 128 tokens, so cuts change digits, and nothing else."""
    tokens, documents = stream().rows(0, 16)
    norms = []
    for micro_batches in (1, 2):
        model = Transformer(IN_FP8)
        line = take_step(
            model, make_optimizer(model), tokens, documents, RATES, micro_batches=micro_batches
        )
        norms.append(line["grad_norm"])
        assert line["loss"] == pytest.approx(math.log(32), abs=0.1)
    assert norms[0] != norms[1]
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


# accumulation and biases: the mistakes of guides/learning.md that live in a step


def step_by_micro_batch_mean(model, optimizer, tokens, documents, rates, micro_batches):
    """Planted mistake: the mean of micro-batch means, wrong where they have other targets."""
    for rows, marks in zip(
        tokens.chunk(micro_batches), documents.chunk(micro_batches), strict=True
    ):
        part = model.losses(rows, mask=marks)
        (part.total(rates.mtp_weight) / micro_batches).backward()


def gradient_gap(accumulate) -> float:
    """Return how far the gradient of 8 x 2 rows is from that of 1 x 16, relative to its norm."""
    tokens, documents = stream().rows(0, 16)
    grads = []
    for micro_batches in (1, 8):
        model = Transformer(CFG)
        optimizer = make_optimizer(model)
        optimizer.zero_grad = lambda: None  # the gradient is what is compared
        accumulate(model, optimizer, tokens, documents, RATES, micro_batches=micro_batches)
        grad = torch.cat([weight.grad.flatten() for weight in model.parameters()])
        grads.append(grad / max(1.0, grad.norm().item()))
    return ((grads[0] - grads[1]).norm() / grads[0].norm()).item()


def test_gradient_is_the_same_in_any_micro_batches():
    assert gradient_gap(take_step) < ROUNDING
    assert gradient_gap(step_by_micro_batch_mean) > 100 * ROUNDING


def step_with_bias_by_micro_batch(model, optimizer, tokens, documents, rates, micro_batches):
    """Planted mistake: the bias moves once a micro-batch."""
    for rows, marks in zip(
        tokens.chunk(micro_batches), documents.chunk(micro_batches), strict=True
    ):
        take_step(model, optimizer, rows, marks, rates._replace(lr=0.0))


def bias_gap(step, **options) -> float:
    """Return how far two steps with `options` leave the biases from two in one piece."""
    ends = []
    for given in ({}, options):
        model = Transformer(preset("toy"))
        optimizer = make_optimizer(model)
        for number in range(2):
            rows = stream().rows(16 * number, 16)
            step(model, optimizer, *rows, RATES._replace(lr=0.0), **{"micro_batches": 1} | given)
        ends.append(biases(model))
    return (ends[0] - ends[1]).abs().max().item()


def test_bias_updated_once_a_step_not_once_a_micro_batch():
    assert bias_gap(take_step, micro_batches=4) == 0
    assert bias_gap(step_with_bias_by_micro_batch, micro_batches=4) > 0.005


def test_bias_unaffected_by_recomputation():
    assert bias_gap(take_step, micro_batches=4, recompute=True) == 0


def test_bias_never_moves_in_evaluation():
    model = Transformer(CFG).eval()
    model.losses(stream().rows(0, 4)[0])
    model(stream().rows(0, 4)[0])
    assert not biases(model).any()


def test_bias_moves_by_gamma_towards_the_mean_load():
    model, (tokens, documents) = Transformer(CFG), stream().rows(0, 16)
    load = model.losses(tokens, mask=documents).load
    take_step(model, make_optimizer(model), tokens, documents, RATES)
    wanted = 0.01 * (load.float().mean(-1, keepdim=True) - load).sign()
    torch.testing.assert_close(biases(model), wanted)
    assert wanted.min() < 0 < wanted.max()


def test_softmax_router_without_bias_trains():
    cfg = preset("toy", score_func="softmax", group_score="max", seq_loss_alpha=0.0)
    assert len(train(Transformer(cfg), stream(), schedule(), progress=False).log) == 6


# runs


@pytest.mark.slow
def test_a_run_learns_and_two_runs_are_equal_bit_for_bit():
    long = schedule(steps=60, peak_lr=1e-2)
    one, other = (train(Transformer(CFG), stream(), long, progress=False) for _ in range(2))
    assert losses(one) == losses(other)
    assert all(
        torch.equal(a, b)
        for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True)
    )
    first, last = one.log[0]["loss"], one.log[-1]["loss"]
    assert first == pytest.approx(math.log(32), abs=0.1)
    assert last < first - 1


def test_recompute_gives_the_same_run():
    runs = [
        train(Transformer(CFG), stream(), schedule(), progress=False, recompute=recompute)
        for recompute in (False, True)
    ]
    assert losses(runs[0]) == losses(runs[1])


def test_log_says_what_each_step_did(tmp_path):
    ramp = schedule(batch=4, first_batch=2, ramp=64.0)
    run = train(Transformer(CFG), stream(), ramp, folder=tmp_path / "run", progress=False)
    lines = (tmp_path / "run/log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == run.log
    assert [line["tokens"] for line in run.log] == [16, 32, 48, 64, 96, 128, 160, 192]
    assert [line["rows"] for line in run.log] == [2, 4, 6, 8, 12, 16, 20, 24]
    rates = [ramp.rates(CFG, n, t) for n, t in enumerate([0, *(x["tokens"] for x in run.log[:-1])])]
    assert [(x["lr"], x["mtp_weight"], x["bias_speed"]) for x in run.log] == rates
    layers = CFG.n_layers - CFG.n_dense_layers + CFG.mtp_depth
    assert all(len(x["max_vio"]) == layers and x["tokens_per_s"] > 0 for x in run.log)


def test_finished_model_is_a_folder_that_loads(tmp_path):
    run = train(Transformer(CFG), stream(), schedule(), folder=tmp_path, progress=False)
    ids = stream().rows(0, 2)[0]
    assert torch.equal(checkpoint.load(tmp_path / "model")(ids), run.model.eval()(ids))


def test_from_corpus_saves_its_tokenizer(tmp_path):
    texts = [f"{n} times {n} is {n * n}, " * 5 for n in range(40)]
    corpus = Corpus(train=dict(prose=texts), heldout=dict(prose=texts[:1]))
    cfg = preset("toy", vocab_size=280)
    sizes = dict(steps=3, batch_size=2, seq_len=16, progress=False)
    run = train_from_corpus(cfg, corpus, tmp_path / "run", **sizes)
    assert [line["tokens"] for line in run.log] == [32, 64, 96]
    assert (tmp_path / "run/model/tokenizer.json").is_file()


# loss that is not finite


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(poison, tmp_path):
    """A weight goes bad behind step 4: the run names step 5, and the state of step 4 is whole."""

    class Poisoned(Packed):
        def rows(self, start, count):
            calls.append(start)
            if len(calls) == 1 + 4 * 4 + 1:  # one to know the data by, four a step
                with torch.no_grad():
                    model.head.weight[0, 0] = poison
            return super().rows(start, count)

    data, model = stream(), Transformer(CFG)
    data.__class__, calls = Poisoned, []
    with pytest.raises(FloatingPointError, match=r"step 5, seed 0, rows 16 to 19.*Try a lower"):
        train(model, data, schedule(), folder=tmp_path, save_every=2, progress=False)
    assert model.embed.isfinite().all()
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 4
    again = train(Transformer(CFG), stream(), schedule(), folder=tmp_path, progress=False)
    whole = train(Transformer(CFG), stream(), schedule(), progress=False)
    assert losses(again) == losses(whole)


def test_a_gradient_that_is_not_finite_touches_neither_weights_nor_biases():
    model = Transformer(CFG)
    model.embed.register_hook(lambda grad: grad * math.inf)
    optimizer = make_optimizer(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(FloatingPointError, match=r"gradient norm (nan|inf)"):
        take_step(model, optimizer, *stream().rows(0, 4), RATES)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not optimizer.state


# what is refused before any work


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (dict(), dict(micro_batches=3), "micro_batches must divide the batch of 4, got 3"),
        (dict(), dict(micro_batches=0), "micro_batches must divide the batch of 4, got 0"),
        (dict(), dict(save_every=0), "save_every must be at least 1, got 0"),
        (dict(max_seq_len=7), {}, r"seq_len must lie in 2..7 for this config, got 8"),
        (dict(attn="mha"), dict(folder="run"), "attn must be 'mla' to be published"),
        (dict(vocab_size=31), {}, "ids must lie in 0..30, got 0..31"),
    ],
)
def test_train_refuses(changes, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        train(
            Transformer(preset("toy", **changes)), stream(), schedule(), progress=False, **options
        )
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(steps=0), "steps must be at least 1, got 0"),
        (dict(batch_size=-4), "batch_size must be at least 1, got -4"),
        (dict(peak_lr=-1.0), "peak_lr must be a number >= 0"),
        (dict(micro_batches=5), "micro_batches must divide the batch of 16, got 5"),
        (dict(device="cuda:99"), "needs a GPU that torch can use"),
    ],
)
def test_train_from_corpus_refuses_before_it_trains_a_tokenizer(options, message, tmp_path):
    corpus = Corpus(train={}, heldout={})
    with pytest.raises(ValueError, match=message):
        train_from_corpus(preset("nano"), corpus, tmp_path / "run", progress=False, **options)
    assert not any(tmp_path.iterdir())


def test_tokenizer_larger_than_the_vocabulary_is_refused():
    from minids.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["some words, some more words"], 264)
    with pytest.raises(ValueError, match=r"vocab_size must hold the tokenizer's 264, got 32"):
        train(Transformer(CFG), stream(), schedule(), tokenizer=tokenizer, progress=False)


def test_a_file_instead_of_a_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ValueError, match=r"run is a file: name a folder"):
        train(Transformer(CFG), stream(), schedule(), folder=tmp_path / "run", progress=False)
    assert (tmp_path / "run").read_text() == "mine"
