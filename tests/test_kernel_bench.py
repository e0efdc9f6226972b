"""minids_kernels/bench and configs.py: all but CUDA's events runs here, on small matrices."""

import itertools
import json
import math
import re
import subprocess
import sys
import weakref
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import minids_kernels as kernels
import pytest
import torch
import torch.nn.functional as F
from kernel_attention import Expanded as Drawn
from kernel_attention import draw_pages, exact_expanded, exact_latent
from kernel_inputs import bits, tensors_of
from minids_kernels import (
    cards,
    configs,
    ffn_swiglu,
    loss_cross_entropy,
    loss_linear,
    mla_prefill_backward,
    moe_experts,
    norm_rms,
    rope_rotate,
    router_topk,
    train_adamw,
)
from minids_kernels.bench import (
    adamw,
    attention,
    attention_peers,
    ceilings,
    checks,
    clock,
    command,
    decode,
    experts,
    experts_bf16,
    floors,
    gemm,
    levels,
    loss,
    mla_backward,
    mla_decode,
    mla_prefill,
    norm,
    pass_peers,
    passes,
    peers,
    quantise,
    readme,
    report,
    rope,
    routed,
    router,
    stamp,
    swiglu,
    tune,
    wgrad,
)
from minids_kernels.bench.case import OURS, Case, Goal, Row, Side, Verdict
from minids_kernels.bench.floors import DATASHEETS, Rates, Work
from minids_kernels.bench.jobs import JOBS
from minids_kernels.bench.run import Bench, Report, draw, duplicate, measure, run
from minids_kernels.bench.shapes import V3, V3_EXPERTS, WEIGHTS, Attention, Experts, Weight
from torch.nn.attention import flex_attention as flex
from typer.testing import CliRunner

import minids.norm
import minids.rope
import minids.router
from minids import fp8, mla
from minids.attention import Causal
from minids.experts import grouped, scaled
from minids.formats import cores, groups
from minids.formats.groups import BLOCK, COLUMN, TILE, Scaled
from minids.fused import loss as fused_loss
from minids.fused import norm as fused_norm
from minids.fused import swiglu as fused_swiglu
from minids.loss import target_sum
from minids.serve.pages import Pages

ROOT = Path(__file__).parents[1]
H100, H200 = DATASHEETS.values()
ROUNDING = 3e-7  # FP32 sums of 256 products in another order, relative norm
SIZES = Attention(heads=3, nope=32, rope=16, value=24, latent=40)
ALIKE = mla_decode.Batch((70, 70), heads=3)
SMALL = (Weight("o", 136, 256), Weight("kv", 130, 128))  # of the second torch needs whole blocks
TINY = {
    "ceilings": partial(ceilings.cases, 2**10, 64),
    "router": partial(router.cases, (1, 5), Experts(8, 8, 16, 2), groups=4),
    "norm": partial(norm.cases, (6, 256)),
    "rope": partial(rope.cases, 5, SIZES),
    "swiglu": partial(swiglu.cases, ((3, 128), (5, 128))),
    "quantise": partial(quantise.cases, (128, 128), (3, 256), (128, 128)),
    "decode": partial(decode.cases, tokens=(1, 16), weights=SMALL),
    "wgrad": partial(wgrad.cases, tokens=256, weights=(Weight("o", 128, 144),)),
    "gemm": partial(gemm.cases, tokens=(2, 130), weights=SMALL),
    "loss": partial(loss.cases, 5, 300, 64),
    "experts": partial(experts.cases, (1, 9), Experts(128, 128, 4, 2)),
    "mla_decode": partial(
        mla_decode.cases, (ALIKE, mla_decode.Batch((65, 70, 2), 2, queries=2)), (ALIKE,), SIZES
    ),
    "mla_prefill": partial(mla_prefill.cases, ((5, 30, 35), (70,)), SIZES),
    "mla_backward": partial(mla_backward.cases, ((40,),), SIZES),
    "levels": partial(levels.cases, 24, few=5),
    "adamw": partial(adamw.cases, ((3, 40), (7,))),
    "experts_bf16": partial(experts_bf16.cases, (6,), Experts(64, 64, 4, 2)),
}
PASSES = ("norm", "rope", "swiglu", "loss")
ATTENTION = ("mla_decode", "mla_prefill", "mla_backward")
# of small results: what the kernels' own tests allow
ERRORS = {"wgrad": 1e-6, "mla_backward": 5e-3, "norm": 3e-3, "swiglu": 2.5e-3, "loss": 5e-3,
          "experts": 6e-2, "experts_bf16": 6e-3}  # fmt: skip
STAMP = {"gpu": "a card", "date": "2026-01-02T03:04:05+00:00", "commit": "c0ffee", "torch": "2",
         "triton": "3", "idle": {"clocks.sm": "1 MHz"}}  # fmt: skip


class Watch:
    """A timer that runs each call once and answers with times that were given to it."""

    def __init__(self, *times: float):
        self.times = itertools.cycle(times or (50.0,))
        self.measured: list[int] = []
        self.warmed = 0

    def measure(self, calls):
        self.measured.append(len(calls))
        for call in calls:
            call()
        us = next(self.times)
        return [us - 1, us, us + 1]

    def warm(self):
        self.warmed += 1


class Ticks:
    """A clock that goes on by a second whenever it is read."""

    def __init__(self):
        self.second = -1

    def __call__(self) -> float:
        self.second += 1
        return self.second


@pytest.fixture
def stand_ins(monkeypatch):
    """Put the references where kernels are, and compile nothing."""
    for name in ("quantise", "quantise_twice", "requantise", "dequantise"):
        monkeypatch.setattr(kernels, name, getattr(groups, name), raising=False)
    monkeypatch.setattr(kernels, "scaled_matmul", product, raising=False)
    monkeypatch.setattr(kernels, "attend_latent", attend_latent, raising=False)
    monkeypatch.setattr(kernels, "attend_expanded", attend_expanded, raising=False)
    monkeypatch.setattr(mla_prefill_backward, "gradients", gradients)
    monkeypatch.setattr(levels, "LEVELS", tuple(map(reference_of, levels.LEVELS)))
    for module, references in PASSED.items():
        for name, reference in references.items():
            monkeypatch.setattr(module, name, reference)
    compile_nothing(monkeypatch)


def reference_of(level):
    multiply = product if level.scaled else lambda a, b: a @ b.mT
    return level._replace(module=SimpleNamespace(__name__=level.name, multiply=multiply))


def compile_nothing(monkeypatch):
    """Leave functions as they are; FlexAttention, which compiles by itself, becomes a plain one."""
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    monkeypatch.setattr(attention_peers, "flex_attention", flexible)
    monkeypatch.setattr(attention_peers, "create_block_mask", seen_by_blocks)


def flexible(q, k, v, **how):
    signature(flex.flex_attention).bind(q, k, v, **how)
    return F.scaled_dot_product_attention(q, k, v, how.get("block_mask"), scale=how["scale"])


def seen_by_blocks(sees, batch, heads, queries, keys, **how):
    signature(flex.create_block_mask).bind(sees, batch, heads, queries, keys, **how)
    places = [torch.arange(n, device=how["device"]) for n in (queries, keys)]
    return sees(0, 0, places[0][:, None], places[1])


def attend_latent(q_latent, q_rope, held, mask, scale):
    return mla.attend_latent(q_latent, q_rope, Pages(*held), mask, scale)


def attend_expanded(*given):
    *parts, mask, scale = given
    return mla.attend_expanded(*parts, Causal(*mask), scale)


def gradients(do, *given):
    """Return the reference's, of the same arguments as the kernels'."""
    *parts, o, lse, mask, scale = given
    assert (o.shape, lse.shape) == (do.shape, (len(do), do.shape[2], do.shape[1]))
    leaves = [x.detach().requires_grad_() for x in parts]
    return torch.autograd.grad(attend_expanded(*leaves, mask, scale), leaves, do)


def product(a: Scaled, b: Scaled, dtype: torch.dtype = torch.float32, out=None):
    y = fp8.scaled_matmul(a, b, dtype)
    return y if out is None else out.add_(y)


def norm_gradients(d_norm, d_total, x, gain, eps):
    assert d_total is None
    leaves = [x.detach().requires_grad_(), gain.detach().requires_grad_()]
    return torch.autograd.grad(minids.norm.rms_norm(*leaves, eps), leaves, d_norm)


def rotate_both(q_rope, k_rope, phase):
    for x in (q_rope, k_rope):
        x.copy_(minids.rope.rotate(x, phase))


def in_fp32(function):
    """Kernels do not round the product to BF16 before it is quantised."""
    return lambda gate, up, *settings: function(gate.float(), up.float(), *settings)


class AdamW(torch.optim.AdamW):
    """torch's, with the moments and copies of ours."""

    def __init__(self, params, lr, betas, eps, weight_decay, *, moments, copies):
        super().__init__(params, lr, betas, eps, weight_decay)
        self.moments, self.copies = moments, copies

    def step(self):
        self.cast(torch.float32)
        super().step()
        self.cast(self.moments)
        for weight, copy in self.copies.items():
            copy.copy_(weight.detach())

    def cast(self, dtype):
        for state in self.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].to(dtype)


PASSED = {
    router_topk: {"route": minids.router.route},
    norm_rms: {
        "rms_norm": minids.norm.rms_norm,
        "add_rms_norm": fused_norm.add_rms_norm,
        "rms_norm_quantise": fused_norm.rms_norm_quantise,
        "add_rms_norm_quantise": fused_norm.add_rms_norm_quantise,
        "gradients": norm_gradients,
    },
    rope_rotate: {"rotate": minids.rope.rotate, "rotate_both": rotate_both},
    ffn_swiglu: {
        "swiglu": lambda gate, up: fused_swiglu.swiglu(gate.float(), up.float()).to(gate.dtype),
        "swiglu_quantise": in_fp32(fused_swiglu.swiglu_quantise),
        "gated_quantise": in_fp32(fused_swiglu.gated_quantise),
        "gated_backward": fused_swiglu.gated_backward,
    },
    loss_cross_entropy: {
        "cross_entropy": lambda x, targets, in_place=False: fused_loss.cross_entropy(x, targets)
    },
    loss_linear: {"target_sum": target_sum},
    moe_experts: {
        "run_experts": grouped.run_experts,
        "run_scaled_experts": scaled.run_scaled_experts,
    },
    train_adamw: {"AdamW": AdamW},
}


def bench(*times: float, **changes) -> Bench:
    given = dict(device="cpu", timer=Watch(*times), cache_bytes=0, datasheet=H100)
    return Bench(**(given | changes))  # pyright: ignore[reportArgumentType]


def run_all(jobs: dict, place: Bench) -> Report:
    found = Report(STAMP)
    for _ in run({name: list(job()) for name, job in jobs.items()}, place, found):
        pass
    return found


def case_of(check=None, **sides) -> Case:
    """Return a case on four random numbers; sides are functions of them."""
    prepared = {name: (lambda x, f=f: partial(f, x)) for name, f in sides.items()}
    inputs = lambda device: (torch.randn(4, device=device),)  # noqa: E731
    return Case("job", "a case", Work(1000), inputs, prepared, check)


def same(x: torch.Tensor) -> torch.Tensor:
    return x


def fails(x: torch.Tensor):
    raise RuntimeError("no such product\nwith a long story")


# floors, as the table of V3's shapes has them


def prefill_floor(tokens: int) -> Work:
    return floors.prefill(tokens, floors.causal_pairs([tokens]), V3)


def backward_floor(tokens: int) -> Work:
    return floors.prefill_backward(tokens, floors.causal_pairs([tokens]), V3)


def decode_floor(rows: int, cached: int, heads: int) -> Work:
    return floors.latent_decode([cached] * rows, 1, V3._replace(heads=heads))


