"""One argument chooses who computes; kernels give what torch gives, backward and training too."""

import json
import os
import subprocess
import sys
from collections import Counter

import fp8_loop
import pytest
import torch
from test_fp8 import RECIPES, draw, to_numpy
from torch.nn import ModuleList

from minids import Transformer, fp8, preset
from minids.attention import Attention
from minids.block import Block
from minids.ffn import SwiGLU
from minids.impl import use
from minids.linear import Linear
from minids.mla import MLA
from minids.moe import Experts, MoE
from minids.mtp import MTP
from minids.norm import RMSNorm
from minids.router import Router
from minids.train import make_optimizer

pytest.importorskip("triton", reason="NOT RUN: kernels need Triton, made for Linux")
import minids_kernels  # after the question whether Triton is there

# FP32 sums of 128 products in another order; a tensor core adds them with about 14 bits (3.3.2)
ORDER, CORES = 1e-6, 1e-3
# through a whole model: a sum that moved by an ulp may get another code of E4M3, up to 1/8 away
STEP = 2e-3
FP8 = dict(precision="fp8")


# what has a kernel; the others are made of these
PARTS = (Attention, Experts, MLA, RMSNorm, Router, SwiGLU, Transformer)


@pytest.mark.parametrize("changes", [{}, dict(q_lora_rank=0), dict(attn="gqa", mtp_depth=0)])
def test_every_part_is_switched_and_back(changes):
    model = Transformer(preset("toy", **FP8, **changes), impl="triton")
    plain = Transformer(preset("toy", **FP8, **changes))
    for module, same in zip(model.modules(), plain.modules(), strict=True):
        if isinstance(module, Linear):
            assert (module.recipe is None) == (same.recipe is None)
            assert module.recipe is None or module.recipe == same.recipe._replace(impl="triton")
        whole = (*PARTS, Linear, MTP, MoE, Block, ModuleList)
        assert isinstance(module, whole), "a part that use() forgets?"
        if isinstance(module, PARTS):
            assert (module.impl, same.impl) == ("triton", "torch")
    use(model, "torch")
    for module, same in zip(model.modules(), plain.modules(), strict=True):
        assert getattr(module, "impl", None) == getattr(same, "impl", None)
        assert getattr(module, "recipe", None) == getattr(same, "recipe", None)


def test_a_name_that_is_no_implementation():
    with pytest.raises(ValueError, match="impl must be one of 'torch', 'triton', got 'cuda'"):
        Transformer(preset("toy"), impl="cuda")


ALONE = """
import json, sys
from minids import Transformer, preset


def told(impl):
    try:
        Transformer(preset("toy", precision="fp8"), impl=impl)
    except Exception as error:
        return str(error)


printed = [told("torch"), "minids_kernels" in sys.modules or "triton" in sys.modules]
sys.modules["triton"] = None
printed.append(told("triton"))
for name in [name for name in sys.modules if name.split(".")[0] in ("triton", "minids_kernels")]:
    del sys.modules[name]
printed.append(told("triton"))
print(json.dumps(printed))
"""


