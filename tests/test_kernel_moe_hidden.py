"""Gradients of the experts' hidden layer: equal to autograd's of the equation, in FP64."""

from functools import partial
from types import ModuleType

import pytest
import torch
from compiled import CARDS, HOPPER, compile_calls
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_experts import (
    LOADS,
    among_experts,
    draw_ids,
    is_empty,
    slots_by_loop,
    spoil,
    weights,
)
from kernel_inputs import (
    LAYOUTS,
    assert_caught,
    bits,
    bitwise_equal,
    is_written,
    laid_out,
    poisoned_memory,
)
from kernel_products import error
from minids_kernels import cards, configs, moe_hidden
from minids_kernels.cards import Card
from minids_kernels.moe_hidden import CANDIDATES, DTYPES, Hidden, hidden_gradients, rule_of_thumb
from minids_kernels.slots import Slots, n_slots
from torch import Tensor

pytestmark = pytest.mark.usefixtures("interpreter")

KERNEL = "moe_hidden.Hidden"
# Relative to the norm. FP32: sums in another order, and the card's exp. 16 bits: products of them
# are exact in FP32, what is written is rounded once, the gated rows twice; 2^-9 and 2^-12 at most.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
# The gradient of a visit's weight stays in FP32, of hidden rows that were rounded. It may cancel:
# relative to what it would be without signs.
OF_WEIGHTS = {torch.float32: 1e-6, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


def drawn(
    load="any", tokens=40, experts=4, k=2, size=16, width=48, hidden=40, dtype=torch.float32,
    device="cpu", seed=0,
) -> tuple[Slots, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return slots, dy, w_down, gate, and halves with NaN in empty slots."""
    generator = torch.Generator().manual_seed(seed)
    slots = slots_by_loop(draw_ids(load, tokens, experts, k, device), experts, size)
    w_down = weights(experts, width, hidden, dtype, device, seed)[1]
    dy, gate, halves = (
        torch.randn(*shape, generator=generator).to(device)
        for shape in ((tokens, width), (tokens, k), (len(slots.visit), 2, hidden))
    )
    halves = spoil(halves.to(dtype), is_empty(slots))
    return slots, dy.to(dtype), w_down, gate, halves


def exact(
    slots: Slots, dy: Tensor, w_down: Tensor, gate: Tensor, halves: Tensor
) -> tuple[Tensor, ...]:
    """Return d_halves and gated rows of each visit, d_gate and its size without signs, in FP64."""
    (tokens, k), place = gate.shape, slots.place.long()
    leaves = [halves.double()[place].requires_grad_(), gate.double().requires_grad_()]
    g, up = leaves[0].unbind(2)
    gated = g / (1 + (-g).exp()) * up * leaves[1][..., None]
    owner = slots.expert.long().repeat_interleave(slots.size)[place]
    w = w_down.double()
    y = torch.stack(
        [torch.stack([w[owner[t, i]] @ gated[t, i] for i in range(k)]) for t in range(tokens)]
    )
    d_halves, d_gate = torch.autograd.grad((y * dy.double()[:, None]).sum(), leaves)
    sizes = (y.detach() / leaves[1].detach()[..., None]).norm(dim=-1) * dy.double().norm(dim=-1)[
        :, None
    ]
    return d_halves, gated.detach(), d_gate, sizes


def check(slots, dy, w_down, gate, halves, module: ModuleType = moe_hidden) -> None:
    with poisoned_memory():
        d_halves, gated, d_gate = module.hidden_gradients(dy, w_down, gate, halves, slots)
    of_halves, of_gated, of_gate, sizes = exact(slots, dy, w_down, gate, halves)
    place, (empty, owned) = slots.place.long(), (is_empty(slots), among_experts(slots))
    for found, wanted in ((d_halves, of_halves), (gated, of_gated)):
        assert found.dtype == dy.dtype
        assert is_written(found[place])
        assert error(found[place], wanted) < TOLERANCE[dy.dtype]
        assert (found[empty & owned] == 0).all()
        behind = found[~owned]
        with poisoned_memory():
            untouched = torch.empty_like(behind)
        assert bool((bits(behind) == bits(untouched)).all()), "written behind the end"
    assert d_gate.dtype == torch.float32
    assert ((d_gate.double() - of_gate).abs() / sizes).max() < OF_WEIGHTS[dy.dtype]


def test_example_by_hand(device):
    """One visit, widths 1: g = 0 and up = 4 give hidden 0; d_g = gate dy w up / 2 = 2*3*5*4/2."""
    slots = slots_by_loop(torch.zeros(1, 1, dtype=torch.int64, device=device), 1, 16)
    halves = torch.zeros(16, 2, 1, device=device)
    halves[0, 1] = 4.0
    three, five, two = (torch.full((1, 1), n, device=device) for n in (3.0, 5.0, 2.0))
    d_halves, gated, d_gate = hidden_gradients(three, five[None], two, halves, slots)
    assert d_halves[0].flatten().tolist() == [60.0, 0.0]
    assert gated[0].item() == 0
    assert d_gate.item() == 0
    halves[0, 0] = 100.0  # its sigmoid is 1: hidden 400, u = 15
    d_halves, gated, d_gate = hidden_gradients(three, five[None], two, halves, slots)
    assert d_halves[0].flatten().tolist() == [120.0, 3000.0]
    assert (gated[0].item(), d_gate.item()) == (800.0, 6000.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("load", LOADS)
def test_equal_autograd_in_fp64(load, dtype, device):
    check(*drawn(load, dtype=dtype, device=device))


@pytest.mark.parametrize(("tokens", "experts", "k"), [(1, 4, 2), (5, 3, 3), (1, 1, 1), (70, 2, 1)])
def test_one_token_and_all_experts(tokens, experts, k, device):
    check(*drawn("any", tokens, experts, k, device=device))


@pytest.mark.parametrize("config", CANDIDATES, ids=str)
def test_every_candidate(config, device):
    """More columns than a tile and steps than one, both ragged; several tiles an expert."""
    size = max(16, config.BLOCK_M)
    inputs = drawn(
        tokens=max(20, size + 1), experts=2, k=1, size=size, width=100, hidden=config.BLOCK_N + 24,
        load="all to one", dtype=torch.bfloat16, device=device,
    )  # fmt: skip
    with configs.trying(KERNEL, config._asdict()) as trial:
        check(*inputs)
    assert trial.asked


@settings(max_examples=6)
@given(
    st.integers(1, 40), st.integers(1, 6), st.integers(1, 4), st.integers(1, 140),
    st.integers(1, 140), st.sampled_from([16, 64, 128]), st.sampled_from(DTYPES),
)  # fmt: skip
def test_random_shapes(device, tokens, experts, k, width, hidden, size, dtype):
    experts = max(experts, k)
    check(*drawn("any", tokens, experts, k, size, width, hidden, dtype, device))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, device):
    """What descriptors cannot describe is copied; dy and gate are read as they lie."""
    slots, *inputs = drawn(device=device)
    wanted = hidden_gradients(*inputs, slots)
    found = hidden_gradients(*(laid_out(x, layout) for x in inputs), slots)
    owned = among_experts(slots)
    for x, y in zip(found, wanted, strict=True):
        rows = owned if len(x) == len(owned) else slice(None)
        assert torch.equal(x[rows], y[rows])


def test_gradient_that_is_one_number_for_all(device):
    slots, dy, *rest = drawn(device=device)
    same = torch.ones((), device=device).expand_as(dy)
    found = hidden_gradients(same, *rest, slots)[2]
    assert torch.equal(found, hidden_gradients(same.contiguous(), *rest, slots)[2])


def test_weights_of_another_expert_do_not_reach_a_ragged_last_step(device):
    """Width 40 leaves half a step of 16 to the next expert's rows: NaN there must not be read."""
    slots, dy, w_down, gate, halves = drawn("few of many", width=40, device=device)  # 0 is empty
    w_down[0] = torch.nan
    check(slots, dy, w_down, gate, halves)
    slots, dy, w_down, gate, halves = drawn("last is empty", width=40, device=device)
    w_down[-1] = torch.nan
    check(slots, dy, w_down, gate, halves)


def test_two_runs_are_bitwise_equal(device):
    slots, *inputs = drawn(dtype=torch.bfloat16, device=device)
    owned = among_experts(slots)

    def run():
        d_halves, gated, d_gate = hidden_gradients(*inputs, slots)
        return d_halves[owned], gated[owned], d_gate

    bitwise_equal(run)


def test_cards_whose_warps_multiply_alone(monkeypatch, device):
    inputs = drawn(size=64, dtype=torch.bfloat16, device=device)
    real = cards.card("a test", inputs[1])
    monkeypatch.setattr(cards, "card", lambda *_: real._replace(capability=(8, 0)))
    check(*inputs)


def test_no_tokens(device):
    slots, dy, w_down, gate, halves = drawn(device=device)
    none = Slots(slots.visit[:0], slots.place[:0], slots.start * 0, slots.expert[:0], 16)
    found = hidden_gradients(dy[:0], w_down, gate[:0], halves[:0], none)
    assert [tuple(x.shape) for x in found] == [(0, 2, 40), (0, 40), (0, 2)]


@pytest.mark.parametrize("capability", CARDS)
def test_rule_of_thumb_takes_tiles_that_fit_in_an_experts(capability):
    model = CARDS[capability]
    card = Card(model.name, capability, model.n_sm, model.shared_bytes)
    for size in (16, 64, 128):
        for itemsize in (2, 4):
            config = rule_of_thumb(size, itemsize, card)
            assert config in CANDIDATES
            assert size % config.BLOCK_M == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s, dy, w, g, h: (dy[1:], w, g, h, s), "dy must be .40, 48. beside"),
        (lambda s, dy, w, g, h: (dy, w, g.mT, h, s), "gate must be"),
        (lambda s, dy, w, g, h: (dy, w, g, h[:, :1], s), "halves must be"),
        (lambda s, dy, w, g, h: (dy, w[0], g, h, s), "w_down one an expert"),
        (lambda s, dy, w, g, h: (dy, w.half(), g, h, s), "must share one of .*float16"),
        (lambda s, dy, w, g, h: (dy, w, g, h, s._replace(size=8)), "multiple of 16, got 8"),
    ],
)
def test_bad_input_is_named(change, words, device):
    with pytest.raises(ValueError, match=f"hidden_gradients: .*{words}"):
        hidden_gradients(*change(*drawn(device=device)))