@pytest.mark.parametrize(
    ("work", "h100", "h200", "bound"),
    [
        (floors.product(4096, 7168, 16384), 486, 486, "compute"),
        (floors.product(4096, 2112, 7168), 62.7, 62.7, "compute"),
        (floors.product(4096, 32768, 512), 85.8, 69.4, "memory, compute"),
        (floors.product(1, 7168, 16384), 35.1, 24.5, "memory"),
        (floors.product(128, 36864, 7168), 82.0, 57.2, "memory"),
        (floors.quantisation(4096, 7168, TILE), 26.6, 18.5, "memory"),
        (floors.quantisation(18432, 7168, BLOCK), 118, 82.6, "memory"),
        (floors.weight_gradient(18432, 7168, 4096), 547, 547, "compute"),
        (floors.weight_gradient(7168, 16384, 4096), 486, 486, "compute"),
        (prefill_floor(4096), 695, 695, "compute"),
        (prefill_floor(8192), 2780, 2780, "compute"),
        (prefill_floor(16384), 11_100, 11_100, "compute"),
        (backward_floor(4096), 1810, 1810, "compute"),
        (backward_floor(8192), 7230, 7230, "compute"),
        (decode_floor(128, 1024, 128), 55.7, 38.9, "memory"),
        (decode_floor(128, 4096, 128), 191, 148, "memory, compute"),
        (decode_floor(128, 8192, 128), 371, 295, "memory, compute"),
        (decode_floor(128, 4096, 16), 182, 127, "memory"),
    ],
)
def test_floors_of_v3(work, h100, h200, bound):
    assert work.us_at(H100) == pytest.approx(h100, rel=5e-3)
    assert work.us_at(H200) == pytest.approx(h200, rel=5e-3)
    found = [Row("", "", work, {}, card, Rates(), ()).bound for card in (H100, H200)]
    first, _, second = bound.partition(", ")
    assert found == [first, second or first]


def test_bytes_by_hand():
    """2 x 3 times 5 x 3 numbers: 21 codes, a scale for each row and one block, 10 BF16 sums."""
    assert floors.product(2, 5, 3) == Work(6 + 15 + 4 * (2 + 1) + 2 * 10, 60)
    assert floors.weight_gradient(2, 5, 3) == Work(6 + 15 + 4 * (2 + 5) + 8 * 10, 60)
    # 2 x 129 BF16, two scales a row; once more in two groupings, with a scale for each column
    assert floors.quantisation(2, 129, TILE) == Work(258 * 3 + 4 * 4)
    assert floors.quantisation(2, 129, TILE, COLUMN) == Work(258 * 4 + 4 * (4 + 129))


def test_attention_by_hand():
    """Two heads, 3 + 2 wide, values 4; three tokens see 1 + 2 + 3, or 1 and 1 + 2, of them."""
    sizes = Attention(heads=2, nope=3, rope=2, value=4, latent=7)
    pairs, apart = floors.causal_pairs([3]), floors.causal_pairs([1, 2])
    assert (pairs, apart) == (6, 4)
    q, k_nope, k_rope, v = 3 * 2 * 5, 3 * 2 * 3, 3 * 2, 3 * 2 * 4  # o is as large as v
    assert floors.prefill(3, pairs, sizes) == Work(
        2 * (q + k_nope + k_rope + v + v), 2 * pairs * 2 * (5 + 4), "bf16_tflops"
    )
    products = pairs * 2 * (5 + 4 + 4 + 5 + 5)  # q k, do v, p do, ds k, ds q
    assert floors.prefill_backward(3, pairs, sizes) == Work(
        2 * 2 * (q + k_nope + k_rope + v + v) + 4 * 3 * 2, 2 * products, "bf16_tflops"
    )
    # rows of 5, 1 and no latents, two queries each: they see 4 and 5, none and 1, none
    read, results = (6 * 9 + 3 * 2 * 2 * 9), 3 * 2 * 2 * 7
    assert floors.latent_decode([5, 1, 0], 2, sizes) == Work(
        2 * (read + results), 2 * (4 + 5 + 1) * 2 * (9 + 7), "bf16_tflops"
    )


def test_weight_gradients_move_a_gigabyte():
    assert floors.weight_gradient(18432, 7168, 4096).moved_bytes == pytest.approx(1.17e9, rel=5e-3)


def test_other_cards_have_no_floor():
    row = Row("", "", floors.product(2, 5, 3), {OURS: Side(us=1.0)}, Rates(), Rates(), ())
    assert row.floor_us is row.percent_of_floor is row.percent_of_ceiling is None
    assert row.bound == ""
    assert set(DATASHEETS) == {"NVIDIA H100 80GB HBM3", "NVIDIA H200"}  # SXM; PCIe and NVL differ


# rows and goals


def test_columns_by_hand():
    """3.35 MB and 1.979 GFLOP: a microsecond each by the datasheet, two by the ceilings."""
    sides = {OURS: Side(us=4.0), "other": Side(us=3.0), "absent": Side()}
    work, ceiling = Work(3_350_000, 1_979_000_000), Rates(1.675, 989.5)
    row = Row("", "", work, sides, H100, ceiling, ())
    assert row.floor_us == pytest.approx(1.0)
    assert row.percent_of_floor == row.percent_of_bandwidth == pytest.approx(25)
    assert row.percent_of_ceiling == row.percent_of_copy == pytest.approx(50)
    assert row.tflops == pytest.approx(1979 / 4)
    assert row.tb_s == pytest.approx(3.35 / 4)
    assert row.ratio("other") == 0.75
    assert row.ratio("absent") is None
    assert row.ratio("unknown") is None
    goals = [Goal("tflops", 490), Goal("tflops", 500), Goal("ratio", 0.75, "other"),
             Goal("ratio", 1.5, "absent"), Goal("percent_of_copy", 50.1)]  # fmt: skip
    assert [goal.judge(row)["reached"] for goal in goals] == [True, False, True, None, False]
    assert report.goal_text(goals[1].judge(row)) == "500 TFLOP/s: 495, NOT reached"
    assert report.goal_text(goals[2].judge(row)) == "0.75 x other: 0.75, reached"
    assert report.goal_text(goals[3].judge(row)) == "1.5 x absent: not measured"


@pytest.mark.parametrize(
    ("us", "goal", "value", "reached"),
    [  # hardly a byte and 1.979 GFLOP; below 3 us 3.35 MB, 2 us at the ceiling, and 0.66 GFLOP
        (4.0, "490 TFLOP/s (or 85 % of the measured copy)", 494.75, True),
        (5.0, "490 TFLOP/s (or 85 % of the measured copy)", 395.8, False),
        (2.2, "85 % of the measured copy (or 490 TFLOP/s)", 90.9, True),
        (2.6, "85 % of the measured copy (or 490 TFLOP/s)", 76.9, False),
        (None, "490 TFLOP/s (or 85 % of the measured copy)", None, None),
    ],
)
def test_a_goal_that_one_of_two_measures_reaches(us, goal, value, reached):
    """The value is of the one that is nearer."""
    fast = us is not None and us < 3
    work, ceiling = Work(3_350_000, 660_000_000) if fast else Work(1, 1_979_000_000), Rates(1.675)
    row = Row("", "", work, {OURS: Side(us)}, H100, ceiling, ())
    judged = Goal("tflops", 490, instead=Goal("percent_of_copy", 85)).judge(row)
    assert judged == {"goal": goal, "value": value and pytest.approx(value, 1e-3),
                      "reached": reached}  # fmt: skip


def test_a_rate_of_bytes_is_shown_with_two_digits():
    row = Row("", "", Work(3_350_000), {OURS: Side(us=1.4)}, H100, Rates(), ())
    assert report.goal_text(Goal("tb_s", 2.5).judge(row)) == "2.5 TB/s: 2.39, NOT reached"


@pytest.mark.parametrize(
    ("job", "name", "expected"),
    [
        ("mla_decode", "128 x 4096, 128 heads", {"tflops": 430, "percent_of_copy": 85}),
        ("mla_decode", "32 x 8192, 128 heads", {"tflops": 430, "percent_of_copy": 85}),
        ("mla_decode", "32 x 4096, 128 heads, 2", {"tflops": 430, "percent_of_copy": 85}),
        ("mla_decode", "128 x 32 to 8160", {"tflops": 430, "percent_of_copy": 85}),
        ("mla_decode", "128 x 8192, 16 heads", {"tb_s": 2.5}),
        ("mla_decode", "128 x 1024, 128 heads", {}),
        ("mla_decode", "1 x 8192, 128 heads", {}),
        ("mla_prefill", "4096 tokens", {"tflops": 480}),
        ("mla_prefill", "16384 tokens", {"tflops": 480}),
        ("mla_prefill", "8192 tokens, 8 documents", {}),
        ("mla_backward", "4096 tokens", {"tflops": 360}),
        ("gemm", "o, 4096", {"tflops": 950, "ratio": 0.75}),
        ("gemm", "gate + up, 4096", {"tflops": 950, "ratio": 0.75}),
        ("gemm", "q_b, 4096", {"tflops": 800, "ratio": 0.75}),
        ("gemm", "kv_b, 4096", {"tflops": 600, "ratio": 0.75}),
        ("gemm", "shared down, 4096", {"ratio": 0.75}),
        ("gemm", "o, 128", {}),
        ("decode", "o, 1 ", {"percent_of_bandwidth": 75, "ratio": 1.5}),
        ("decode", "q_b, 64 ", {"percent_of_bandwidth": 75, "ratio": 1.5}),
        ("wgrad", "gate", {"tflops": 700, "ratio": 0.75}),
        ("quantise", "1x128, 4096 x 7168", {"percent_of_copy": 90}),
        ("quantise", "128x128 to BF16", {"percent_of_copy": 90}),
        ("router", "1024", {"us": 4}),
        ("router", "4096", {}),
        ("norm", "forward, 4096", {"percent_of_copy": 90}),
        ("norm", "added and quantised", {"percent_of_copy": 90}),
        ("rope", "queries and key in place", {"percent_of_copy": 90}),
        ("swiglu", "gradients of FP8, 32768", {"percent_of_copy": 90}),
        ("loss", "forward, 4096", {"percent_of_copy": 90}),
        ("loss", "forward and gradient", {"ratio": 1}),
        ("loss", "from states", {"tflops": 550, "percent_of_memory": 10}),
        ("experts", "1 tokens", {"percent_of_bandwidth": 80}),
        ("experts", "512 tokens", {"percent_of_bandwidth": 80}),
        ("experts", "4096 tokens", {}),
        ("experts", "8192 tokens", {"percent_of_floor": 60}),
        ("experts_bf16", "forward and backward, 4096", {"ratio": 0.9}),
        ("experts_bf16", "forward, 8192", {"tflops": 400, "ratio": 0.9}),
        ("adamw", "BF16 moments", {"percent_of_copy": 90}),
    ],
)
def test_goals(job, name, expected):
    case = min((c for c in JOBS[job]() if c.name.startswith(name)), key=lambda c: len(c.name))
    goals = [goal for each in case.goals for goal in (each, each.instead) if goal]
    assert {goal.measure: goal.at_least for goal in goals} == expected
    assert {goal.peer for goal in case.goals if goal.measure == "ratio"} <= case.sides.keys()


def test_shapes_of_v3():
    """Eight weights, tokens 1, 16, 64 and 128, 4096; two gradients over 4096 tokens; and so on."""
    found = {job: [case.name for case in cases()] for job, cases in JOBS.items()}
    assert {job: len(names) for job, names in found.items()} == dict(
        ceilings=4, levels=8, quantise=7, decode=24, wgrad=2, gemm=16,
        mla_decode=20, mla_prefill=4, mla_backward=2, router=4, norm=6, rope=3, swiglu=10,
        loss=3, experts=6, experts_bf16=4, adamw=2,
    )  # fmt: skip
    assert V3 == (128, 128, 64, 128, 512)
    assert {"1 x 1024, 16 heads", "32 x 4096, 128 heads, 2 queries"} <= {*found["mla_decode"]}
    assert len({*found["mla_decode"]}) == 20
    assert "q_a + kv_a, 4096 x 2112 x 7168" in found["gemm"]
    assert "o, 64 x 7168 x 16384" in found["decode"]
    for job in ("gemm", "decode"):
        assert {name.split(",")[0] for name in found[job]} == {weight.name for weight in WEIGHTS}