def test_what_the_machine_lacks_is_told_when_the_model_is_built():
    """First nothing of Triton is imported, then it cannot be, then there is no GPU.

    One process, for starting it takes seconds; Triton does not interpret in it.
    """
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    clean["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([sys.executable, "-c", ALONE], env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    of_torch, imported, without_triton, without_gpu = json.loads(done.stdout)
    assert of_torch is None
    assert not imported
    assert "needs Triton, which exists for Linux: pip install 'minids[kernels]'" in without_triton
    needs = "impl='triton' needs an NVIDIA GPU, torch sees none: use impl='torch'"
    assert needs in without_gpu


# what they compute


def gap(ours: torch.Tensor, loop) -> float:
    loop = torch.as_tensor(loop, dtype=torch.float64)
    assert ours.shape == loop.shape
    return ((ours.detach().cpu().double() - loop).norm() / loop.norm()).item()


def three(call, *inputs: torch.Tensor, dy: torch.Tensor, device: str) -> list[torch.Tensor]:
    """Return the product and the gradients of its inputs, computed on `device`."""
    given = [x.detach().to(device).requires_grad_() for x in inputs]
    y = call(*given)
    return [y, *torch.autograd.grad(y, given, dy.detach().to(device))]


@pytest.fixture
def tolerance(device, interpreter) -> float:
    return ORDER if device == "cpu" else CORES


# tokens, I, O: one number, ragged everywhere, one group; then more rows than decoding takes
SHAPES = [(1, 1, 1), (5, 127, 3), (128, 128, 128)]
MANY = (130, 129, 257)


@pytest.mark.parametrize(
    ("name", "tokens", "i", "o"),
    [*(("most", *shape) for shape in SHAPES), *((name, *MANY) for name in RECIPES)],
)
def test_linear_by_kernels_equals_the_loop(name, tokens, i, o, device, tolerance):
    how, roles = RECIPES[name]
    how = how._replace(impl="triton")
    x, w, dy = draw(tokens, i, spread=True), draw(o, i, spread=True), draw(tokens, o, spread=True)
    ours = three(lambda x, w: fp8.linear(x, w, how), x, w, dy=dy, device=device)
    for one, loop in zip(ours, fp8_loop.linear(*to_numpy(x, w, dy), roles), strict=True):
        assert gap(one, loop) <= tolerance


@pytest.mark.parametrize(
    ("name", "tokens", "i", "o"),
    [("most", *SHAPES[1]), ("out of experts", *MANY), ("V3.1", *SHAPES[2])],
)
def test_gated_linear_by_kernels_equals_the_loop(name, tokens, i, o, device, tolerance):
    how, roles = RECIPES[name]
    how = how._replace(impl="triton")
    gate, up, w = draw(tokens, i), draw(tokens, i, spread=True), draw(o, i)
    dy = draw(tokens, o, spread=True)
    ours = three(lambda *given: fp8.gated_linear(*given, how), gate, up, w, dy=dy, device=device)
    loop = fp8_loop.gated_linear(*to_numpy(gate, up, w, dy), roles)
    for one, other in zip(ours, (loop.y, *loop.dx, loop.dw), strict=True):
        assert gap(one, other) <= tolerance


def test_small_inputs_share_the_scale_of_the_floor_and_gradients_do_not(device, tolerance):
    how, roles = RECIPES["most"]
    x, w, dy = draw(5, 130).detach() * 1e-9, draw(8, 130), draw(5, 8).detach() * 1e-9
    how = how._replace(impl="triton")
    ours = three(lambda x, w: fp8.linear(x, w, how), x, w, dy=dy, device=device)
    for one, loop in zip(ours, fp8_loop.linear(*to_numpy(x, w, dy), roles), strict=True):
        assert gap(one, loop) <= tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_have_narrow_outputs_and_gradients(dtype, device, interpreter):
    how, roles = RECIPES["most"][0]._replace(impl="triton"), RECIPES["most"][1]
    given = [draw(*shape).detach().to(dtype) for shape in ((130, 129), (64, 129), (130, 64))]
    x, w, dy = given
    products = fp8_loop.linear(*to_numpy(*(t.float() for t in given)), roles)
    ours = three(lambda x, w: fp8.linear(x, w, how), x, w, dy=dy, device=device)
    for one, loop in zip(ours, products, strict=True):
        assert one.dtype == dtype
        assert gap(one, loop) <= torch.finfo(dtype).eps


def test_blocks_of_gradients_too(device, tolerance):
    """The recipe that diverged (App. B.2) goes through kernels as well: blocks times blocks."""
    x, w, dy = draw(130, 129).detach(), draw(257, 129).detach(), draw(130, 257).detach()
    how = fp8.Recipe(grad_group=fp8.BLOCK)
    by_torch = three(lambda x, w: fp8.linear(x, w, how), x, w, dy=dy, device="cpu")
    how = how._replace(impl="triton")
    by_kernels = three(lambda x, w: fp8.linear(x, w, how), x, w, dy=dy, device=device)
    for ours, theirs in zip(by_kernels, by_torch, strict=True):
        assert gap(ours, theirs) <= tolerance


def step(impl: str, device: str, **changes) -> dict[str, torch.Tensor]:
    """Return a batch's loss and gradients."""
    model = Transformer(preset("toy", **FP8, **changes), impl=impl, seed=1).to(device)
    tokens = torch.randint(model.cfg.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))
    loss = model.losses(tokens.to(device)).total(0.3)
    loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters()} | dict(loss=loss)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        dict(n_layers=1, n_dense_layers=0, n_routed_experts=4, n_expert_groups=2, mtp_depth=0),
        dict(n_layers=1, scale_fmt="ue8m0", q_lora_rank=0, mtp_depth=0),
    ],
)
def test_a_model_trains_by_kernels_as_by_torch(changes, device, interpreter):
    by_torch, by_kernels = step("torch", device, **changes), step("triton", device, **changes)
    for name, theirs in by_torch.items():
        assert gap(by_kernels[name], theirs.cpu()) <= STEP, name


@pytest.mark.gpu
def test_steps_under_autocast_on_a_gpu():
    """Twenty steps of a model whose widths are whole groups: the two implementations stay close."""
    cfg = preset("small", n_layers=2, precision="fp8")
    tokens = torch.randint(cfg.vocab_size, (4, 257)).cuda()
    log = {}
    for impl in ("torch", "triton"):
        model = Transformer(cfg, impl=impl, seed=0).cuda()
        optimizer = make_optimizer(model)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        log[impl] = []
        for _ in range(20):
            with torch.autocast("cuda", torch.bfloat16):
                loss = model.losses(tokens).total(0.3)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            log[impl].append(loss.item())
    assert log["triton"][-1] < 0.9 * log["triton"][0]
    assert log["triton"] == pytest.approx(log["torch"], rel=0.02)


CALLS = {  # of the kernels, in the forward and backward pass of one layer
    "linear": dict(quantise=1, quantise_twice=2, requantise=1, scaled_matmul=3),
    # gate and up are kept in FP8; their product is made again in backward
    "gated_linear": dict(gated_quantise=1, gated_backward=1, quantise_twice=2, scaled_matmul=3),
}


@pytest.mark.parametrize("layer", CALLS)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_who_was_asked_computes(layer, impl, device, interpreter, monkeypatch):
    """A layer that quietly fell back to torch would pass every comparison with torch."""
    calls = Counter()
    for name in {*CALLS["linear"], *CALLS["gated_linear"], "dequantise"}:
        call = getattr(minids_kernels, name)

        def spy(*given, name=name, call=call):
            calls[name] += 1
            return call(*given)

        monkeypatch.setattr(minids_kernels, name, spy)
    inputs = (draw(5, 8), draw(3, 8)) if layer == "linear" else (draw(5, 8), draw(5, 8), draw(3, 8))
    how = fp8.Recipe(impl=impl)
    three(lambda *x: getattr(fp8, layer)(*x, how), *inputs, dy=draw(5, 3), device=device)
    assert calls == (CALLS[layer] if impl == "triton" else {})
