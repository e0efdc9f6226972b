"""`bench layer`: a small V3 layer and a small V2-Lite go the whole way, and mistakes are seen."""

from functools import partial

import pytest
import torch
from minids_kernels.bench import command, floors, gradients, layer, layer_parts, report
from minids_kernels.bench.case import OURS
from minids_kernels.bench.floors import DATASHEETS, Rates, Steps, Work
from minids_kernels.bench.layer_work import backward_work, layer_work
from minids_kernels.bench.pieces import blocks_are_right, switch
from minids_kernels.bench.run import Bench, Report, run
from typer.testing import CliRunner

from minids import Transformer, ffn, mla, preset
from minids.formats.groups import BLOCK, dequantise, quantise

pytestmark = pytest.mark.usefixtures("interpreter")

SMALL = dict(n_layers=2, dim=64, n_dense_layers=1, inter_dim=40, moe_inter_dim=24, n_heads=2,
             kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
             n_routed_experts=4, n_activated_experts=2, vocab_size=64, max_seq_len=256, mtp_depth=0,
             init_std=0.1)  # fmt: skip
V3 = preset("v3", **SMALL, q_lora_rank=40, n_expert_groups=2, n_limited_groups=1)
CONFIGS = {"v3": V3, "v2_lite": preset("v2_lite", **SMALL, n_expert_groups=1)}
TOKENS = dict(prompt=9, rows=3, held=70)


class Watch:
    """A timer that runs each call once."""

    def measure(self, calls):
        for call in calls:
            call()
        return [49.0, 50.0, 51.0]

    def warm(self):
        pass


def measured(*models: str, device: str = "cpu") -> Report:
    cases = list(layer.cases(models, CONFIGS, **TOKENS))
    found = Report({"gpu": "a card", "date": "2026-01-02T03:04:05+00:00"})
    for _ in run({layer.JOB: cases}, Bench(device, Watch(), 1, DATASHEETS["NVIDIA H200"]), found):
        pass
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("model", "n_cases"), [("v3", 3), ("v2_lite", 2)])
def test_every_case_is_right_and_says_what_a_model_takes(model, n_cases, device):
    found = measured(model, device=device)
    assert len(found.rows) == n_cases
    for row in found.rows:
        assert all(side.right for side in row.sides.values()), (row.name, row.sides)
        assert row.tokens_per_s == row.tokens / 50e-6
        assert row.layers == (V3.n_layers if model == "v3" else 0)
    text = report.markdown(found)
    assert "| tokens/s | all layers |" in text
    assert ("2 x: 0.1 ms" in text) == (model == "v3")