def test_offsets_pass_two_billion(device):
    """Experts, tokens and slots two billion numbers apart, in memory that nobody else touches."""
    slots, dy, w_down, gate, halves = drawn(tokens=3, experts=3, k=1, width=4, hidden=8,
                                            dtype=torch.bfloat16, device=device)  # fmt: skip
    far = []
    for x in (dy, w_down):
        step = 2**30 + 64
        strides = (step, *x.stride()[1:])
        storage = torch.empty((len(x) - 1) * step + x[0].numel(), dtype=x.dtype, device=device)
        far.append(storage.as_strided(x.shape, strides).copy_(x))
    wanted, found = (hidden_gradients(*pair, gate, halves, slots) for pair in ((dy, w_down), far))
    owned = among_experts(slots)
    assert torch.equal(found[0][owned], wanted[0][owned])
    assert torch.equal(found[2], wanted[2])


# Planted bugs


def small(module: ModuleType) -> None:
    check(*drawn(tokens=20, experts=6, k=3, size=64, width=70, hidden=70), module=module)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("a = tl.load(rows, mask=inside", "a = tl.load(rows - dy_row, mask=inside"),
        ("(k < K - begin)", "(k < K - begin - 1)"),
        ("range(0, K, BLOCK_K)", "range(0, K - BLOCK_K, BLOCK_K)"),
        ("w_desc.load([e, begin,", "w_desc.load([e, 0,"),
        ("visits % TOP * gate_col", "0 * gate_col"),
        ("hidden = tl.where(filled, hidden, 0.0)", "hidden = hidden"),
        ("of_row = tl.sum(sums * hidden, 1)", "of_row = tl.sum(sums * hidden * weight, 1)"),
        ("    sums *= weight\n", ""),
        ("* (1 + g * (1 - sigmoid))", "* (1 + g)"),
        ("d_halves.store([m, 1, n], of_up", "d_halves.store([m, 1, n], hidden"),
        ("n += sums.shape[1] // 2", "n += 0"),
        ("for _ in range(n_parts):", "for _ in range(n_parts - 1):"),
        ("if e >= 0:", "if e >= -1:"),
        ("filled = visits < V", "filled = visits <= V"),
    ],
    ids=["row", "mask", "last step", "step", "weight", "empty", "weight twice", "no weight",
         "derivative", "swapped", "halves", "last part", "behind", "filled"],
)  # fmt: skip
def test_planted_bug_is_caught(old, new):
    if not cards.interpreted():
        pytest.skip("NOT RUN: bugs are planted where the interpreter runs, on CPU")
    assert_caught(moe_hidden, small, old, new)