@pytest.mark.parametrize("job", [job for job in JOBS if job != "ceilings"])
def test_the_largest_shapes_come_last(job):
    """Or running out of time would drop others."""
    least = [case.work.us_at(H100) for case in JOBS[job]()]
    order = [us for us in least if us is not None]
    assert order[-1] == max(order)
    if job in ("quantise", "wgrad", "mla_prefill", "mla_backward", "norm", "rope", "experts"):
        assert order == sorted(order)


# every job, on small matrices


def test_every_job_runs(stand_ins):
    found = run_all(TINY, bench(40.0, 60.0))
    assert not found.wrong
    assert not found.dropped
    for row in found.rows:
        assert row.ours.right, row
        assert row.ours.repeats == 6
        if row.job == "quantise":
            assert row.ours.note == "bit-equal"
        elif row.job != "ceilings":
            assert 0 <= row.ours.error <= ERRORS.get(row.job, 2e-3)
    assert [row.job for row in found.rows] == [job for job in TINY for _ in TINY[job]()]
    assert TINY.keys() == JOBS.keys()
    text = report.terminal(found)
    assert max(map(len, text.splitlines())) <= 100
    for row in found.rows:
        assert f"| {row.name} |" in report.markdown(found)
    saved = json.loads(json.dumps(report.as_json(found)))
    assert saved["stamp"] == STAMP
    assert {row["job"] for row in saved["rows"]} == set(TINY)
    assert all(row["percent_of_ceiling"] > 0 for row in saved["rows"] if row["job"] != "ceilings")


@pytest.mark.parametrize("job", [job for job in TINY if job != "ceilings"])
def test_every_job_runs_with_the_kernels(job, device, interpreter, monkeypatch):
    """Interpreted without a GPU; with one, the kernels and all peers that are there, untimed."""
    compile_nothing(monkeypatch)
    monkeypatch.setattr("minids_kernels.bench.run.ROUNDS", 1)  # nothing is timed
    found = run_all({job: TINY[job]}, bench(device=device))
    assert not found.wrong
    for row in found.rows:
        assert row.ours.us == 50
        assert row.ours.note == ("bit-equal" if job == "quantise" else "")


def test_ceilings_go_first_and_later_rows_know_them(stand_ins):
    place = bench(10.0, 10.0, 20.0, 20.0, 40.0, 40.0, 80.0, 80.0)  # two rounds each
    found = run_all({"gemm": TINY["gemm"], "ceilings": TINY["ceilings"]}, place)
    assert [row.job for row in found.rows[:4]] == ["ceilings"] * 4
    reached = ceilings.reached(found.rows)
    assert reached.tb_s == pytest.approx(2 * 2**10 / 10e6)
    assert reached.bf16_tflops == pytest.approx(2 * 64**3 / 20e6)
    assert reached.fp8_tflops == pytest.approx(2 * 64**3 / 40e6)  # the faster of the two
    assert found.rows[-1].ceilings == reached
    assert place.timer.warmed == 2  # pyright: ignore[reportAttributeAccessIssue]
    assert ceilings.reached([]) == Rates()


def test_each_side_is_timed_twice_in_turn_and_summarised():
    """Times 10, 20 for the first round, 30, 20 for the second; five repeats around each."""
    place = bench(10.0, 20.0, 30.0, 20.0)
    row = measure(case_of(ours=same, other=same), place, 1e9, Rates())
    assert row.ours.medians_us == [10, 30]
    assert row.sides["other"].medians_us == [20, 20]
    assert row.ours.us == 20
    assert row.ours.spread_us == 20  # of 9, 10, 11, 29, 30, 31: from 10 to 30
    assert row.sides["other"].spread_us == 2
    assert row.ours.repeats == 6


def test_inputs_rotate_through_more_than_caches_hold():
    """5 caches of 1000 bytes and a case that moves 1200: five sets of its own memory."""
    x = groups.quantise(torch.randn(128, 256), TILE)._replace(scale=torch.randn(2, 128).mT)
    case = Case("", "", Work(1200), lambda device: (x, torch.ones(2)), {OURS: lambda *x: lambda: 0})
    place = bench(cache_bytes=1000)
    drawn = draw(case, place)
    assert len(drawn) == 5
    assert len({inputs[0].values.data_ptr() for inputs in drawn}) == 5
    for inputs in drawn:
        assert inputs[0].scale.stride() == (1, 128)
        assert inputs[0].values.view(torch.uint8).equal(x.values.view(torch.uint8))
    measure(case, place, 1e9, Rates())
    assert place.timer.measured == [5, 5]  # pyright: ignore[reportAttributeAccessIssue]
    assert len(draw(case, bench())) == 1


def test_the_best_peer_is_fast_and_near_the_right_result():
    sides = {OURS: Side(us=4.0), "slow": Side(us=9.0), "bf16": Side(us=6.0, error=2.9e-3),
             "wrong": Side(us=1.0, error=0.5), "none": Side()}  # fmt: skip
    row = Row("", "", Work(1), sides, Rates(), Rates(), ())
    assert report.best_peer(row) == ("bf16", 1.5)
    assert report.best_peer(Row("", "", Work(1), {OURS: Side(us=4.0)}, H100, H100, ())) == (
        "",
        None,
    )
    assert "| 1.0 ± – (0.25, 5.0e-01) |" in report.job_table([row])


# what goes wrong is said


def test_a_peer_that_raises_is_a_line_not_an_end():
    row = measure(case_of(ours=same, bad=fails, good=same), bench(), 1e9, Rates())
    assert row.sides["bad"].note == "failed: RuntimeError: no such product"
    assert row.sides["bad"].us is None
    assert row.sides["good"].us == 50
    assert row.ours.right
    found = Report(STAMP, [row])
    assert not found.wrong
    assert "job: bad: failed: RuntimeError: no such product" in report.missing_lines(found)


def test_ours_raising_is_wrong_and_peers_are_still_timed():
    row = measure(case_of(ours=fails, good=same), bench(), 1e9, Rates())
    found = Report(STAMP, [row])
    assert found.wrong == ["job: a case: failed: RuntimeError: no such product"]
    assert row.sides["good"].us == 50
    assert "FAILED" in report.terminal(found)


def test_a_side_that_fails_while_it_is_timed_has_no_time():
    """A call that cannot be captured in a graph, say."""

    class Refuses(Watch):
        def measure(self, calls):
            if len(self.measured) == 2:
                self.measured.append(0)
                raise RuntimeError("operation not permitted when stream is capturing")
            return super().measure(calls)

    row = measure(case_of(ours=same, other=same), bench(timer=Refuses()), 1e9, Rates())
    assert row.ours.us is None
    assert row.ours.note.startswith("failed: RuntimeError: operation not permitted")
    assert Report(STAMP, [row]).wrong


def test_inputs_that_do_not_fit_are_a_line():
    case = Case("job", "huge", Work(1), lambda device: fails(torch.ones(1)), {OURS: lambda: 0})
    row = measure(case, bench(), 1e9, Rates())
    assert Report(STAMP, [row]).wrong == ["job: huge: failed: RuntimeError: no such product"]