# where a layer goes wrong: a part of it in a kernel's place
MISTAKES = {
    "the rotary key is not turned": (mla, "rotate", lambda x, phase, impl: x),
    "up is forgotten": (ffn, "swiglu", lambda gate, up, impl: torch.nn.functional.silu(gate)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_parts_are_named(mistake, monkeypatch):
    place, name, wrong = MISTAKES[mistake]
    right = getattr(place, name)

    def part(*given):
        return wrong(*given) if given[-1] == "triton" else right(*given)

    build = partial(layer_parts.stored_layer, V3)
    prompt = layer.Prompt(build, *layer.drawn_inputs(V3.dim, 1, 3, "cpu"))
    monkeypatch.setattr(place, name, part)
    verdict = blocks_are_right(prompt, prompt.stack.blocks, prompt())
    assert not verdict.right
    assert name in verdict.text


def test_a_result_of_another_run_is_wrong():
    build = partial(layer_parts.stored_layer, V3)
    prompt = layer.Prompt(build, *layer.drawn_inputs(V3.dim, 1, 3, "cpu"))
    y = prompt()
    assert blocks_are_right(prompt, prompt.stack.blocks, y).right
    assert "two runs" in blocks_are_right(prompt, prompt.stack.blocks, y + 1).text
    assert blocks_are_right(prompt, prompt.stack.blocks, (y,)).right  # near it, by torch
    assert not blocks_are_right(prompt, prompt.stack.blocks, (1.1 * y,)).right


def test_wrong_gradients_are_named(monkeypatch):
    x, dy = layer.states_and_gradients(V3.dim, 3, "cpu")
    seen = gradients._add

    def add(gap, name, weight, exact, at=None):
        seen(gap, name, weight, 1.1 * exact if name.endswith("w_uq") else exact, at)

    monkeypatch.setattr(gradients, "_add", add)
    stack = layer_parts.trained_layer(fp8_config(), "cpu")
    ours = partial(layer.Training, lambda device: stack)
    result = ours(x, dy)()
    verdict = gradients.are_right(ours, result, x, dy)
    assert not verdict.right
    assert "w_uq" in verdict.text


def fp8_config():
    return preset("v3", **SMALL, q_lora_rank=40, n_expert_groups=2, n_limited_groups=1,
                  precision="fp8")  # fmt: skip


def test_stored_weights_are_drawn_as_blocks():
    torch.manual_seed(0)
    drawn = layer_parts.drawn(torch.Size((2, 130, 260)), 0.5, "cpu", "triton")
    wide = dequantise(drawn)
    assert wide.std().item() == pytest.approx(0.5, rel=0.02)
    again = quantise(wide, BLOCK)
    assert torch.equal(dequantise(again), wide)


def test_a_layer_of_stored_parts_computes_by_torch_too():
    """What the reference is: the same layer, switched."""
    stack = layer_parts.stored_layer(V3, "cpu", "torch")
    x = torch.randn(1, 5, V3.dim).bfloat16()
    prompt = layer.Prompt(lambda device: stack, x)
    switch(stack.blocks, "torch")
    by_torch = prompt()
    switch(stack.blocks, "triton")
    by_kernels = prompt()
    assert not torch.equal(by_torch, by_kernels)
    assert (by_torch - by_kernels).norm() <= 5e-2 * by_torch.norm()


# floors


def test_steps_wait_for_each_other():
    """Bytes of one and operations of the other do not overlap."""
    rates = Rates(tb_s=1.0, fp8_tflops=1.0, bf16_tflops=0.5)
    steps = Steps((Work(10**6, 2 * 10**6), Work(3 * 10**6, 10**6, "bf16_tflops")))
    assert steps.us_at(rates) == pytest.approx(2 + 3)
    assert steps.memory_us(rates) == pytest.approx(4)
    assert steps.compute_us(rates) == pytest.approx(2 + 2)
    assert (steps.moved_bytes, steps.operations) == (4 * 10**6, 3 * 10**6)
    assert steps.us_at(Rates(tb_s=1.0)) is None


# bytes and times that kernels' own jobs are held to, in us on an H200: experts, attention, w_o
@pytest.mark.parametrize(
    ("tokens", "held", "parts"),
    [(4096, 0, [2527, 695, 486]), (128, 4096, [2318, 148, 25])],
)
def test_floors_of_a_v3_layer_hold_those_of_its_kernels(tokens, held, parts):
    rates = DATASHEETS["NVIDIA H200"]
    works = [
        round(work.us_at(rates)) for work in layer_work(preset("v3"), tokens, held, False).works
    ]
    assert {*parts} <= {*works}


def test_weights_of_the_floor_are_those_of_the_model():
    """Each matrix of a decoding step is read once: the bytes are the model's, less what is idle."""
    cfg = preset("v2_lite", n_activated_experts=64)  # none is idle
    with torch.device("meta"):
        model = Transformer(cfg)
    matrices = sum(w.numel() for n, w in model.named_parameters() if w.ndim > 1 and n != "embed")
    moved = layer_work(cfg, 1, 1, whole=True).moved_bytes
    assert moved == pytest.approx(2 * matrices, rel=1e-3)


def test_experts_choose_evenly():
    assert [floors.active_experts(n, 256, 8) for n in (0, 1, 32, 128, 4096)] == [
        0,
        8,
        163,
        252,
        256,
    ]


def test_backward_makes_three_products_of_each_weight():
    cfg = preset("v3")
    once = layer_work(cfg, 4096, 0, False)
    attention = [work.operations for work in once.works if work.unit == "bf16_tflops"]
    products = once.operations - sum(attention)
    backward = backward_work(cfg, 4096)
    in_fp8 = sum(work.operations for work in backward.works if work.unit == "fp8_tflops")
    assert in_fp8 == 3 * products


# the command


def test_names_and_gpus_that_are_not_there():
    answer = CliRunner().invoke(command.app, ["layer", "v4"])
    assert answer.exit_code == 2
    assert "'v4' is none of v3, v2_lite" in answer.output
    if not torch.cuda.is_available():
        answer = CliRunner().invoke(command.app, ["layer"])
        assert (answer.exit_code, answer.output.strip()) == (1, command.NO_GPU)


def test_training_needs_memory_that_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (20 * 10**9, 80 * 10**9))
    with pytest.raises(RuntimeError, match=r"training needs about \d+ GB, 20 are free"):
        layer_parts.trained_layer(preset("v3"), "cuda")


@pytest.mark.gpu
def test_a_batchs_step_is_captured():
    """Nothing of a step comes from the host."""
    build = partial(layer_parts.stored_layer, V3)
    x = layer.drawn_inputs(V3.dim, 3, 1, "cuda")
    ours = partial(layer.Step, 70, build)
    captured, launched = layer.graphed(ours, *x), ours(*x)
    assert captured().shape == launched().shape
    row = measured("v3", device="cuda").rows[1]
    assert row.sides[OURS].right, row.sides[OURS].note
