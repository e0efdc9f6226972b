"""Routed experts from end to end: equal to a loop in FP64, and in FP8 to the reference."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from compiled import compile_calls
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_experts import LOADS, blocks, draw_ids, experts_by_loop, weights
from kernel_inputs import assert_caught, bitwise_equal, laid_out, poisoned_memory
from kernel_products import error
from minids_kernels import cards, moe_experts
from minids_kernels.moe_experts import run_experts, run_scaled_experts, train_experts
from minids_kernels.slots import n_slots
from torch import Tensor

from minids import fp8
from minids.experts import scaled
from minids.formats.groups import Scaled
from minids.fused import swiglu

pytestmark = pytest.mark.usefixtures("interpreter")

# Relative to the norm. FP32: sums in another order. 16 bits: gate, up, hidden, results and, in
# backward, what is made of them are rounded one after the other: a few times 2^-9 and 2^-12.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
# FP8 in FP32: the same codes, sums in another order. On a card a product has about 14 bits, so of a
# thousand numbers one falls to another code, 9 % away on average: 0.09 / sqrt(1000).
SAME_CODES, ON_A_CARD = 2e-6, 1e-2
RECIPES = {
    "published": (fp8.INTO_EXPERTS, fp8.OUT_OF_EXPERTS),
    "plain": (fp8.MOST, fp8.MOST),
    "powers of two": tuple(
        fp8.Recipe(scale_fmt="ue8m0", input_scale="ue8m0", grad_scale="ue8m0") for _ in range(2)
    ),
    "gradients by blocks": (fp8.Recipe(grad_group=fp8.BLOCK), fp8.Recipe(grad_group=fp8.BLOCK)),
}


def drawn(
    load="any", tokens=12, experts=3, k=1, width=48, hidden=40, dtype=torch.float32, device="cpu",
    seed=0,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return ids, dy, and what is differentiated: x, gate and the weights."""
    generator = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(tokens, width, generator=generator) for _ in range(2))
    gate = torch.rand(tokens, k, generator=generator).bfloat16().float()  # as references round it
    matrices = weights(experts, width, hidden, dtype, device, seed)
    ids = draw_ids(load, tokens, experts, k, device)
    return ids, dy.to(device, dtype), x.to(device, dtype), gate.to(device), *matrices


def differentiated(run, ids, dy, *inputs) -> list[Tensor]:
    """Return the result and the gradients of x, gate and both weights."""
    x, gate, *matrices = (part.detach().clone().requires_grad_() for part in inputs)
    y = run(x, gate, ids, *matrices)
    return [y.detach(), *torch.autograd.grad(y, [x, gate, *matrices], dy.to(y.dtype))]


def exact(ids, dy, *inputs) -> list[Tensor]:
    return differentiated(experts_by_loop, ids, dy, *(part.double() for part in inputs))


def check(ids, dy, *inputs, module: ModuleType = moe_experts) -> None:
    """Compare with the loop, in memory that was full of NaN: no empty slot reaches a result."""
    wanted = exact(ids, dy, *inputs)
    with poisoned_memory():
        found = differentiated(module.run_experts, ids, dy, *inputs)
    for part, x, y in zip((dy, *inputs), found, wanted, strict=True):
        assert x.dtype == part.dtype
        assert x.shape == y.shape
        assert error(x, y) < TOLERANCE[dy.dtype]


def test_example_by_hand(device):
    """Widths 1: g = 100, whose silu is 100; up = 2, down 3: 600, once by 1/2 and once by 2."""
    x = torch.tensor([[2.0]], device=device)
    w_gate_up = torch.tensor([50.0, 1.0], device=device).reshape(1, 2, 1, 1).repeat(2, 1, 1, 1)
    w_down = torch.tensor([3.0, -1.0], device=device).reshape(2, 1, 1)
    ids, gate = torch.tensor([[1, 0]], device=device), torch.tensor([[2.0, 0.5]], device=device)
    assert run_experts(x, gate, ids, w_gate_up, w_down).tolist() == [[-100.0]]