MISTAKES = {
    "a scale is left out": lambda a, b, dtype, out=None: product(
        a._replace(scale=torch.ones_like(a.scale)), b, dtype, out
    ),
    "the last group is left out": lambda a, b, dtype, out=None: product(
        Scaled(a.values[:, :-128], a.scale[:, :-1], a.group),
        Scaled(b.values[:, :-128], b.scale[:, :-1], b.group), dtype, out,
    ),
    "the last row is not written": lambda a, b, dtype, out=None: torch.cat(
        [product(a, b, dtype, out)[:-1], torch.full((1, len(b.values)), torch.nan, dtype=dtype)]
    ),
    "what was there is not kept": lambda a, b, dtype, out=None: product(a, b, dtype),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("job", ["wgrad", "gemm"])
def test_wrong_products_are_seen(job, mistake, stand_ins, monkeypatch):
    if job == "gemm" and mistake == "what was there is not kept":
        pytest.skip("gemm adds to nothing")
    monkeypatch.setattr(kernels, "scaled_matmul", MISTAKES[mistake])
    cases = TINY["gemm"](tokens=(130,)) if job == "gemm" else TINY["wgrad"]()
    row = measure(next(cases), bench(), 1e9, Rates())
    assert re.fullmatch(r"error \S+, more than \S+", row.ours.note)
    assert not row.ours.right


def test_a_code_or_a_scale_beside_the_right_one_is_seen(stand_ins, monkeypatch):
    for part, text in (("values", "1 codes differ"), ("scale", "1 scales differ")):

        def nearly(x, *given, part=part):
            y = groups.quantise(x, *given)
            number = getattr(y, part).clone()
            number.view(torch.uint8)[-1, -4] += 1
            return y._replace(**{part: number})

        monkeypatch.setattr(kernels, "quantise", nearly)
        case = next(c for c in TINY["quantise"]() if c.name.startswith("1x128, 3 x"))
        row = measure(case, bench(), 1e9, Rates())
        assert row.ours.note == text
        assert not row.ours.right


def test_both_ends_of_large_matrices_are_compared():
    assert checks.slices(512) == [slice(0, 512)]
    assert checks.slices(4096) == [slice(0, 256), slice(3840, 4096)]
    assert checks.slices(18432 + 1) == [slice(0, 256), slice(18176, 18433)]
    x = torch.randn(1280, 128)
    right = groups.quantise_twice(x, TILE, COLUMN)
    check = partial(checks.bits, lambda x: groups.quantise_twice(x, TILE, COLUMN))
    assert check(right, x) == Verdict("bit-equal", True)
    right[1].values.view(torch.uint8)[5, 1279] ^= 1  # the turned one: row 1279, column 5
    assert check(right, x).text == "1 codes differ"
    right[1].values.view(torch.uint8)[5, 600] ^= 1  # between the ends: not looked at
    assert check(right, x).text == "1 codes differ"


def test_requantised_and_dequantised_are_compared(stand_ins, monkeypatch):
    for name, job in (("requantise", "1x128 to"), ("dequantise", "128x128 to")):
        (case,) = (case for case in TINY["quantise"]() if case.name.startswith(job))
        assert measure(case, bench(), 1e9, Rates()).ours.note == "bit-equal"

        def doubled(x, *given, name=name):
            return getattr(groups, name)(x._replace(scale=2 * x.scale), *given)

        monkeypatch.setattr(kernels, name, doubled)
        assert "differ" in measure(case, bench(), 1e9, Rates()).ours.note


def test_products_are_compared_with_fp64(stand_ins):
    a, b = groups.quantise(torch.randn(70, 200), TILE), groups.quantise(torch.randn(9, 200), BLOCK)
    exact = groups.dequantise(a).double() @ groups.dequantise(b).double().mT
    assert (checks.exact(a) @ checks.exact(b).mT - exact).norm() <= 1e-6 * exact.norm()
    y = product(a, b)
    verdict = checks.product(y, a, b)
    expected = ((y.double() - exact)[[*range(32), *range(38, 70)]].norm()) / exact.norm()
    assert verdict.error == pytest.approx(expected.item(), rel=0.5)
    assert verdict.right
    y[69, 8] *= 1.5  # in the last row
    assert not checks.product(y, a, b).right
    y[69, 8] = torch.nan
    assert not checks.product(y, a, b).right


# attention: what is drawn, and FP64


def parts_of(prompt: attention.Prompt) -> Drawn:
    return Drawn(*attention.expanded(SIZES, prompt))


@pytest.mark.parametrize("texts", [(70,), (5, 30, 35)])
def test_prompts_are_compared_with_fp64(texts, monkeypatch):
    """Against the loops that kernels are tested with; two tiles of queries, of which the last is
    ragged."""
    monkeypatch.setattr(attention, "_QUERIES", 48)
    prompt = attention.prompt(SIZES, texts, "cpu")
    o, lse = exact_expanded(parts_of(prompt), attention.causal(prompt), SIZES.scale)
    given = attention.forward(SIZES, prompt)
    assert (given.lse - lse).abs().max() <= 1e-6
    assert (given.o - o).abs().max() <= 2**-8 * o.abs().max()
    assert (given.do.shape, given.do.dtype) == (o.shape, torch.bfloat16)
    assert attention.prefill_is_right(SIZES, o, prompt).error < 1e-7
    verdict = attention.prefill_is_right(SIZES, given.o, prompt)
    assert verdict.error == pytest.approx(float((given.o - o).norm() / o.norm()), rel=1e-3)
    for place in ((0, 0, 0, 0), (0, 69, 2, 23), (0, 40, 1, 7)):
        for wrong in (o[place] + 1, math.nan):
            changed = o.clone()
            changed[place] = wrong
            verdict = attention.prefill_is_right(SIZES, changed, prompt)
            assert not verdict.right
            assert re.fullmatch(r"error \S+, more than 4.0e-03: o", verdict.text)


def test_some_heads_of_many_are_compared():
    assert attention.ends(3, 2) == [0, 1, 2]
    assert attention.ends(128, 2) == [0, 1, 126, 127]


@pytest.mark.parametrize("texts", [(70,), (5, 30, 35)])
def test_gradients_are_compared_with_fp64(texts, monkeypatch):
    """Against autograd in FP64; rotary keys summed over heads, or not."""
    monkeypatch.setattr(attention, "_QUERIES", 48)
    prompt = attention.prompt(SIZES, texts, "cpu")
    given = attention.forward(SIZES, prompt)
    leaves = [x.double().requires_grad_() for x in parts_of(prompt)]
    o = mla.attend_expanded(*leaves, Causal(*attention.causal(prompt)), SIZES.scale)
    exact = attention.Gradients(*torch.autograd.grad(o, leaves, given.do.double()))
    right = partial(attention.gradients_are_right, SIZES, of=prompt, given=given)
    assert right(exact).error < 1e-12
    a_head_each = exact.k_rope[:, :, None] * torch.tensor([0.5, 0.25, 0.25])[:, None]
    assert right(exact._replace(k_rope=a_head_each)).error < 1e-12
    for name in exact._fields:
        one = getattr(exact, name).clone()
        one.flatten()[-1] += one.norm() / 50
        verdict = right(exact._replace(**{name: one}))
        assert verdict.text == f"error 2.0e-02, more than 1.0e-02: d{name}"
        one.flatten()[0] = math.nan
        assert not right(exact._replace(**{name: one})).right


def test_batches_are_compared_with_fp64():
    """On a cache that has NaN wherever nothing is held."""
    pages = Pages(*draw_pages((65, 2, 70), 56, torch.bfloat16))
    q = attention.Queries(*(torch.randn(3, 2, 3, width).bfloat16() for width in (40, 16)))
    o, _ = exact_latent(*q, pages, SIZES.scale)
    assert attention.decode_is_right(SIZES, o, q, pages).error < 1e-12
    for place in ((0, 0, 0, 0), (2, 1, 2, 39)):
        changed = o.clone()
        changed[place] += 1
        assert not attention.decode_is_right(SIZES, changed, q, pages).right


def test_batches_lie_in_pages_out_of_order():
    """Every page is used once; the last one of a row in part."""
    lengths = mla_decode.ragged(16, 100)
    assert sorted(lengths) == [100 * (2 * n + 1) // 16 for n in range(16)]
    assert lengths[:3] == (6, 93, 181)
    q, pages = attention.cached(SIZES, lengths, 2, "cpu")
    assert q.latent.shape == (16, 2, 3, 40)
    assert q.rope.shape == (16, 2, 3, 16)
    used = [-(-n // 64) for n in lengths]
    held = [int(number) for row, n in zip(pages.table, used, strict=True) for number in row[:n]]
    assert sorted(held) == list(range(len(pages.store)))
    assert held != sorted(held)
    assert pages.lengths.tolist() == list(lengths)
    assert {x.dtype for x in (*q, pages.store)} == {torch.bfloat16}


ATTENTION_MISTAKES = {
    "mla_decode": {
        "a page out of order": lambda q, r, held, mask, scale: attend_latent(
            q, r, held._replace(table=held.table.flip(1)), mask, scale
        ),
        "the last latent is not seen": lambda q, r, held, mask, scale: attend_latent(
            q, r, held._replace(lengths=held.lengths - 1), mask, scale
        ),
        "another scale": lambda q, r, held, mask, scale: attend_latent(
            q, r, held, mask, 1.1 * scale
        ),
        "no rotary part": lambda q, r, held, mask, scale: attend_latent(
            q, 0 * r, held, mask, scale
        ),
    },
    "mla_prefill": {
        "documents are not kept apart": lambda *given: attend_expanded(
            *given[:5], given[5]._replace(documents=None), given[6]
        ),
        "the next key is seen": lambda *given: attend_expanded(
            *given[:5], given[5]._replace(start=given[5].start + 1), given[6]
        ),
        "another scale": lambda *given: attend_expanded(*given[:6], 1.1 * given[6]),
    },
    "mla_backward": {
        "another gradient of weights": lambda do, *given: gradients(1.1 * do, *given),
        "rotary keys of one head alone": lambda do, *given: tuple(
            x / 3 if n == 3 else x for n, x in enumerate(gradients(do, *given))
        ),
        "the last token is not written": lambda do, *given: tuple(
            torch.cat([x[:, :-1], 0 * x[:, :1]], 1) for x in gradients(do, *given)
        ),
    },
}


@pytest.mark.parametrize(
    ("job", "mistake"), [(job, name) for job, wrong in ATTENTION_MISTAKES.items() for name in wrong]
)
def test_wrong_attention_is_seen(job, mistake, stand_ins, monkeypatch):
    module, name = {
        "mla_decode": (kernels, "attend_latent"),
        "mla_prefill": (kernels, "attend_expanded"),
        "mla_backward": (mla_prefill_backward, "gradients"),
    }[job]
    monkeypatch.setattr(module, name, ATTENTION_MISTAKES[job][mistake])
    found = run_all({job: TINY[job]}, bench())
    notes = [row.ours.note for row in found.rows if not row.ours.right]
    assert notes
    assert all(re.fullmatch(r"error \S+, more than \S+: .*", note) for note in notes)


# the other jobs: what a wrong kernel looks like


def doubled(function):
    """Return a function whose first result is twice as large."""

    def wrong(*given):
        result = function(*given)
        if isinstance(result, torch.Tensor):
            return 2 * result
        if isinstance(result, Scaled):
            return result._replace(scale=2 * result.scale)
        return type(result)((doubled(lambda: result[0])(), *result[1:]))

    return wrong


def last_row_lost(function):
    """Return a function that leaves NaN where its last row should be."""

    def wrong(*given, **how):
        result = function(*given, **how).clone()
        result[-1] = math.nan
        return result

    return wrong


PASS_MISTAKES = {
    "norm": {
        (norm_rms, "rms_norm"): lambda x, gain, eps: minids.norm.rms_norm(x, gain, eps + 0.1),
        (norm_rms, "add_rms_norm"): lambda x, y, gain, eps: (
            x + y, minids.norm.rms_norm(x, gain, eps)
        ),
        (norm_rms, "gradients"): lambda *given: norm_gradients(1.05 * given[0], *given[1:]),
        (norm_rms, "rms_norm_quantise"): doubled(fused_norm.rms_norm_quantise),
        (norm_rms, "add_rms_norm_quantise"): lambda x, y, gain, eps, form, floor: (
            x + y, fused_norm.rms_norm_quantise(x + 0.9 * y, gain, eps, form, floor)
        ),
    },
    "rope": {
        (rope_rotate, "rotate"): lambda x, phase: minids.rope.rotate(x, phase.conj()),
        (rope_rotate, "rotate_both"): lambda q, k, phase: q.copy_(minids.rope.rotate(q, phase)),
    },
    "swiglu": {
        (ffn_swiglu, "swiglu"): last_row_lost(fused_swiglu.swiglu),
        (ffn_swiglu, "swiglu_quantise"): lambda gate, up, form, floor: fused_swiglu.swiglu_quantise(
            up.float(), gate.float(), form, floor
        ),
        (ffn_swiglu, "gated_quantise"): lambda gate, up, *how: (
            *fused_swiglu.gated_quantise(gate.float(), up.float(), *how)[:2],
            groups.quantise(gate),
        ),
        (ffn_swiglu, "gated_backward"): lambda dy, *given: fused_swiglu.gated_backward(
            1.01 * dy, *given
        ),
    },
    "loss": {
        (loss_cross_entropy, "cross_entropy"): lambda x, targets, in_place=False: (
            fused_loss.cross_entropy(1.01 * x, targets)
        ),
        (loss_linear, "target_sum"): lambda x, w, targets: target_sum(x, w, targets.flip(0)),
    },
    "router": {
        (router_topk, "route"): lambda *given: minids.router.route(*given)._replace(
            load=torch.zeros(16, dtype=torch.int64)
        ),
    },
    "experts": {
        (moe_experts, "run_scaled_experts"): lambda x, gate, ids, *w: scaled.run_scaled_experts(
            x, gate, ids.flip(1), *w
        ),
    },
    "experts_bf16": {
        (moe_experts, "run_experts"): lambda x, gate, ids, *w: grouped.run_experts(
            x, gate**1.1, ids, *w
        ),
    },
    "adamw": {
        (train_adamw, "AdamW"): lambda params, lr, betas, eps, decay, **how: AdamW(
            params, lr, betas[::-1], eps, decay, **how
        ),
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("job", "place"), [(job, place) for job, wrong in PASS_MISTAKES.items() for place in wrong],
    ids=lambda x: x if isinstance(x, str) else x[1],
)  # fmt: skip
def test_wrong_passes_are_seen(job, place, stand_ins, monkeypatch):
    """All cases that call what is wrong, and no others."""
    called, (module, name) = [], place

    def spy(*given, **how):
        called.append(len(given))
        return PASS_MISTAKES[job][place](*given, **how)

    monkeypatch.setattr(module, name, spy)
    rows = []
    for case in TINY[job]():
        called.clear()
        row = measure(case, bench(), 1e9, Rates())
        rows += [row] if called else []
        assert row.ours.right != bool(called), (row.name, row.ours.note)
    assert rows
    assert not [row for row in rows if row.ours.note.startswith("failed")]


def test_a_step_that_forgets_a_moment_or_a_copy_is_seen(stand_ins):
    (of,) = adamw.drawn(((3, 40),), torch.bfloat16, "cpu")
    result = adamw.by_us(torch.bfloat16, True, duplicate((of,))[0])()
    assert adamw.is_near(result, of).right
    for n, name in enumerate(("the step", "first moment", "second moment", "copy")):
        wrong = [tuple(1.05 * x for x in part) if n == m else part for m, part in enumerate(result)]
        assert adamw.is_near(tuple(wrong), of).text.endswith(f": {name}")


def test_routing_is_compared_token_by_token():
    logit, bias = router.drawn(2000, Experts(8, 8, 16, 2), "cpu")
    how = (4, 2, 2, 2, True, 2.5)
    found = minids.router.route(logit, bias, *how)
    assert router.is_right(how, found, logit, bias).error < 1e-6
    assert router.is_right(how, router.by_topk(logit, bias, *how), logit, bias).right
    for n, right in ((2, True), (3, False)):  # two of 2000 may have found near experts equal
        ids = found.ids.clone()
        ids[:n] = (ids[:n] + 1) % 16
        changed = found._replace(ids=ids, load=ids.flatten().bincount(minlength=16))
        assert router.is_right(how, changed, logit, bias).right == right
    gate = found.gate.clone()
    gate[0, 0] = math.nan
    assert not router.is_right(how, found._replace(gate=gate), logit, bias).right


def test_experts_are_chosen_before_there_is_a_gpu():
    """And counted: the floor reads the weights of those alone."""
    ids = routed.chosen(32, V3_EXPERTS)
    assert ids.shape == (32, 8)
    assert all(len(row.unique()) == 8 for row in ids)
    assert routed.active(32, V3_EXPERTS) == len(ids.unique())
    assert routed.active(32, V3_EXPERTS) == pytest.approx(floors.active_experts(32, 256, 8), abs=8)
    for n, us in ((1, 105), (512, 3400), (8192, 3870)):
        (case,) = experts.cases((n,))
        assert case.work.us_at(H100) == pytest.approx(us, rel=5e-3)
    forward, _, both, _ = experts_bf16.cases()
    assert forward.work.us_at(H100) == pytest.approx(7090, rel=5e-3)
    assert both.work.us_at(H200) == pytest.approx(4950 + 9900, rel=2e-2)


def test_weights_are_shared_by_all_sides():
    """Copies of 11 and 23 GB would not fit."""
    of, weights = experts.drawn(2, Experts(128, 128, 4, 2), "cpu")
    copied = duplicate((of, weights))
    assert copied[1] is weights
    assert copied[0].x.data_ptr() != of.x.data_ptr()
    assert weights.wide is weights.wide
    exact = groups.dequantise(weights.gate_up, torch.bfloat16)
    assert weights.wide.gate_up.equal(exact)


def test_bytes_of_passes_by_hand():
    """Floors of the table of V3's shapes, from what each case moves."""
    found = {f"{job}: {c.name}": c.work.us_at(H100) for job in PASSES for c in JOBS[job]()}
    found |= {f"adamw: {case.name}": case.work.us_at(H100) for case in JOBS["adamw"]()}
    for name, us in {
        "norm: quantised, 4096 x 7168": 26.6, "norm: forward, 4096 x 7168": 35,
        "norm: gradients, 4096 x 7168": 53, "norm: added and quantised, 4096 x 7168": 62,
        "swiglu: forward, 4096 x 18432": 135, "swiglu: quantised, 4096 x 18432": 113,
        "swiglu: quantised, 32768 x 2048": 101, "loss: forward, 4096 x 129280": 316,
        "loss: forward and gradient in place, 4096 x 129280": 632,
        "loss: from states, forward and backward, 4096 x 129280": 23_000,
        "adamw: BF16 moments and copy, 9.98e+08 weights": 6600,
        "adamw: FP32, 9.98e+08 weights": 8400,
    }.items():  # fmt: skip
        assert found[name] == pytest.approx(us, rel=1.2e-2), name


# goals of time and of memory


def test_goals_of_which_less_is_better():
    sides = {OURS: Side(us=3.9, scratch_bytes=90)}
    row = Row("", "", Work(1), sides, H100, Rates(), (), memory_bytes=1000)
    judged = Goal("us", 4).judge(row)
    assert judged == {"goal": "4 µs at most", "value": 3.9, "reached": True}
    assert not Goal("us", 3.8).judge(row)["reached"]
    memory = Goal("percent_of_memory", 10)
    assert memory.judge(row)["value"] == 9
    assert memory.judge(row)["reached"]
    assert report.goal_text(Goal("percent_of_memory", 8).judge(row)) == (
        "8 % of all logits' memory at most: 9, NOT reached"
    )
    row.sides[OURS] = Side()
    assert Goal("us", 4).judge(row)["reached"] is None
    assert memory.judge(row)["reached"] is None


def test_memory_beside_results_is_measured_where_a_case_asks(monkeypatch):
    """Of the second call: 700 bytes at most, of which the result keeps 300."""
    calls = []
    counted = {
        "is_available": lambda: True, "synchronize": lambda: None,
        "reset_peak_memory_stats": lambda: calls.append("reset"),
        "max_memory_allocated": lambda: 700, "memory_allocated": lambda: 300,
    }  # fmt: skip
    for name, function in counted.items():
        monkeypatch.setattr(torch.cuda, name, function)
    case = case_of(ours=lambda x: calls.append("call") or x)
    assert measure(case, bench(), 1e9, Rates()).ours.scratch_bytes is None
    assert "reset" not in calls
    calls.clear()
    row = measure(replace(case, memory_bytes=8000), bench(), 1e9, Rates())
    assert calls[:3] == ["call", "reset", "call"]
    assert row.ours.scratch_bytes == 400
    assert row.percent_of_memory == 5
    assert row.as_json()["percent_of_memory"] == 5


def test_tiny_inputs_have_a_bounded_number_of_copies():
    assert len(draw(case_of(ours=same), bench(cache_bytes=2**30))) == clock.COPIES


def test_a_peer_that_is_as_wrong_as_we_are_counts():
    """Experts in FP8: all that quantise are 4e-2 from what does not."""
    sides = {OURS: Side(us=4.0, error=4e-2), "fp8": Side(us=6.0, error=4.2e-2),
             "wrong": Side(us=1.0, error=0.5)}  # fmt: skip
    row = Row("", "", Work(1), sides, Rates(), Rates(), ())
    assert report.best_peer(row) == ("fp8", 1.5)


# peers of passes, with the arguments that their packages document


class Liger:
    """Functions of liger_kernel.transformers.functional."""

    @staticmethod
    def liger_rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):
        return minids.norm.rms_norm(X, W, eps)

    @staticmethod
    def liger_fused_add_rms_norm(X, R, W, eps, offset=0.0, casting_mode="llama", in_place=True):
        return fused_norm.add_rms_norm(X, R, W, eps)[::-1]

    @staticmethod
    def liger_swiglu(a, b):
        return fused_swiglu.swiglu(a, b)

    @staticmethod
    def liger_cross_entropy(input, target, weight=None, size_average=None, ignore_index=-100,
                            reduce=None, reduction="mean"):  # fmt: skip
        return F.cross_entropy(input.float(), target, reduction=reduction)

    @staticmethod
    def liger_fused_linear_cross_entropy(input, weight, target, bias=None, ce_weight=None,
                                         ignore_index=-100, lse_square_scale=0.0,
                                         label_smoothing=0.0, reduction="mean"):  # fmt: skip
        assert reduction == "sum"
        return target_sum(input, weight, target)


def linear_cross_entropy(e, c, targets, bias=None, ignore_index=-100, softcap=None,
                         reduction="mean"):  # fmt: skip
    assert reduction == "sum"
    return target_sum(e, c, targets)


class FlaLoss:
    def __init__(self, reduction="mean", inplace_backward=False):
        assert (reduction, inplace_backward) == ("sum", True)

    def __call__(self, input, target):
        return fused_loss.cross_entropy(input, target)


class FlaLinearLoss:
    def __init__(self, num_chunks=8, reduction="mean"):
        assert reduction == "sum"

    def __call__(self, x, target, weight, bias=None):
        return target_sum(x, weight, target)


def rotary_embedding(x, cos, sin, interleaved=False, inplace=False):
    assert interleaved
    assert (x.dtype, x.ndim, cos.ndim) == (cos.dtype, 4, 2)
    assert cos.is_contiguous()
    return minids.rope.rotate(x, torch.complex(cos.float(), sin.float())[None])


MODULES = {
    pass_peers._LIGER: Liger,
    "cut_cross_entropy": SimpleNamespace(linear_cross_entropy=linear_cross_entropy),
    "fla.modules.fused_cross_entropy": SimpleNamespace(FusedCrossEntropyLoss=FlaLoss),
    "fla.modules.fused_linear_cross_entropy": SimpleNamespace(
        FusedLinearCrossEntropyLoss=FlaLinearLoss
    ),
    "fla.modules.rotary": SimpleNamespace(rotary_embedding=rotary_embedding),
}
INSTALLED = {
    "norm": {pass_peers.LIGER: 3, pass_peers.TORCHAO: 1, pass_peers.TORCH: 2},
    "rope": {pass_peers.FLA: 2},
    "swiglu": {pass_peers.LIGER: 4, pass_peers.TORCHAO: 1},
    "loss": {pass_peers.LIGER: 2, pass_peers.FLA: 2, pass_peers.CUT: 1, pass_peers.TORCH: 2},
}


@pytest.mark.parametrize("job", PASSES)
def test_peers_of_passes_are_called_as_they_want(job, stand_ins, monkeypatch):
    """Their packages are there for this test alone."""
    for name, module in (*MODULES.items(), (peers._TORCHAO, Torchao)):
        monkeypatch.setitem(sys.modules, name, module)
    found = sides_of(job)
    for name, n in INSTALLED[job].items():
        assert len(found[name]) == n
        for side in found[name]:
            assert side.us == 50, side.note
            assert side.error is None or side.error <= 1e-2, side.note
            # torchao's input is rounded before, torch's SwiGLU, which liger's is here, once more
            assert side.right or name == pass_peers.TORCHAO or side.error <= 3e-3, side.note


def test_packages_of_passes_that_are_not_here_are_lines(stand_ins):
    notes = {side.note for job in PASSES for name, sides in sides_of(job).items() for side in sides
             if name in (pass_peers.LIGER, pass_peers.FLA, pass_peers.CUT)}  # fmt: skip
    assert notes == {f"not installed: {name}" for name in ("liger_kernel", "fla",
                                                          "cut_cross_entropy")}  # fmt: skip


def test_forward_and_backward_are_one_call_and_leave_their_inputs():
    x, y, dy = (torch.randn(3, 4) for _ in range(3))
    both = passes.trained(lambda a, b, power: a * b**power, 2)(x, y, dy)
    for found, expected in zip(both(), (x * y**2, dy * y**2, 2 * dy * x * y), strict=True):
        torch.testing.assert_close(found, expected)
    assert not x.requires_grad
    assert all(map(torch.equal, both(), both()))


# time


def test_what_the_time_does_not_reach_is_named():
    """Each look at the clock is a second: the first case starts in time, its peer does not."""
    case = case_of(ours=same, other=same)
    found = run_all({"job": lambda: [case, case, case]}, bench(total_s=3, now=Ticks()))
    assert len(found.rows) == 1
    assert found.rows[0].ours.us == 50
    assert found.rows[0].sides["other"].note == "dropped, the job's time was over"
    assert found.dropped == ["job: a case"] * 2
    text = report.markdown(found)
    assert "- job: a case: dropped, the job's time was over" in text
    assert "- job: other: dropped" in text


def test_a_job_leaves_its_time_to_those_behind_it_up_to_a_limit(monkeypatch):
    def deadlines(total_s: float, jobs: int) -> list[float]:
        seen: list[float] = []
        second = [0.0]

        def spy(case, place, deadline, reached):
            seen.append(deadline - second[0])
            second[0] += 10  # what a job takes, whatever its share
            return Row("", "", Work(1), {OURS: Side()}, Rates(), Rates(), ())

        monkeypatch.setattr("minids_kernels.bench.run.measure", spy)
        listed = {str(n): [case_of(ours=same)] for n in range(jobs)}
        for _ in run(listed, bench(total_s=total_s, now=lambda: second[0]), Report(STAMP)):
            pass
        return seen

    assert deadlines(100, 4) == [25, 30, 40, 70]
    assert deadlines(1000, 2) == [150, 150]  # any job alone ends in 3 minutes


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (KeyboardInterrupt(), 130, "interrupted by the user"),
        (RuntimeError("CUDA error\nwith advice"), 1, "the GPU stopped: CUDA error"),
    ],
)
def test_what_was_measured_until_a_stop_is_kept(error, code, reason, tmp_path, capsys):
    class Stops(Watch):
        def warm(self):
            if self.warmed:
                raise error
            super().warm()

    found, out = Report(STAMP), tmp_path / "new" / "folder"
    jobs = {"job": [case_of(ours=same)], "next": [case_of(ours=same)]}
    assert command.follow(jobs, bench(timer=Stops()), found, out) == code
    assert sorted(path.name for path in out.iterdir()) == ["bench.json", "bench.md"]
    saved = json.loads((out / "bench.json").read_text())
    assert saved["stopped"] == reason
    assert [row["job"] for row in saved["rows"]] == ["job"]
    assert f"**Not complete: {reason}.**" in (out / "bench.md").read_text()
    assert f"{reason}; what was measured until then is kept" in capsys.readouterr().err


def test_files_are_there_after_each_case(tmp_path):
    found, seen = Report(STAMP), []

    def looks(x):
        path = tmp_path / "bench.json"
        seen.append(len(json.loads(path.read_text())["rows"]) if path.exists() else 0)

    jobs = {"job": [case_of(ours=same), case_of(ours=looks)]}
    assert command.follow(jobs, bench(), found, tmp_path) == 0
    assert set(seen) == {1}


def test_wrong_results_make_the_exit_code_1(tmp_path, capsys):
    verdict = Verdict("error 1", False, 1.0)
    case = case_of(ours=same, check=lambda result, x: verdict)
    assert command.follow({"job": [case]}, bench(), Report(STAMP), tmp_path) == 1
    assert "WRONG: job: a case: error 1" in capsys.readouterr().err
    assert "WRONG: error 1" in (tmp_path / "bench.md").read_text()


# peers


def on_meta(rows: int, cols: int, group: tuple[int, int]) -> Scaled:
    scale = torch.empty(groups.scale_shape((rows, cols), group), device="meta")
    return Scaled(torch.empty(rows, cols, dtype=torch.float8_e4m3fn, device="meta"), scale, group)


@pytest.mark.parametrize("m", [1, 16, 64, 128, 4096])
@pytest.mark.parametrize("weight", WEIGHTS, ids=lambda weight: weight.name)
def test_torch_takes_the_operands_of_scaled_mm(weight, m):
    """Its checks of shapes and strides run on tensors without memory."""
    a, b = on_meta(m, weight.k, TILE), on_meta(weight.n, weight.k, BLOCK)
    y = peers.scaled_mm(a, b)()
    assert y.dtype == torch.bfloat16
    assert y.shape[0] - m in range(4)
    assert y.shape[1] - weight.n in range(128)
    assert peers.cublas(a, b)().shape == (m, weight.n)


@pytest.mark.parametrize("weight", wgrad.LAYERS, ids=lambda weight: weight.name)
def test_torch_takes_the_operands_of_weight_gradients(weight):
    a, b = (on_meta(4096, width, COLUMN).mT for width in weight[1:])
    total = torch.empty(weight[1:], device="meta")
    assert peers.scaled_mm_added(a, b, total)() is total
    assert peers.cublas_added(a, b, total)() is total


def test_torch_takes_the_operands_of_the_ceilings():
    for case in ceilings.cases():
        (side,) = case.sides.values()
        if case.name != ceilings.COPY:
            dtype = torch.bfloat16 if "BF16" in case.name else torch.float8_e4m3fn
            a, b = (torch.empty(8192, 8192, dtype=dtype, device="meta") for _ in range(2))
            assert side(a, b)().shape == (8192, 8192)


def test_scaled_mm_is_given_the_reference_product():
    """What it gets, multiplied by the reference, is the product of what we get."""
    a, b = groups.quantise(torch.randn(3, 256)), groups.quantise(torch.randn(130, 256), BLOCK)
    x, y, x_scale, x_kind, y_scale, y_kind = peers.scaled_mm(a, b).args
    assert (x_kind, y_kind) == (F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128)
    found = fp8.scaled_matmul(Scaled(x, x_scale, TILE), Scaled(y.mT, y_scale.mT[:, :2], BLOCK))
    assert found.shape == (4, 256)
    expected = fp8.scaled_matmul(a, b)
    assert (found[:3, :130] - expected).norm() <= ROUNDING * expected.norm()
    assert cores.arguments(a, b)[0].shape == (4, 256)


def test_torchao_is_not_here_and_that_is_a_line(stand_ins):
    assert "torchao" not in sys.modules
    row = measure(next(TINY["gemm"]()), bench(), 1e9, Rates())
    assert row.sides[peers.TORCHAO].note == "not installed: torchao"
    assert row.ours.right


def column_major(x: torch.Tensor) -> bool:
    return x.stride(0) == 1 and x.stride(1) > 1


class Torchao:
    """torchao's checks of layouts, and right results."""

    @staticmethod
    def triton_fp8_gemm_1x128_128x128(a, b, a_s, b_s, block_size, out_dtype):
        assert a.is_contiguous()
        assert column_major(b)
        assert column_major(a_s)
        assert column_major(b_s)
        assert block_size == 128
        return product(Scaled(a, a_s, TILE), Scaled(b.mT, b_s.mT, BLOCK), out_dtype)

    @staticmethod
    def triton_fp8_gemm_1x128_128x1(a, b, a_s, b_s, block_size, out_dtype):
        assert a.is_contiguous()
        assert column_major(b)
        assert column_major(a_s)
        assert b_s.is_contiguous()
        return product(Scaled(a, a_s, TILE), Scaled(b.mT, b_s.mT, TILE), out_dtype)

    @staticmethod
    def triton_fp8_blockwise_act_quant_lhs(x):
        assert x.is_contiguous()
        return groups.quantise(x)[:2]

    @staticmethod
    def triton_fp8_blockwise_weight_quant_transposed_rhs(x):
        values, scale, _ = groups.quantise(x, BLOCK).mT
        return values, scale


@pytest.mark.parametrize("job", ["quantise", "decode", "gemm", "wgrad"])
def test_torchao_is_called_as_it_wants(job, stand_ins, monkeypatch):
    monkeypatch.setitem(sys.modules, peers._TORCHAO, Torchao)
    real = peers.importlib.import_module
    monkeypatch.setattr(peers.importlib, "import_module",
                        lambda name: Torchao if name == peers._TORCHAO else real(name))  # fmt: skip
    weights = (Weight("o", 256, 256),)  # at two blocks "column-major" says something
    small = {"decode": dict(weights=weights), "gemm": dict(weights=weights)}
    rows = run_all({job: partial(TINY[job], **small.get(job, {}))}, bench()).rows
    sides = [row.sides[peers.TORCHAO] for row in rows if peers.TORCHAO in row.sides]
    assert sides
    for side in sides:
        assert side.right, side.note
        assert side.us == 50


def test_the_reference_is_compiled_where_it_says_most(stand_ins, monkeypatch):
    compiled = []

    def spy(function, dynamic):
        compiled.append((function.__name__, dynamic))
        return function

    monkeypatch.setattr(torch, "compile", spy)
    rows = run_all({"quantise": TINY["quantise"], "gemm": TINY["gemm"]}, bench()).rows
    with_it = [row for row in rows if peers.COMPILED in row.sides]
    assert all(row.sides[peers.COMPILED].right for row in with_it)
    names = {name for name, dynamic in compiled if not dynamic}
    assert names == {"quantise", "dequantise", "scaled_matmul"}
    assert [row.name for row in with_it if row.job == "quantise"] == [
        "1x128, 128 x 128", "1x128, 3 x 256", "128x128, 128 x 128", "128x128 to BF16, 128 x 128",
    ]  # fmt: skip
    assert [row.name for row in with_it if row.job == "gemm"] == ["o, 130 x 136 x 256"]


# peers of attention


def sides_of(job: str) -> dict[str, list[Side]]:
    """Return the sides of a small job by name, of all its cases."""
    found: dict[str, list[Side]] = {}
    for row in run_all({job: TINY[job]}, bench()).rows:
        for name, side in row.sides.items():
            found.setdefault(name, []).append(side)
    return found


@pytest.mark.parametrize("job", ATTENTION)
def test_peers_of_attention_are_right_or_say_why_not(job, stand_ins):
    """Without a GPU torch has two backends; the one for equal widths refuses ours."""
    sides = sides_of(job)
    right = ["SDPA math", "FlexAttention", *(n for n in sides if n.startswith("torch absorbed"))]
    for name in right:
        for side in sides[name]:
            assert side.right, (name, side.note)
            assert side.us == 50
    for side in sides["SDPA flash"]:
        assert side.note.startswith("failed: RuntimeError: refused: Flash attention requires q,k,v")
        assert "Triggered" not in side.note
    for name in ("SDPA cuDNN", "SDPA efficient"):
        assert all("failed: RuntimeError: No viable backend" in side.note for side in sides[name])
    if job != "mla_backward":
        assert {side.note for side in sides["flashinfer"]} == {"not installed: flashinfer"}


@pytest.mark.parametrize(
    ("job", "compiled", "all_scores"),
    [
        ("mla_decode", ["128 x 4096, 16 heads", "128 x 4096, 128 heads"], None),
        (
            "mla_prefill",
            ["8192 tokens, 8 documents", "4096 tokens", "8192 tokens"],
            ["4096 tokens"],
        ),
        ("mla_backward", ["4096 tokens"], ["4096 tokens"]),
    ],
)
def test_what_takes_long_or_much_memory_has_few_cases(job, compiled, all_scores):
    sides = {case.name: set(case.sides) for case in JOBS[job]()}

    def where(side: str) -> set[str]:
        return {name for name, found in sides.items() if side in found}

    assert where("FlexAttention") == set(compiled)
    assert where("SDPA math") == set(all_scores or sides)
    assert where("torch absorbed, compiled") == set(compiled if job == "mla_decode" else ())
    for name in ("SDPA cuDNN", "SDPA flash", "SDPA efficient"):
        assert where(name) == sides.keys()


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("no such product"), "no such product"),
        (torch.OutOfMemoryError("CUDA out of memory"), "CUDA out of memory"),
    ],
)
def test_other_errors_than_refusals_keep_their_text(error, text):
    def call():
        raise error

    with pytest.raises(type(error), match=f"^{text}$"):
        attention_peers._or_reasons(call)