# Ring 2: what the compiler makes of it


def on_meta(dtype: str, size: int, config: dict | None = None) -> None:
    """Launch at V3's widths on memory that is not there."""
    kind, (tokens, k, experts) = getattr(torch, dtype), (4096, 8, 256)
    P = n_slots(tokens * k, experts, size)
    whole = partial(torch.empty, dtype=torch.int32, device="meta")
    slots = Slots(whole(P), whole(tokens, k), whole(experts + 1), whole(P // size), size)
    inputs = partial(torch.empty, dtype=kind, device="meta")
    arguments = inputs(tokens, 7168), inputs(experts, 7168, 2048)
    gate = torch.empty(tokens, k, device="meta")
    with configs.trying(KERNEL if config else "", config):
        hidden_gradients(*arguments, gate, inputs(P, 2, 2048), slots)


def calls() -> list[dict]:
    found = [{"dtype": "bfloat16", "size": max(16, config.BLOCK_M), "config": config._asdict()}
             for config in CANDIDATES]  # fmt: skip
    found += [{"dtype": "float32", "size": 128}]
    return found


@pytest.mark.slow
def test_hopper_runs_every_candidate_from_registers():
    """No spills, wgmma of BF16 where tiles are 64 rows high, operands by bulk loads."""
    compiled = compile_calls("test_kernel_moe_hidden", "on_meta", calls())
    for call, (kernel, sums) in zip(calls(), compiled, strict=True):
        found, config = kernel.instructions, call.get("config")
        assert kernel.spilled_bytes == sums.spilled_bytes == 0, (call, kernel)
        assert found.get("UTMALDG"), (call, kernel)
        assert found.get("UTMASTG"), (call, kernel)
        if call["dtype"] != "float32" and (config is None or config["BLOCK_M"] >= 64):
            assert found.get("HGMMA"), (call, kernel)
            assert "HMMA" not in found, (call, kernel)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [card for card in CARDS if card != HOPPER], ids=str)
def test_other_cards_compile(capability):
    wanted = [{"dtype": "bfloat16", "size": 128}]
    if capability == (8, 9):
        wanted.append({"dtype": "float32", "size": 128})
    for kernel, _ in compile_calls("test_kernel_moe_hidden", "on_meta", wanted, capability):
        assert kernel.spilled_bytes <= 8, kernel  # sm_120 keeps 8 bytes and never looks
        assert not kernel.instructions.get("LDL"), kernel


# Ring 3: on a card


@pytest.mark.gpu
@pytest.mark.parametrize("config", CANDIDATES, ids=str)
def test_every_candidate_on_a_card(config: Hidden):
    inputs = drawn(tokens=300, experts=8, k=3, size=max(16, config.BLOCK_M), width=1000,
                   hidden=config.BLOCK_N + 72, dtype=torch.bfloat16, device="cuda")  # fmt: skip
    with configs.trying(KERNEL, config._asdict()):
        check(*inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_v3_widths_on_a_card(dtype):
    check(*drawn(tokens=100, experts=16, k=8, size=128, width=7168, hidden=2048, dtype=dtype,
                 device="cuda"))  # fmt: skip


@pytest.mark.gpu
def test_twenty_runs_on_a_card_are_bitwise_equal():
    slots, *inputs = drawn(tokens=300, experts=8, k=3, size=128, width=1024, hidden=1024,
                           dtype=torch.bfloat16, device="cuda")  # fmt: skip
    owned = among_experts(slots)

    def run():
        d_halves, gated, d_gate = hidden_gradients(*inputs, slots)
        return d_halves[owned], gated[owned], d_gate

    bitwise_equal(run, times=20)