@pytest.mark.parametrize("load", LOADS)
def test_equal_the_loop_and_its_gradients(load, device):
    check(*drawn(load, device=device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_equal_the_loop_and_its_gradients(dtype, device):
    check(*drawn(k=2, dtype=dtype, device=device))


@pytest.mark.parametrize(("tokens", "experts", "k"), [(1, 4, 2), (5, 3, 3), (3, 1, 1)])
def test_one_token_and_all_experts(tokens, experts, k, device):
    check(*drawn("any", tokens, experts, k, device=device))


@settings(max_examples=2)
@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 3), st.integers(1, 70),
       st.integers(1, 70), st.sampled_from(list(TOLERANCE)))  # fmt: skip
def test_random_shapes(device, tokens, experts, k, width, hidden, dtype):
    check(*drawn("any", tokens, max(experts, k), k, width, hidden, dtype, device))


@pytest.mark.parametrize("layout", ["transposed", "every second column"])
def test_any_strides(layout, device):
    ids, _, *inputs = drawn(tokens=9, device=device)
    odd = [laid_out(part, layout) for part in inputs]
    y = run_experts(odd[0], odd[1], laid_out(ids, layout), *odd[2:])
    assert torch.equal(y, run_experts(inputs[0], inputs[1], ids, *inputs[2:]))


def test_inference_is_the_same_by_other_tiles(device):
    ids, _, *inputs = drawn(device=device)
    trained = run_experts(inputs[0].requires_grad_(), inputs[1], ids, *inputs[2:])
    assert trained.requires_grad
    with torch.no_grad():
        found = run_experts(inputs[0], inputs[1], ids, *inputs[2:])
    assert not found.requires_grad
    assert error(found, trained.detach()) < TOLERANCE[torch.float32]


def test_only_what_asks_for_gradients_gets_them(device):
    ids, dy, x, *rest = drawn(tokens=5, device=device)
    wanted = differentiated(run_experts, ids, dy, x, *rest)[1]
    x.requires_grad_()
    run_experts(x, rest[0], ids, *rest[1:]).backward(dy)
    assert torch.equal(x.grad, wanted)


@contextmanager
def autocast_on() -> Iterator[None]:
    """Say that autocast is on for GPUs, also where there is none."""
    kinds = {"cuda": torch.bfloat16}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "is_autocast_enabled", lambda kind: kind in kinds)
        patch.setattr(torch, "get_autocast_dtype", kinds.__getitem__)
        yield


def test_autocast_and_mixed_dtypes(device):
    """FP32 masters under autocast meet in BF16; their gradients are FP32 again."""
    ids, dy, x, gate, *matrices = drawn(tokens=9, device=device)
    with autocast_on():
        found = differentiated(run_experts, ids, dy, x, gate, *matrices)
    assert [part.dtype for part in found] == [torch.bfloat16, *[torch.float32] * 4]
    narrow = [part.bfloat16() for part in (x, *matrices)]
    wanted = differentiated(run_experts, ids, dy, narrow[0], gate, *narrow[1:])
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other.to(one.dtype))
    assert run_experts(x.bfloat16(), gate, ids, *matrices).dtype == torch.float32


def test_two_runs_are_bitwise_equal(device):
    ids, dy, *inputs = drawn(tokens=9, dtype=torch.bfloat16, device=device)
    bitwise_equal(partial(differentiated, run_experts, ids, dy, *inputs))


def test_no_tokens(device):
    ids, _, x, gate, *matrices = drawn(device=device)
    assert run_experts(x[:0], gate[:0], ids[:0], *matrices).shape == (0, 48)
    stacks = [blocks(w) for w in matrices]
    assert run_scaled_experts(x[:0], gate[:0], ids[:0], *stacks).shape == (0, 48)
    assert train_experts(x[:0], gate[:0], ids[:0], *matrices, fp8.MOST, fp8.MOST).shape == (0, 48)


# What waits for backward


@contextmanager
def waiting() -> Iterator[list[Tensor]]:
    """Collect what autograd keeps: a tensor that is kept twice counts once."""
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.data_ptr()] = x
        return x

    found: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        yield found
    found += kept.values()


def n_bytes(parts: list[Tensor]) -> int:
    return sum(part.untyped_storage().nbytes() for part in parts)