def test_flex_decodes_where_every_latent_is_seen(stand_ins):
    batch = attention.cached(SIZES, (70, 65), 1, "cpu")
    with pytest.raises(ValueError, match="where rows are equally long"):
        attention_peers.flex_decode(SIZES, *batch)


def test_copies_keep_what_inputs_are():
    """Tuples of tensors, and what is no tensor in them."""
    x = groups.quantise(torch.randn(128, 256), TILE)
    inputs = (attention.prompt(SIZES, (3,), "cpu"), x)
    copies = duplicate(inputs)
    assert copies[0].documents is None
    assert copies[1].group == TILE
    for one, other in zip(tensors_of(inputs), tensors_of(copies), strict=True):
        assert one.data_ptr() != other.data_ptr()
        assert bits(one).equal(bits(other))


class LatentWrapper:
    """flashinfer's arguments, as it documents them, and right results."""

    def __init__(self, float_workspace_buffer, use_cuda_graph=False, backend="auto"):
        assert float_workspace_buffer.nbytes == 128 * 2**20

    def plan(self, qo_indptr, kv_indptr, kv_indices, kv_len_arr, num_heads, head_dim_ckv,
             head_dim_kpe, page_size, causal, sm_scale, q_data_type, kv_data_type):  # fmt: skip
        assert {x.dtype for x in (qo_indptr, kv_indptr, kv_indices, kv_len_arr)} == {torch.int32}
        assert (head_dim_ckv, head_dim_kpe, page_size) == (40, 16, 64)
        assert q_data_type == kv_data_type == torch.bfloat16
        assert len(kv_indices) == kv_indptr[-1]
        self.given = (qo_indptr, kv_indptr, kv_indices, kv_len_arr, causal, sm_scale)

    def run(self, q_nope, q_pe, ckv_cache, kpe_cache):
        starts, pages, indices, lengths, causal, scale = self.given
        q, cache = torch.cat([q_nope, q_pe], -1), torch.cat([ckv_cache, kpe_cache], -1)
        z = torch.empty_like(q_nope)
        for row, length in enumerate(lengths.tolist()):
            held = cache[indices[pages[row] : pages[row + 1]]].flatten(0, 1)[:length].float()
            first, end = starts[row : row + 2].tolist()
            for t in range(first, end):
                seen = held[: length - (end - 1 - t if causal else 0)]
                weight = (q[t].float() @ seen.mT * scale).softmax(-1)
                z[t] = (weight @ seen[:, : z.shape[-1]]).to(z.dtype)
        return z