def test_memory_that_waits(device):
    """In BF16 gate and up; in FP8 a byte a number for them and x, but y as it is."""
    T, E, K, D, F = 10, 2, 1, 128, 128
    ids, _, x, gate, *matrices = drawn("any", T, E, K, D, F, torch.bfloat16, device)
    leaves = [part.requires_grad_() for part in (x, gate, *matrices)]
    P = n_slots(T * K, E, 128)
    slots = 4 * (P + T * K + E + 1 + P // 128)
    with waiting() as kept:
        run_experts(leaves[0], leaves[1], ids, *leaves[2:])
    given = n_bytes(leaves)
    assert n_bytes(kept) == given + slots + P * 2 * F * 2
    with waiting() as kept:
        train_experts(leaves[0], leaves[1], ids, *leaves[2:], *RECIPES["published"])
    of_x, halves, y = T * (D + 4), P * 2 * (F + 4), P * D * 2
    turned = 3 * E * (D * F + 4)
    assert n_bytes(kept) == n_bytes(leaves[1:2]) + slots + of_x + halves + y + turned


# FP8


def tolerance(dtype: torch.dtype = torch.float32) -> float:
    """Return what is allowed where the codes are the same: sums, and roundings to 16 bits."""
    codes = SAME_CODES if cards.interpreted() else ON_A_CARD
    return codes if dtype == torch.float32 else codes + TOLERANCE[dtype]


@contextmanager
def hidden_in_fp32() -> Iterator[None]:
    """Let references quantise hidden rows as kernels do: not rounded to 16 bits before."""

    def wide(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate.float()) * up.float()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaled, "swiglu", wide)
        patch.setattr(swiglu, "swiglu", wide)
        yield


@pytest.mark.parametrize("load", ["all to one", "few of many"])
def test_scaled_experts_equal_the_reference(load, device):
    ids, _, x, gate, *matrices = drawn(load, width=136, hidden=130, device=device)
    stacks = [blocks(w) for w in matrices]
    found = run_scaled_experts(x, gate, ids, *stacks)
    assert error(found, scaled.run_scaled_experts(x, gate, ids, *stacks)) < tolerance()