class RaggedWrapper:
    """The same for texts behind each other."""

    def __init__(self, float_workspace_buffer, kv_layout="NHD"):
        assert kv_layout == "NHD"

    def plan(self, qo_indptr, kv_indptr, num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo=None,
             causal=False, sm_scale=None, q_data_type="float16"):  # fmt: skip
        assert qo_indptr.equal(kv_indptr)
        assert (qo_indptr.dtype, q_data_type) == (torch.int32, torch.bfloat16)
        assert (num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo) == (3, 3, 48, 24)
        assert causal
        self.ends, self.scale = qo_indptr.tolist(), sm_scale

    def run(self, q, k, v):
        assert q.is_contiguous()
        texts = []
        for first, end in itertools.pairwise(self.ends):
            parts = (x[first:end].swapaxes(0, 1) for x in (q, k, v))
            o = F.scaled_dot_product_attention(*parts, is_causal=True, scale=self.scale)
            texts.append(o.swapaxes(0, 1))
        return torch.cat(texts)


@pytest.mark.parametrize("job", ["mla_decode", "mla_prefill"])
def test_flashinfer_is_called_as_it_wants(job, stand_ins, monkeypatch):
    """Its modules are there for this test alone."""
    for name, wrapper in (("mla", LatentWrapper), ("prefill", RaggedWrapper)):
        called = {"mla": "BatchMLAPagedAttentionWrapper",
                  "prefill": "BatchPrefillWithRaggedKVCacheWrapper"}[name]  # fmt: skip
        monkeypatch.setitem(sys.modules, f"flashinfer.{name}", SimpleNamespace(**{called: wrapper}))
    for side in sides_of(job)["flashinfer"]:
        assert side.right, side.note
        assert side.us == 50