@pytest.mark.parametrize(("tokens", "experts", "k"), [(1, 3, 3), (40, 4, 1), (40, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scaled_experts_of_many_and_few_tokens(dtype, tokens, experts, k, device):
    """Tiles of 16 and of 64 slots; powers of two."""
    ids, _, x, gate, *matrices = drawn("any", tokens, experts, k, dtype=dtype, device=device)
    stacks = [blocks(w, "ue8m0") for w in matrices]
    with poisoned_memory():
        found = run_scaled_experts(x, gate, ids, *stacks, "ue8m0", "ue8m0")
    assert found.dtype == dtype
    with hidden_in_fp32():
        wanted = scaled.run_scaled_experts(x, gate, ids, *stacks, "ue8m0", "ue8m0")
    assert error(found, wanted) < tolerance(dtype)


def check_training(name: str, inputs, module: ModuleType = moe_experts) -> None:
    def by(run):
        return lambda x, gate, ids, *matrices: run(x, gate, ids, *matrices, *RECIPES[name])

    with hidden_in_fp32():
        wanted = differentiated(by(scaled.train_experts), *inputs)
    with poisoned_memory():
        found = differentiated(by(module.train_experts), *inputs)
    for x, y in zip(found, wanted, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert error(x, y) < tolerance(inputs[1].dtype)


def test_training_equals_the_reference(device):
    """Experts without visits among them."""
    check_training("published", drawn("few of many", 9, 3, 1, 40, 24, device=device))


@pytest.mark.slow
@pytest.mark.parametrize(("load", "name"), list(zip(LOADS, RECIPES, strict=True)))
def test_training_by_every_recipe_and_load(load, name, device):
    check_training(name, drawn(load, 9, 3, 1, 40, 24, device=device))


@pytest.mark.slow
def test_training_of_several_groups_everywhere(device):
    """Two groups of tokens an expert, two blocks of every width, ragged ones."""
    inputs = drawn("any", 150, 2, 2, 200, 136, device=device)
    check_training("published", inputs)


def test_training_in_bf16(device):
    inputs = drawn("any", 9, 2, 2, 40, 24, torch.bfloat16, device)
    check_training("published", inputs)


def test_training_under_autocast_gives_its_dtype(device):
    ids, _, x, gate, *matrices = drawn("any", 5, 2, 1, 40, 24, device=device)
    with autocast_on():
        y = train_experts(x, gate, ids, *matrices, *RECIPES["published"])
    with hidden_in_fp32(), torch.autocast(device, dtype=torch.bfloat16):
        wanted = scaled.train_experts(x, gate, ids, *matrices, *RECIPES["published"])
    assert y.dtype == wanted.dtype == torch.bfloat16
    assert error(y, wanted) < tolerance(torch.bfloat16)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x, g, i, a, b: run_experts(x[:, 1:], g, i, a, b), "run_experts: x must be"),
        (lambda x, g, i, a, b: run_experts(x, g[1:], i, a, b), "run_experts: gate must be"),
        (lambda x, g, i, a, b: run_experts(x, g, i, a[1:], b), "run_experts: w_gate_up must be"),
        (lambda x, g, i, a, b: run_experts(x, g, i, a, b[0]), "x, ids and w_down must be"),
        (lambda x, g, i, a, b: run_experts(x.double(), g, i, a, b), "x must be one of"),
        (
            lambda x, g, i, a, b: run_scaled_experts(x, g, i, blocks(a[1:]), blocks(b)),
            "run_scaled_experts: w_gate_up must be",
        ),
        (
            lambda x, g, i, a, b: train_experts(x, g, i, a, b, fp8.AFTER_ATTENTION, fp8.MOST),
            "train_experts: the input of experts must wait in E4M3, got into.cached E5M6",
        ),
    ],
)
def test_bad_input_is_named(call, words, device):
    ids, _, x, gate, *matrices = drawn(device=device)
    with pytest.raises(ValueError, match=words):
        call(x, gate, ids, *matrices)


# Planted bugs


def check_run(module: ModuleType) -> None:
    check(*drawn(tokens=5, experts=2, k=2, width=24, hidden=16), module=module)


def check_train(module: ModuleType) -> None:
    check_training("published", drawn("any", 5, 2, 2, 40, 24), module)


@pytest.mark.parametrize(
    ("check", "old", "new"),
    [
        (check_run, "grad_by_expert(dy, gated", "grad_by_expert(dy, d_halves[:, :16]"),
        (check_run, "return slots.visit // slots.place.shape[1]", "return slots.visit"),
        (check_train, "COLUMN, out.grad_scale)", "COLUMN, None)"),
        (check_train, "slots, dtypes[0], d_rows)", "slots, dtypes[0])"),
        (check_train, "d_into[:, n])", "d_into[:, 1 - n])"),
        (check_train, "slots, into.input_scale)", "slots, None)"),
        (check_train, "(_every_second(halves, n) for", "(_every_second(halves, 1 - n) for"),
    ],
    ids=["gated", "tokens", "grad scale", "sum of halves", "swapped", "columns", "up and gate"],
)
@pytest.mark.slow
def test_planted_bug_is_caught(check, old, new):
    if not cards.interpreted():
        pytest.skip("NOT RUN: bugs are planted where the interpreter runs, on CPU")
    assert_caught(moe_experts, check, old, new)


# Ring 2: all of it on tensors without memory; whoever waits for a number fails there


def on_meta(call: str, tokens: int, dtype: str = "bfloat16", D=7168, F=2048) -> None:
    kind, k, experts = getattr(torch, dtype), 8, 256
    number = partial(torch.empty, device="meta")
    x, gate = number(tokens, D, dtype=kind), number(tokens, k)
    ids = number(tokens, k, dtype=torch.int64)
    if call == "scaled":
        stacks = []
        for shape in ((experts, 2, F, D), (experts, D, F)):
            *batch, rows, cols = shape
            scale = number(*batch, -(-rows // 128), -(-cols // 128))
            values = number(shape, dtype=torch.float8_e4m3fn)
            stacks.append(Scaled(values, scale, (128, 128)))
        run_scaled_experts(x, gate, ids, *stacks)
        return
    master = torch.float32 if call == "train" else kind
    matrices = number(experts, 2, F, D, dtype=master), number(experts, D, F, dtype=master)
    inputs = [part.requires_grad_() for part in (x, gate, *matrices)]
    if call == "train":
        y = train_experts(inputs[0], inputs[1], ids, *inputs[2:], *RECIPES["published"])
    else:
        y = run_experts(inputs[0], inputs[1], ids, *inputs[2:])
    grads = torch.autograd.grad(y.sum(), inputs)
    assert [part.shape for part in grads] == [part.shape for part in inputs]


CALLS = [{"call": "run", "tokens": 4096}, {"call": "train", "tokens": 4096},
         {"call": "scaled", "tokens": 64}]  # fmt: skip


@pytest.mark.slow
def test_hopper_runs_all_of_it_from_registers():
    """Forward and backward at V3's widths: nothing is spilled, nobody waits for the GPU."""
    for call, launches in zip(
        CALLS, compile_calls("test_kernel_moe_experts", "on_meta", CALLS), strict=True
    ):
        spilled = [kernel for kernel in launches if kernel.spilled_bytes]
        assert not spilled, (call, spilled)


# Ring 3: on a card


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_v3_widths_on_a_card(dtype):
    check(*drawn("any", 20, 4, 2, 7168, 2048, dtype, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 20, 500])
def test_scaled_v3_widths_on_a_card(tokens):
    ids, _, x, gate, *matrices = drawn("any", tokens, 16, 8, 7168, 2048, torch.bfloat16, "cuda")
    stacks = [blocks(w) for w in matrices]
    found = run_scaled_experts(x, gate, ids, *stacks)
    with hidden_in_fp32():
        wanted = scaled.run_scaled_experts(x, gate, ids, *stacks)
    assert error(found, wanted) < tolerance(torch.bfloat16)


@pytest.mark.gpu
def test_training_at_v3_widths_on_a_card():
    inputs = drawn("any", 300, 4, 2, 7168, 2048, device="cuda")
    check_training("published", inputs)
    inputs = drawn("any", 300, 4, 2, 7168, 2048, torch.bfloat16, "cuda")
    check_training("published", inputs)


@pytest.mark.gpu
def test_twenty_runs_on_a_card_are_bitwise_equal():
    ids, dy, *inputs = drawn("any", 300, 8, 3, 1024, 512, torch.bfloat16, "cuda")
    bitwise_equal(partial(differentiated, run_experts, ids, dy, *inputs), times=20)

    def train(x, gate, ids, *matrices):
        return train_experts(x, gate, ids, *matrices, *RECIPES["published"])

    bitwise_equal(partial(differentiated, train, ids, dy, *inputs), times=20)


@pytest.mark.gpu
@pytest.mark.parametrize("call", ["run", "train"])
def test_graph_is_captured_and_replayed_with_other_numbers(call):
    """Forward and backward in one graph: other tokens go to other experts when it is replayed."""
    ids, dy, x, gate, *matrices = drawn("any", 100, 8, 3, 1024, 512, torch.bfloat16, "cuda")
    leaves = [part.requires_grad_() for part in (x, gate, *matrices)]

    def step() -> list[Tensor]:
        if call == "run":
            y = run_experts(leaves[0], leaves[1], ids, *leaves[2:])
        else:
            y = train_experts(leaves[0], leaves[1], ids, *leaves[2:], *RECIPES["published"])
        return [y, *torch.autograd.grad(y, leaves, dy)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles, which a capture must not
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    other_ids, other_dy, *others = drawn("all to one", 100, 8, 3, 1024, 512, torch.bfloat16, "cuda",
                                         seed=1)  # fmt: skip
    with torch.no_grad():
        for mine, theirs in zip((ids, dy, *leaves), (other_ids, other_dy, *others), strict=True):
            mine.copy_(theirs)
    graph.replay()
    torch.cuda.synchronize()
    for found, wanted in zip(captured, step(), strict=True):
        assert torch.equal(found, wanted)