# the clock, with a GPU's queue that a test can look into


class Gpu:
    """Calls take the time that they say they do; launches of the host cost 30 us each."""

    def __init__(self, monkeypatch):
        self.now, self.replays, self.captured = 0.0, 0, []
        self.graph, self.benched = None, []
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: self.Event(self))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", lambda graph: self)
        monkeypatch.setattr(clock, "do_bench", self.do_bench)

    class Event:
        def __init__(self, gpu):
            self.gpu, self.at = gpu, 0.0

        def record(self):
            self.at = self.gpu.now

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return (other.at - self.at) / 1000

    def __enter__(self):
        self.graph = []

    def __exit__(self, *error):
        self.captured, self.graph = self.graph, None

    def replay(self):
        self.replays += 1
        self.now += 10 + sum(self.captured)

    def do_bench(self, call, rep, return_mode):
        assert return_mode == "all"
        self.benched.append(call)
        return [0.5, 0.25]

    def call(self, us: float):
        def run():
            if self.graph is None:
                self.now += us + 30
            else:
                self.graph.append(us)

        return run


def test_short_calls_are_timed_in_a_graph(monkeypatch):
    gpu = Gpu(monkeypatch)
    times = clock.CudaTimer().measure([gpu.call(4.0), gpu.call(6.0), gpu.call(5.0)])
    assert len(gpu.captured) == 67 * 3  # at least 200 launches, whole passes over the inputs
    assert len(times) == 15
    assert times == pytest.approx([5.0 + 10 / 201] * 15)
    assert gpu.replays == 16  # the first is not timed
    assert not gpu.benched


def test_long_calls_are_timed_one_by_one_with_a_cold_cache(monkeypatch):
    gpu = Gpu(monkeypatch)
    call = gpu.call(200.0)
    assert clock.CudaTimer().measure([call, gpu.call(200.0)]) == [500, 250]
    assert gpu.benched == [call]
    assert not gpu.captured


def test_results_are_held_through_a_pass(monkeypatch):
    """Memory that is written again at once would stay in the cache."""
    gpu, living, most = Gpu(monkeypatch), weakref.WeakSet(), []

    def run():
        result = Result()
        living.add(result)
        most.append(len(living))
        return result

    clock.CudaTimer().measure([run, run, run])
    assert gpu.replays
    assert max(most) >= 3


class Result:
    """What a call returns."""


# what it ran on


def test_clocks_are_asked_for_and_never_set(monkeypatch):
    asked = []

    def output(command):
        asked.append(command)
        return "580.1, 1980 MHz, 2619 MHz, 1980 MHz, 650.10 W"

    properties = SimpleNamespace(uuid="1-2")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    monkeypatch.setattr(stamp, "_output", output)
    assert stamp.clocks() == {
        "driver_version": "580.1", "clocks.sm": "1980 MHz", "clocks.mem": "2619 MHz",
        "clocks.max.sm": "1980 MHz", "power.draw": "650.10 W",
    }  # fmt: skip
    (command,) = asked
    assert command[0] == "nvidia-smi"
    assert all(
        part.startswith(("--query-gpu=", "--format=", "--id=GPU-1-2")) for part in command[1:]
    )
    monkeypatch.setattr(stamp, "_output", lambda command: "")
    assert set(stamp.clocks().values()) == {"unknown"}


def test_software_and_commit(monkeypatch):
    found = stamp.software("python -m x")
    assert found["command"] == "python -m x"
    assert found["torch"] == torch.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found["date"])
    assert re.fullmatch(r"[0-9a-f]{12}\+?|unknown", found["commit"])
    monkeypatch.setattr(
        stamp, "_output", lambda command: "c0ffee" if "rev-parse" in command else "M"
    )
    assert stamp.commit() == "c0ffee+"
    monkeypatch.setattr(stamp, "_output", lambda command: "")
    assert stamp.commit() == "unknown"


def test_programs_that_are_not_there_or_fail_say_nothing():
    assert stamp._output(["no such program"]) == ""
    assert stamp._output([sys.executable, "-c", "import sys; print(1); sys.exit(1)"]) == ""
    assert stamp._output([sys.executable, "-c", "print(1)"]) == "1"


# the command


@pytest.mark.skipif(torch.cuda.is_available(), reason="NOT RUN: there is a GPU here")
@pytest.mark.parametrize("verb", [[], ["gemm"], ["run", "gemm"], ["tune"]])
def test_without_a_gpu_one_sentence(verb, tmp_path):
    done = CliRunner().invoke(command.app, [*verb, "--out", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert done.output.strip() == command.NO_GPU
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="NOT RUN: there is a GPU here")
def test_it_runs_from_a_plain_checkout(tmp_path):
    """As on a GPU host: no installed minids is needed, only PYTHONPATH."""
    done = subprocess.run(
        [sys.executable, "-m", "minids_kernels.bench", "--out", str(tmp_path / "out")],
        cwd=ROOT, env={"PYTHONPATH": ".:kernels", "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.strip() == command.NO_GPU


def test_names_that_are_no_job_or_kernel():
    for arguments, words in ((["gem"], "is none of"), (["tune", "fp8_matmul.X"], "no kernel file")):
        done = CliRunner().invoke(command.app, [*arguments, "--out", "x"])
        assert done.exit_code == 2
        assert words in done.output
    assert CliRunner().invoke(command.app, ["--help"]).exit_code == 0


def test_the_whole_command(stand_ins, monkeypatch, tmp_path):
    """With a card that is not there: jobs, report, files, exit code."""
    properties = SimpleNamespace(name="NVIDIA H200", L2_cache_size=0, uuid="0",
                                 multi_processor_count=132, total_memory=141e9)  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    monkeypatch.setattr(stamp, "clocks_under_load", stamp.clocks)
    monkeypatch.setattr(command, "CudaTimer", Watch)
    on_cpu = lambda *given: Bench("cpu", *given[1:])  # noqa: E731
    monkeypatch.setattr(command, "Bench", on_cpu)
    for job, cases in TINY.items():
        monkeypatch.setitem(JOBS, job, cases)
    done = CliRunner().invoke(command.app, ["wgrad", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    saved = json.loads((tmp_path / "bench.json").read_text())
    assert saved["stamp"]["gpu"] == "NVIDIA H200"
    assert [row["job"] for row in saved["rows"]] == ["ceilings"] * 4 + ["wgrad"]
    assert "o, 128 x 144 over 256" in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "bench.md"]


# tuned configs

CARD = cards.Card("a card", (9, 0), 132, 227 * 1024)


class Wide(NamedTuple):
    BLOCK_M: int
    warps: int


class Long(NamedTuple):
    BLOCK_K: int


@pytest.fixture
def kernel(monkeypatch):
    """Return the name of a kernel whose file lists configs of two."""
    file = SimpleNamespace(CANDIDATES=(Wide(64, 4), Wide(128, 4), Wide(128, 8), Long(64)))
    monkeypatch.setitem(sys.modules, "minids_kernels.some_file", file)
    return "some_file.Wide"


def row_of(name: str, **changes) -> dict:
    row = {"kernel": name, "card": "a card", "shape": [4096, 2112, 7168],
           "config": {"BLOCK_M": 128, "warps": 8}, "us": 1.0, "rule_us": 2.0,
           "date": "2026-01-02", "commit": "c0ffee"}  # fmt: skip
    return row | changes


def table_of(monkeypatch, tmp_path, *rows: dict):
    path = tmp_path / "configs.json"
    path.write_text(json.dumps(rows))
    monkeypatch.setattr(configs, "_table", lambda: configs.read(path))


def test_rows_serve_down_to_half_of_their_rows_and_exact_widths(kernel, monkeypatch, tmp_path):
    table_of(monkeypatch, tmp_path, row_of(kernel))
    for m, found in ((4096, True), (2049, True), (2048, False), (4097, False), (1, False)):
        config = configs.find(kernel, (m, 2112, 7168), CARD)
        assert config == ({"BLOCK_M": 128, "warps": 8} if found else None), m
    assert configs.find(kernel, (4096, 2113, 7168), CARD) is None
    assert configs.find(kernel, (4096, 2112, 512), CARD) is None
    assert configs.find(kernel, (4096, 2112, 7168), CARD._replace(name="another")) is None
    assert configs.find("some_file.Long", (4096, 2112, 7168), CARD) is None


def test_buckets():
    sizes = [configs.bucket((m, 7))[0] for m in (0, 1, 2, 3, 4, 5, 64, 65, 128)]
    assert sizes == [1, 1, 2, 4, 4, 8, 64, 128, 128]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"kernel": "some_file.Other"}, "names no kernel"),
        ({"kernel": "no_file.Wide"}, "names no kernel"),
        ({"kernel": "os.path.Wide"}, "names no kernel"),
        (
            {"config": {"BLOCK_M": 128, "waves": 8}},
            "sets waves, which some_file.Wide does not have",
        ),
        ({"config": {"BLOCK_M": 256, "warps": 8}}, "is none of the candidates"),
        ({"config": {"BLOCK_M": 128}}, "is none of the candidates"),
        ({"shape": [4095, 2112, 7168]}, "must start its shape with a power of two"),
        ({"shape": []}, "must start its shape with a power of two"),
        ({"note": "x"}, "must have exactly the fields kernel, card"),
    ],
)
def test_rows_that_do_not_fit_are_refused_with_their_text(kernel, changes, text, tmp_path):
    row = row_of(kernel, **changes)
    path = tmp_path / "configs.json"
    path.write_text(json.dumps([row]))
    with pytest.raises(ValueError, match=re.escape(text)) as error:
        configs.read(path)
    assert json.dumps(row) in str(error.value)


def test_a_row_twice_is_refused(kernel, tmp_path):
    path = tmp_path / "configs.json"
    path.write_text(json.dumps([row_of(kernel), row_of(kernel, us=3.0)]))
    with pytest.raises(ValueError, match="is there twice"):
        configs.read(path)


def test_the_table_that_is_shipped_fits_the_kernels():
    configs.read(configs.FILE)


def test_a_trial_is_what_its_kernel_finds_until_it_ends(kernel, monkeypatch, tmp_path):
    table_of(monkeypatch, tmp_path, row_of(kernel))
    shape = (4096, 2112, 7168)
    with configs.trying(kernel, {"BLOCK_M": 64, "warps": 4}) as trial:
        assert configs.find(kernel, shape, CARD) == {"BLOCK_M": 64, "warps": 4}
        assert configs.find("some_file.Long", shape, CARD) is None
        with configs.trying(kernel, None):
            assert configs.find(kernel, shape, CARD) is None
    assert trial.asked == [(kernel, shape), ("some_file.Long", shape)]
    assert configs.find(kernel, shape, CARD) == {"BLOCK_M": 128, "warps": 8}


class Launch:
    """A kernel that asks for its config; `times` are of the rule (None) and of BLOCK_M, warps."""

    def __init__(self, kernel: str, times: dict, wrong: tuple = ()):
        self.kernel, self.times, self.wrong, self.last = kernel, times, wrong, None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        config = configs.find(self.kernel, (3000, 7), CARD)
        self.last = config and (config["BLOCK_M"], config["warps"])
        return x + 1 if self.last in self.wrong else x

    def measure(self, calls):
        calls[0]()
        us = self.times[self.last]
        return [us - 1, us, us + 1]

    def warm(self):
        pass

    def case(self) -> Case:
        def check(result, x):
            return Verdict("", True) if result.equal(x) else Verdict("WRONG", False)

        return case_of(ours=self, check=check)


def tuned(launch: Launch, rows: list | None = None) -> tune.Tuning:
    tuning = tune.Tuning(STAMP, rows or [])
    for _ in tune.tune([launch.case()], bench(timer=launch), tuning):
        pass
    return tuning


def test_the_fastest_right_config_is_kept(kernel):
    times = {None: 100.0, (64, 4): 95.0, (128, 4): 90.0, (128, 8): 50.0}
    tuning = tuned(Launch(kernel, times, wrong=((128, 8),)))
    (row,) = tuning.rows
    assert row == {
        "kernel": kernel, "card": "a card", "shape": [4096, 7], "us": 90.0, "rule_us": 100.0,
        "config": {"BLOCK_M": 128, "warps": 4}, "date": STAMP["date"], "commit": "c0ffee",
    }  # fmt: skip
    assert [(each["config"], each["us"]) for each in tuning.tries] == [
        (None, 100.0), ({"BLOCK_M": 64, "warps": 4}, 95.0), ({"BLOCK_M": 128, "warps": 4}, 90.0),
        ({"BLOCK_M": 128, "warps": 8}, None),  # a wrong one is not timed
    ]  # fmt: skip
    assert tuning.tries[-1]["note"] == "WRONG"


def test_within_the_spread_the_rule_stays_and_its_old_row_goes(kernel):
    """The spread is 2."""
    old = row_of(kernel, shape=[4096, 7])
    others = [row_of(kernel, shape=[2048, 7]), row_of(kernel, shape=[4096, 7], card="another")]
    slower = {None: 100.0, (64, 4): 98.5, (128, 4): 99.0, (128, 8): 101.0}
    assert tuned(Launch(kernel, slower), [old, *others]).rows == others
    faster = slower | {(64, 4): 97.0}
    assert len(tuned(Launch(kernel, faster), [old, *others]).rows) == 3


def test_only_kernels_that_a_case_launches_and_that_are_chosen_are_tuned(kernel):
    launch = Launch(kernel, dict.fromkeys([None, (64, 4), (128, 4), (128, 8)], 9.0))
    for case, chosen, n in (
        (launch.case(), [], 4),
        (launch.case(), [kernel], 4),
        (launch.case(), ["some_file.Long"], 0),
        (case_of(ours=same), [], 0),
        (case_of(ours=fails), [], 0),
    ):
        tuning = tune.Tuning(STAMP, [])
        assert len(list(tune.tune([case], bench(timer=launch), tuning, chosen))) == 1
        assert len(tuning.tries) == n


def test_tuning_stops_in_time_and_says_so(kernel):
    launch = Launch(kernel, dict.fromkeys([None, (64, 4), (128, 4), (128, 8)], 9.0))
    tuning = tune.Tuning(STAMP, [])
    cases = [launch.case(), launch.case()]
    place = bench(timer=launch, total_s=2, now=Ticks())
    assert len(list(tune.tune(cases, place, tuning))) == 2
    assert tuning.tries[-1] == {"case": "a case", "note": "dropped: the time was over"}
    assert len(tuning.tries) == 5


def test_the_tuner_writes_the_table_a_row_a_line(kernel, tmp_path):
    rows = [row_of(kernel, card="b"), row_of(kernel, card="a")]
    tuning = tune.Tuning(STAMP, rows, [{"case": "x"}])
    table, folder = tmp_path / "configs.json", tmp_path / "results"
    tune.save(tuning, table, folder)
    assert [line[:12] for line in table.read_text().splitlines()] == [
        "[", '{"kernel": "', '{"kernel": "', "]",
    ]  # fmt: skip
    assert json.loads(table.read_text()) == rows[::-1]
    assert json.loads((folder / "tune.json").read_text())["tries"] == [{"case": "x"}]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["configs.json"]
    tune.save(tune.Tuning(STAMP, []), table, folder)
    assert table.read_text() == "[]\n" == configs.FILE.read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter")
def test_the_tuner_tries_every_candidate_of_every_kernel(device, monkeypatch):
    """It would note a wrong one and go on; nothing is timed here."""
    monkeypatch.setattr(tune, "ROUNDS", 0)
    compile_nothing(monkeypatch)
    every = quantise.cases((128, 128), (1, 128), (16, 128))
    names = ("1x128 to 128x1", "1x128, 1 x", "1x128 and 128x1", "128x128 to BF16")
    cases = [case for case in every if case.name.startswith(names)]
    cases += [next(TINY["wgrad"](tokens=128, weights=SMALL[1:]))]
    cases += [next(TINY["decode"](weights=(Weight("kv", 16, 128),)))]
    cases += [next(TINY[job]()) for job in ATTENTION]
    cases += [next(TINY[job]()) for job in ("router", "rope", "experts")]
    cases += [case for case in norm.cases((2, 128)) if case.name.startswith(("forward", "grad"))]
    cases += list(swiglu.cases(((2, 128),)))[1:3]
    cases += [next(loss.cases(2, 200, 64)), list(TINY["experts_bf16"]())[-1]]
    tuning = tune.Tuning(STAMP, [])
    assert len(list(tune.tune(cases, bench(device=device), tuning))) == len(cases)
    tried = {each["kernel"] for each in tuning.tries}
    files = {
        path.stem
        for path in Path(configs.__file__).parent.glob("*.py")
        if re.search(r"^CANDIDATES\b", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert {kernel.split(".")[0] for kernel in tried} == files
    for name in tried:
        listed = [config._asdict() for config in configs.candidates(name)]
        assert all(config in [each["config"] for each in tuning.tries] for config in listed)
    wrong = [each for each in tuning.tries if not each["right"]]
    # of experts' tiles each size of slots and dtype has its own
    wrong = [each for each in wrong if not each["note"].startswith("failed: ValueError: ")]
    assert not wrong
    kept = {each["kernel"] for each in tuning.tries if each["config"] and each["right"]}
    assert kept == tried
    assert not tuning.rows


# the page


def test_the_page_is_what_the_command_writes():
    assert readme.README.read_text(encoding="utf-8") == readme.page(readme.RESULTS), (
        "run: PYTHONPATH=.:kernels python -m minids_kernels.bench readme"
    )


def test_the_page_says_what_was_not_measured(tmp_path):
    text = readme.page(tmp_path)
    assert text.count("| not yet measured |") == len(readme.LISTED)
    assert "26.6 (NVIDIA H100 80GB HBM3), 18.5 (NVIDIA H200)" in text


def test_the_page_has_the_latest_row_of_each_kernel_and_card(stand_ins, tmp_path):
    listed = {(kernel.job, kernel.case) for kernel in readme.LISTED}
    assert len(listed) == len(readme.LISTED)
    chosen = {job: [case for case in cases() if (job, case.name) in listed]
              for job, cases in JOBS.items()}  # fmt: skip
    assert {(job, case.name) for job, cases in chosen.items() for case in cases} == listed

    def result(us: float, *jobs: str) -> str:
        rows = []
        for job in jobs:
            for case in chosen[job]:
                ours = Side(us, 1.0, [us, us], 6, True, None, "bit-equal")
                sides = {OURS: ours, "slow": Side(3 * us), "fast": Side(2 * us), "none": Side(),
                         "wrong": Side(us / 9, error=0.5)}  # fmt: skip
                rows.append(Row(job, case.name, case.work, sides, H100, Rates(), case.goals))
        return json.dumps(report.as_json(Report(STAMP | {"gpu": "NVIDIA H100"}, rows)))

    for name, text in (
        ("h100/2026-01-01", result(100.0, "gemm", "wgrad")),
        ("h100/2026-01-02", result(200.0, "gemm")),
        ("h200/2026-01-01", result(300.0, "quantise").replace("H100", "H200")),
    ):
        (tmp_path / "results" / name).mkdir(parents=True)
        (tmp_path / "results" / name / "bench.json").write_text(text)
    text = readme.page(tmp_path / "results")
    first, second = text.split("### NVIDIA H100\n")[1].split("### NVIDIA H200\n")
    gemm_line = next(line for line in first.splitlines() if "o, 4096 x 7168" in line)
    assert "| 200.0 ± 1.0 | 486.1 | 243.1 | bit-equal | fast 400.0 (2.00) |" in gemm_line
    assert "[2026-01-02](results/h100/2026-01-02/bench.md)" in gemm_line
    wgrad_line = next(line for line in first.splitlines() if "gate, 18432" in line)
    assert "700 TFLOP/s: reached" in wgrad_line
    assert "[2026-01-01](results/h100/2026-01-01/bench.md)" in wgrad_line
    assert first.count("not yet measured") == len(readme.LISTED) - 2
    assert second.count("| 300.0 ± 1.0 |") == len(chosen["quantise"])


def test_what_the_page_links_to_exists():
    text = readme.README.read_text(encoding="utf-8")
    targets = set(re.findall(r"\]\(([^)]+)\)", text))
    missing = [target for target in targets if not (readme.KERNELS / target).exists()]
    assert not missing
    for kernel in readme.LISTED:
        module, _, function = kernel.reference.rpartition(".")
        assert hasattr(__import__(f"minids.{module}", fromlist=["_"]), function)


def test_results_say_that_there_are_none_while_there_are_none():
    text = (readme.RESULTS / "README.md").read_text(encoding="utf-8")
    measured = [path for path in readme.RESULTS.iterdir() if path.is_dir()]
    assert ("nothing has been measured" in text) == (not measured)


# make gpu


def test_make_gpu_ends_in_nine_minutes_with_four_files():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    tests, kill = re.search(r"timeout -s INT -k (\d+) (\d+) ", makefile).group(2, 1)
    seconds = re.search(r"--seconds (\d+)", makefile)[1]
    assert int(tests) + int(kill) + int(seconds) <= 9 * 60 - 30  # to import, compile and write
    dry = ["make", "-n", "gpu", "OUT=a b"]
    lines = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for path in ["tests/test_fp8.py", *(ROOT / "tests").glob("test_kernel_*.py")]:
        assert Path(path).name in lines
    files = set(re.findall(r'"a b/([^"]+)"', lines)) | {report.JSON, report.MARKDOWN}
    assert len(files) == 4
    assert "exit $status" in lines


def test_make_gpu_says_what_a_python_lacks(tmp_path):
    bare = f"GPU_PY={sys.executable} -S"
    done = subprocess.run(["make", "gpu", bare, f"OUT={tmp_path / 'out'}"], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode
    assert "lacks torch, triton, pytest or typer: GPU_PY=... names another Python" in done.stderr
    assert not (tmp_path / "out").exists()


# on a GPU


def on_this_card() -> Bench:
    properties = torch.cuda.get_device_properties()
    sheet = DATASHEETS.get(properties.name, Rates())
    return Bench("cuda", clock.CudaTimer(), properties.L2_cache_size, sheet)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [2**22, 2**30])
def test_copies_take_the_time_that_memory_needs(size):
    """4 MB in a graph, from cold memory, and a gigabyte by events: within what any card moves."""
    case = next(ceilings.cases(size))
    row = measure(case, on_this_card(), 1e9, Rates())
    assert row.ours.right
    assert 0.1 < row.tb_s < 10
    assert row.percent_of_floor is None or row.percent_of_floor < 105


@pytest.mark.gpu
def test_every_job_runs_and_is_captured(monkeypatch):
    """Small shapes are timed in CUDA graphs: what waits for the GPU cannot be captured."""
    compile_nothing(monkeypatch)
    # peers' gradients run where their forward pass did, on a stream that is not captured; at full
    # size no graph is needed; nor by a loop over experts, which asks the GPU for their loads
    jobs = {job: TINY[job] for job in TINY if job not in ("ceilings", "mla_backward", "experts")}
    found = run_all(jobs, on_this_card())
    assert not found.wrong
    assert all(row.ours.us for row in found.rows)


@pytest.mark.gpu
def test_ceilings_of_this_card():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("NOT RUN: a product with a scale a row is known to run on Hopper GPUs alone")
    found = run_all({"ceilings": partial(ceilings.cases, 2**28, 4096)}, on_this_card())
    assert not found.wrong
    assert all(ceilings.reached(found.rows))


@pytest.mark.gpu
def test_stamp_of_this_card():
    found = stamp.stamp("python -m x")
    assert found["gpu"] == torch.cuda.get_device_name()
    assert found["idle"].keys() == found["load"].keys()
