"""SwiGLU in Triton: equal to the equation in FP64, and to the quantised one code by code."""

import contextlib
import re
from typing import Any

import pytest
import torch
from compiled import CARDS, HOPPER, compile_calls
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import (
    LAYOUTS,
    SPECIAL,
    assert_caught,
    bits,
    bitwise_equal,
    gradients,
    is_written,
    laid_out,
    poisoned_memory,
    shapes,
    special,
)
from kernel_products import spread
from minids_kernels import cards, configs, ffn_swiglu
from minids_kernels.ffn_swiglu import (
    CANDIDATES,
    DTYPES,
    Columns,
    Tiles,
    gated_backward,
    gated_quantise,
    rule_of_thumb,
    swiglu,
    swiglu_quantise,
)
from minids_kernels.scaled import Scaled
from torch import Tensor

from minids.formats import groups
from minids.formats.groups import COLUMN, TILE
from minids.fused import swiglu as reference

pytestmark = pytest.mark.usefixtures("interpreter")

FORMATS = (None, "ue8m0")
SHAPE = (131, 133)  # ragged groups of 3 and 5 behind whole ones, no multiple of 4 or 16
# A card's exp2, its division and the product with log2(e) before exp2 are each off by up to two
# units of 2^-24; the last one's error is multiplied by the exponent. Interpreted, 2^-22 was seen.
EXACT, OF_GATE = 2.0**-20, 2.0**-23
ROUNDED = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# below the least normal number a card may give 0: of the sigmoid, and of FP16's results a half step
FLUSHED, HALF_STEP = 2.0**-125, 2.0**-25


@pytest.fixture(autouse=True)
def four_rows_a_program():
    """Let the interpreter, which takes long for a program, have few of them."""
    with contextlib.ExitStack() as stack:
        if cards.interpreted():
            stack.enter_context(configs.trying("ffn_swiglu.Tiles", Tiles(4, 512, 4)._asdict()))
        yield


def same(a: Scaled, b) -> bool:
    """Say whether two quantised matrices hold the same bits; a NaN has no sign and no digits."""
    return tuple(a.group) == tuple(b.group) and all(
        same_bits(*pair) for pair in zip(a[:2], b[:2], strict=True)
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    a, b = a.cpu().contiguous(), b.cpu().contiguous()
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    nan = a.float().isnan()
    return torch.equal(nan, b.float().isnan()) and bool(((bits(a) == bits(b)) | nan).all())


def draw(shape, dtype=torch.float32, device="cpu", seed=0) -> tuple[Tensor, Tensor]:
    """Return gate and up; groups differ in size by a factor of up to 2^8."""
    generator = torch.Generator().manual_seed(seed)
    gate, up = (torch.randn(shape, generator=generator) for _ in range(2))
    up *= 2.0 ** torch.randint(-4, 5, shape, generator=generator)
    return (4 * gate).to(dtype).to(device), up.to(dtype).to(device)


def exact(gate: Tensor, up: Tensor) -> Tensor:
    """Return the product in FP64 by the equation."""
    gate, up = gate.double().cpu(), up.double().cpu()
    return gate / (1 + torch.exp(-gate)) * up


def assert_close(got: Tensor, want: Tensor, size: Tensor, gate: Tensor) -> None:
    """Fail unless `got` is `want` rounded once, but for what FP32 loses.

    That is a share of the terms' `size` times the sigmoid, or all of a sigmoid close to 0.
    """
    assert got.shape == want.shape
    gate, size = gate.double().cpu(), size.abs()
    least = HALF_STEP if got.dtype == torch.float16 else FLUSHED
    lost = (EXACT + OF_GATE * gate.abs()) * size * gate.sigmoid() + FLUSHED * size + least
    excess = (got.cpu().double() - want).abs() - ROUNDED[got.dtype] * want.abs() - lost
    assert excess.max() <= 0, f"an error is too large by {float(excess.max())}"


def assert_forward(got: Tensor, gate: Tensor, up: Tensor) -> None:
    want = exact(gate, up)
    assert got.dtype == gate.dtype
    assert_close(got, want, gate.double().cpu() * up.double().cpu(), gate)


def assert_gradients(got, d: Tensor, gate: Tensor, up: Tensor) -> None:
    """Compare with FP64 autograd of the equation."""
    d, gate, up = (x.detach().cpu().double() for x in (d, gate, up))
    leaves = [gate.requires_grad_(), up.requires_grad_()]
    want = torch.autograd.grad(exact(*leaves), leaves, d)
    gate, up = gate.detach(), up.detach()
    terms = d * up * (1 + gate.abs() * gate.neg().sigmoid())  # they cancel near a gate of -1.28
    assert_close(got[0], want[0], terms, gate)
    assert_close(got[1], want[1], d * gate, gate)


def quantised(gate: Tensor, up: Tensor, group=TILE, scale_fmt=None, floor=0.0):
    """Return the reference's codes of the product that the kernel has in FP32."""
    return groups.quantise(swiglu(gate.float(), up.float()).cpu(), group, scale_fmt, floor)


def copies(shape, device="cpu", seed=0, scale_fmt=None) -> tuple[Any, Any]:
    """Return FP8 copies of gate and up."""
    return tuple(groups.quantise(x, TILE, scale_fmt) for x in draw(shape, device=device, seed=seed))


# Forward and backward


def test_example_by_hand(device):
    """sigmoid(ln 3) = 3/4; at 0 the gate is half open; at 100 it is open, at -100 closed."""
    ln_3 = 1.0986123
    gate = torch.tensor([ln_3, -ln_3, 0.0, 100.0, -100.0], device=device, requires_grad=True)
    up = torch.full((5,), 4.0, device=device, requires_grad=True)
    y = swiglu(gate, up)
    y.backward(torch.ones_like(y))
    assert y.tolist() == pytest.approx([3 * ln_3, -ln_3, 0, 400, 0], rel=1e-5)
    assert up.grad is not None
    assert up.grad.tolist() == pytest.approx([0.75 * ln_3, -0.25 * ln_3, 0, 100, 0], rel=1e-5)
    slope = [3 * (1 + ln_3 / 4), 1 - 0.75 * ln_3, 2, 4, 0]
    assert gate.grad is not None
    assert gate.grad.tolist() == pytest.approx(slope, rel=1e-5)


def test_codes_by_hand(device):
    """An open gate: 40 * 11.2 = 448, so the scale is 1; 40 * -0.3125 = -12.5 goes to even, -12."""
    gate, up = torch.full((1, 130), 40.0), torch.zeros(1, 130)
    up[0, :2], up[0, 128] = torch.tensor([11.2, -0.3125]), 22.4
    y = swiglu_quantise(gate.to(device), up.to(device))
    assert y.scale.tolist() == [[1.0, 2.0]]
    assert y.values.float()[0, :3].tolist() == [448.0, -12.0, 0.0]
    assert y.values.float()[0, 128:].tolist() == [448.0, 0.0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_equation_in_any_layout(dtype, layout, device):
    gate, up = draw((3, 600), dtype, device)
    assert_forward(swiglu(laid_out(gate, layout), laid_out(up, layout)), gate, up)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_equal_autograd_in_fp64(dtype, layout, device):
    gate, up = draw((3, 530), dtype, device)
    d = torch.randn(3, 530).to(dtype).to(device)
    leaves = [laid_out(x, layout).requires_grad_() for x in (gate, up)]
    found = torch.autograd.grad(swiglu(*leaves), leaves, laid_out(d, layout))
    assert all(x.dtype == dtype for x in found)
    assert_gradients(found, d, gate, up)


def test_gradients_are_the_slopes_of_the_product(device):
    """Central differences in FP64 of the equation, along one direction, in place of autograd."""
    gate, up = draw((3, 140), torch.float32, device)
    chance = torch.randn((3, 140), generator=torch.Generator().manual_seed(0)).bfloat16().double()
    found = gradients(swiglu, gate, up)
    gate, up, step = gate.cpu().double(), up.cpu().double(), 1e-6
    moved = [(exact(gate + s * gate, up - s * up) * chance).sum() for s in (step, -step)]
    slope = (moved[0] - moved[1]) / (2 * step)
    terms = found[0].cpu().double() * gate, found[1].cpu().double() * up
    room = EXACT * float(sum(term.abs().sum() for term in terms))
    assert float((terms[0] - terms[1]).sum()) == pytest.approx(float(slope), abs=room)


@settings(max_examples=6)
@given(shape=shapes(20, 1100), dtype=st.sampled_from(DTYPES))
def test_random_shapes(device, shape, dtype):
    gate, up = draw(shape, dtype, device)
    leaves = [gate.requires_grad_(), up.requires_grad_()]
    y = swiglu(*leaves)
    assert_forward(y.detach(), gate.detach(), up.detach())
    d = torch.randn(shape).to(dtype).to(device)
    assert_gradients(torch.autograd.grad(y, leaves, d), d, gate, up)


@pytest.mark.parametrize("shape", [(140,), (2, 3, 5, 70), (0, 4), (3, 0), (0, 3, 7)], ids=str)
def test_any_number_of_axes(shape, device):
    gate, up = draw(shape, torch.bfloat16, device)
    leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    y = swiglu(*leaves)
    assert y.shape == shape
    found = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert [x.shape for x in found] == [shape, shape]
    if gate.numel():
        assert_forward(y.detach(), gate, up)
        assert_gradients(found, torch.ones(shape), gate, up)


def test_halves_of_one_tensor_are_not_copied(device):
    """Neither forward, backward nor quantisation takes memory but for its results."""
    both = torch.cat(draw((2, 3, 160), torch.bfloat16, device), -1).requires_grad_()
    with poisoned_memory() as given:
        gate, up = both.chunk(2, -1)
        y = swiglu(gate, up)
        d = torch.ones_like(y).expand(2, 3, 160)
        assert [tuple(memory.x.shape) for memory in given] == [(2, 3, 160)]
        given.clear()
        torch.autograd.grad(y, (gate, up), d)
        assert [tuple(memory.x.shape) for memory in given] == [(2, 2, 3, 160)]
        given.clear()
        gated_quantise(gate.detach(), up.detach())
        assert [tuple(memory.x.shape) for memory in given] == [(6, 160), (2, 6)] * 3
    experts = torch.stack(draw((5, 160), torch.bfloat16, device), 1)  # [P, 2, F]
    assert_forward(swiglu(*experts.unbind(1)), *experts.unbind(1))


def test_gradient_that_is_one_number_for_all(device):
    gate, up = draw((3, 140), device=device)
    leaves = [gate.requires_grad_(), up.requires_grad_()]
    found = torch.autograd.grad(swiglu(*leaves).sum(), leaves)
    assert_gradients(found, torch.ones(3, 140), gate, up)


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_numbers_are_torchs(dtype, name, device):
    """Infinities and NaN stand where torch has them, of gate and of up."""
    odd = special(name, 1, 662, dtype, device)
    plain = draw((1, 662), dtype, device)[0]
    for gate, up in ((odd, plain), (plain, odd)):
        y = swiglu(gate, up).cpu()
        want = reference.swiglu(gate.cpu().float(), up.cpu().float())
        assert torch.equal(y.isnan(), want.isnan())
        finite = want.abs() < 0.99 * torch.finfo(dtype).max
        assert torch.equal(y[want.isinf()], want[want.isinf()].to(dtype))
        assert_forward(y[finite], gate.cpu()[finite], up.cpu()[finite])


# Quantised


@pytest.mark.parametrize("n", range(3))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_are_those_of_the_product_in_fp32(layout, n, device):
    dtype, scale_fmt = DTYPES[n], FORMATS[(n + len(layout)) % 2]
    gate, up = draw((3, 290), dtype, device)
    up[2] *= 1e-6  # tiles below the floor
    y = swiglu_quantise(laid_out(gate, layout), laid_out(up, layout), scale_fmt, 1e-4)
    assert same(y, quantised(gate, up, TILE, scale_fmt, 1e-4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_are_the_references_but_for_near_ties(dtype, device):
    """Each code is nearest to the product in FP64, or as near but for what FP32 loses of it."""
    gate, up = draw((8, 1500), dtype, device)
    y = swiglu_quantise(gate, up)
    y = Scaled(y.values.cpu(), y.scale.cpu(), TILE)
    want = exact(gate, up)
    right = groups.quantise(want.float())
    lost = EXACT + OF_GATE * gate.float().cpu().abs().max()
    assert ((y.scale - right.scale).abs() <= lost * right.scale).all()
    quotient = want / spread(y)
    nearest = (quotient - quotient.clamp(-448, 448).to(torch.float8_e4m3fn).double()).abs()
    assert ((quotient - y.values.double()).abs() <= nearest + lost * quotient.abs()).all()
    assert (y.values.float() != right.values.float()).float().mean() < 1e-3  # ties are rare


@pytest.mark.parametrize(
    ("dtype", "hidden_scale", "halves_scale"),
    [(torch.bfloat16, None, None), (torch.bfloat16, "ue8m0", "ue8m0"),
     (torch.float32, "ue8m0", None), (torch.float16, None, "ue8m0")],
)  # fmt: skip
def test_three_results_are_three_calls(dtype, hidden_scale, halves_scale, device):
    gate, up = draw((3, 300), dtype, device)
    gate[1] *= 1e-6
    up[2] *= 1e-6
    hidden, *halves = gated_quantise(gate, up, hidden_scale, halves_scale, 1e-4)
    assert same(hidden, swiglu_quantise(gate, up, hidden_scale, 1e-4))
    for got, x in zip(halves, (gate, up), strict=True):
        assert same(got, groups.quantise(x.cpu(), TILE, halves_scale))  # no floor


@pytest.mark.parametrize("name", ["infinities", "NaN", "any bits", "subnormals", "zeros"])
def test_special_numbers_are_quantised_as_the_reference_does(name, device):
    odd = special(name, 2, 331, torch.float32, device)
    plain = draw((2, 331), device=device)[0]
    for gate, up in ((odd, plain), (plain, odd)):
        hidden, *halves = gated_quantise(gate, up)
        assert same(hidden, quantised(gate, up))
        for got, x in zip(halves, (gate, up), strict=True):
            assert same(got, groups.quantise(x.cpu()))


@settings(max_examples=4)
@given(shape=shapes(12, 1100))
def test_random_shapes_are_quantised(device, shape):
    gate, up = draw(shape, torch.bfloat16, device)
    hidden, *halves = gated_quantise(gate, up)
    assert same(hidden, quantised(gate, up))
    assert same(halves[0], groups.quantise(gate.cpu()))
    assert same(halves[1], groups.quantise(up.cpu()))


@pytest.mark.parametrize("shape", [(2, 3, 140), (0, 5), (5, 0), (0, 3, 7)], ids=str)
def test_quantised_shapes(shape, device):
    gate, up = draw(shape, torch.bfloat16, device)
    y = swiglu_quantise(gate, up)
    assert y.values.shape == shape
    assert y.scale.shape == groups.scale_shape(shape, TILE)
    assert all(same(a, b) for a, b in zip(gated_quantise(gate, up), (y,), strict=False))
    if gate.numel():
        assert same(y, quantised(gate, up))
        assert y.values.stride()[-2:] == (144, 1)
        assert y.scale.stride() == (3, 1, 6)  # neighbouring rows side by side


# Backward from FP8 copies


@pytest.mark.parametrize(
    ("dtype", "scale_fmt"),
    [(torch.float32, None), (torch.bfloat16, "ue8m0"), (torch.float16, None)],
    ids=str,
)
def test_backward_from_copies(dtype, scale_fmt, device):
    gate, up = copies(SHAPE, device)
    d = torch.randn(SHAPE, device=device).to(dtype)
    d_gate, d_up, hidden = gated_backward(d, gate, up, scale_fmt, dtype)
    wide = [groups.dequantise(groups.Scaled(*x)) for x in (gate, up)]
    assert d_gate.dtype == d_up.dtype == dtype
    assert_gradients((d_gate, d_up), d, *wide)
    assert same(hidden, quantised(*wide, COLUMN, scale_fmt))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward_from_copies_in_any_layout(layout, device):
    gate, up = copies(SHAPE, device)
    d = torch.randn(SHAPE, device=device)
    odd = [Scaled(laid_out(x.values, layout), laid_out(x.scale, layout), TILE) for x in (gate, up)]
    assert all_same(gated_backward(laid_out(d, layout), *odd), gated_backward(d, gate, up))


@settings(max_examples=4)
@given(shape=shapes(140, 270))
def test_backward_from_copies_for_random_shapes(device, shape):
    gate, up = copies(shape, device)
    d = torch.randn(shape, device=device)
    *found, hidden = gated_backward(d, gate, up, "ue8m0", torch.bfloat16)
    wide = [groups.dequantise(groups.Scaled(*x)) for x in (gate, up)]
    assert_gradients(found, d, *wide)
    assert same(hidden, quantised(*wide, COLUMN, "ue8m0"))


def test_backward_from_copies_is_the_references(device):
    """The same formulas from the same numbers; only the card's exp2 differs from torch's."""
    gate, up = copies((130, 200), device)
    d = torch.randn(130, 200, device=device)
    got = gated_backward(d, gate, up)
    want = reference.gated_backward(d, groups.Scaled(*gate), groups.Scaled(*up))
    for a, b in zip(got[:2], want[:2], strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    differ = got[2].values.float() != want[2].values.float()
    assert differ.float().mean() < 1e-3


def test_special_copies(device):
    """Infinite scales give infinities and NaN; no group but theirs sees them."""
    gate, up = copies(SHAPE, device)
    gate.scale[3, 1], up.scale[7, 0], up.scale[130, 1] = torch.inf, torch.nan, torch.inf
    d = torch.randn(SHAPE, device=device)
    d_gate, _, hidden = gated_backward(d, gate, up)
    wide = [x.values.cpu().float() * spread(Scaled(x.values.cpu(), x.scale.cpu(), TILE)).float()
            for x in (gate, up)]  # fmt: skip
    assert same(hidden, quantised(*(x.to(device) for x in wide), COLUMN))
    rows = d_gate.cpu().isfinite().all(-1)
    assert rows.sum() == 128


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)], ids=str)
def test_backward_of_nothing(shape, device):
    d_gate, d_up, hidden = gated_backward(
        torch.empty(shape, device=device), *copies(shape, device), None, torch.bfloat16
    )
    assert d_gate.shape == d_up.shape == hidden.values.shape == shape
    assert hidden.scale.shape == groups.scale_shape(shape, COLUMN)


def test_hidden_lies_as_the_weights_gradient_reads_it(device):
    gate, up = copies(SHAPE, device)
    turned = gated_backward(torch.ones(SHAPE, device=device), gate, up)[2].mT
    assert turned.group == TILE
    assert turned.values.stride() == (144, 1)
    assert turned.values.data_ptr() % 16 == 0
    assert turned.scale.stride() == (1, 133)


# Memory, repetition, cards, configs


@pytest.mark.parametrize("shape", [(5, 133), (3, 16)], ids=str)
def test_every_output_is_written_and_nothing_else(shape, device):
    gate, up = draw(shape, torch.bfloat16, device)
    leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    with poisoned_memory():
        y = swiglu(*leaves)
        tiles = gated_quantise(gate, up)
        results = [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]
        *found, hidden = gated_backward(torch.ones(shape, device=device), *tiles[1:])
    for x in (*results, *found):
        assert is_written(x.detach())
    for x in (*tiles, hidden):
        assert is_written(x.values)
        assert is_written(x.scale)


def everything(gate, up, d) -> list:
    """Return the results of all four wrappers, autograd's too."""
    leaves = [gate.detach().requires_grad_(), up.detach().requires_grad_()]
    y = swiglu(*leaves)
    found = torch.autograd.grad(y, leaves, d.to(y.dtype))
    tiles = gated_quantise(gate, up)
    return [y.detach(), *found, swiglu_quantise(gate, up), *tiles, *gated_backward(d, *tiles[1:])]


def all_same(got, want) -> bool:
    """Say whether two lists of results hold the same bits."""
    return all(
        same_bits(a, b) if isinstance(a, Tensor) else same(a, b)
        for a, b in zip(got, want, strict=True)
    )


def test_two_runs_are_bitwise_equal(device):
    gate, up = draw((3, 270), torch.bfloat16, device)
    d = torch.randn(3, 270, device=device)
    bitwise_equal(lambda: everything(gate, up, d))


def test_cards_without_fp8_write_the_same_bytes(device, monkeypatch):
    gate, up = draw((3, 270), torch.bfloat16, device)
    d = torch.randn(3, 270, device=device)
    want = everything(gate, up, d)
    real = cards.card("a test", gate)
    monkeypatch.setattr(cards, "card", lambda *_: real._replace(capability=(8, 0)))
    assert all_same(everything(gate, up, d), want)


@pytest.mark.parametrize("config", CANDIDATES, ids=str)
def test_every_candidate_gives_the_same(config, device):
    gate, up = draw((3, 530), torch.bfloat16, device)
    d, halves = torch.randn(130, 140, device=device), copies((130, 140), device)

    def run() -> list:
        if isinstance(config, Tiles):
            return [swiglu(gate, up), *gated_quantise(gate, up)]
        return list(gated_backward(d, *halves))

    want = run()
    with configs.trying(f"ffn_swiglu.{type(config).__name__}", config._asdict()) as trial:
        got = run()
    assert trial.asked
    assert all_same(got, want)


@pytest.mark.parametrize("capability", CARDS)
def test_rule_of_thumb_fills_every_card(capability):
    model = CARDS[capability]
    card = cards.Card(model.name, capability, model.n_sm, model.shared_bytes)
    assert rule_of_thumb(4096, 18432, card) == Tiles(4, 512, 4)
    assert rule_of_thumb(1, 2048, card) == Tiles(1, 512, 2)
    assert {rule_of_thumb(4096, 18432, card), rule_of_thumb(1, 2048, card)} <= set(CANDIDATES)


BAD = [
    (lambda x, s: swiglu(x, x[:1]), "swiglu: gate and up must have one shape .*, got [2, 130]"),
    (lambda x, s: swiglu(x, x.half()), "swiglu: gate and up must have .* one dtype, got .*float16"),
    (lambda x, s: swiglu(x.double(), x.double()), "swiglu: gate must be one of .*float64: cast"),
    (lambda x, s: swiglu(x[0, 0], x[0, 0]), "swiglu: gate must have at least 1 axes, got 0"),
    (lambda x, s: swiglu_quantise(x[0], x[0]), "swiglu_quantise: gate must have at least 2 axes"),
    (lambda x, s: swiglu_quantise(x, x, "e8m0"), "swiglu_quantise: scale_fmt must be .*'e8m0'"),
    (lambda x, s: gated_quantise(x, x, "a"), "gated_quantise: hidden_scale must be .*'a'"),
    (lambda x, s: gated_quantise(x, x, None, "b"), "gated_quantise: halves_scale must be .*'b'"),
    (lambda x, s: gated_backward(x, s, s, "c"), "gated_backward: hidden_scale must be .*'c'"),
    (lambda x, s: gated_backward(x.double(), s, s), "gated_backward: d_hidden must be one of"),
    (lambda x, s: gated_backward(x, s, s, None, torch.int8), "gated_backward: dtype must be one"),
    (lambda x, s: gated_backward(x[0], s, s), "gated_backward: d_hidden must be a matrix, got sh"),
    (lambda x, s: gated_backward(x[:1], s, s), "gated_backward: gate must be [1, 130] as d_hidden"),
    (lambda x, s: gated_backward(x, s, s.mT), "gated_backward: up must be .*by tiles .*(128, 1)"),
    (
        lambda x, s: gated_backward(x, s, Scaled(x, s.scale, TILE)),
        "gated_backward: up must hold float8_e4m3fn and scales in float32, got torch.float32",
    ),
]


@pytest.mark.parametrize(("call", "words"), BAD)
def test_bad_input_is_named(call, words, device):
    x = torch.ones(2, 130, device=device)
    pattern = ".*".join(re.escape(part) for part in words.split(".*"))
    with pytest.raises(ValueError, match=pattern):
        call(x, copies((2, 130), device)[0])


def test_starts_of_rows_may_be_two_billion_numbers_apart(device):
    """Rows of one huge tensor: gate ahead of up; only their pages are ever touched."""
    step, width = 2**31 + 16, 160
    storage = torch.empty(step + 2 * width, dtype=torch.float16, device=device)
    rows = storage.as_strided((2, 2 * width), (step, 1))
    gate, up = draw((2, width), torch.float16, device)
    rows.copy_(torch.cat((gate, up), -1))
    halves = rows.chunk(2, -1)
    assert_forward(swiglu(*halves), gate, up)
    assert same(swiglu_quantise(*halves), swiglu_quantise(gate, up))


# Bugs that the tests above would see


def check_product(module) -> None:
    gate, up = draw((2, 530), torch.bfloat16)
    d = torch.randn(2, 530).bfloat16()
    leaves = [x.requires_grad_() for x in torch.cat((gate, up), -1).chunk(2, -1)]
    y = module.swiglu(*leaves)
    assert_forward(y.detach(), gate, up)
    assert_gradients(torch.autograd.grad(y, leaves, d), d, gate, up)


def check_quantised(module) -> None:
    gate, up = draw((2, 200), torch.bfloat16)
    up[1] *= 1e-6
    between_nan = (laid_out(x, "rows 3 apart") for x in (gate, up))
    hidden, *halves = module.gated_quantise(*between_nan, None, "ue8m0", 1e-4)
    assert same(hidden, quantised(gate, up, TILE, None, 1e-4))
    for got, x in zip(halves, (gate, up), strict=True):
        assert same(got, groups.quantise(x, TILE, "ue8m0"))


def check_copies(module) -> None:
    halves, d = copies((130, 140)), torch.randn(130, 140)
    *found, hidden = module.gated_backward(d, *halves)
    wide = [groups.dequantise(x) for x in halves]
    assert_gradients(found, d, *wide)
    assert same(hidden, quantised(*wide, COLUMN))


BUGS = {
    "up is the gate": (check_product, "u = _load(up, m, k, M, K, up_m, up_k)\n    _store",
                       "u = _load(gate, m, k, M, K, up_m, up_k)\n    _store"),
    "the gate is a sigmoid": (check_product, "_store(hidden, g * tl", "_store(hidden, tl"),
    "the mask is one wide": (check_quantised, "(k < K)[None, :]\n    return",
                             "(k <= K)[None, :]\n    return"),
    "a column is not stored": (check_product, "(k < K)[None, :]\n    to = y",
                               "(k < K - 1)[None, :]\n    to = y"),
    "the slope lacks a term": (check_product, "(1 + gate * (1 - sigmoid))", "1"),
    "gradients are exchanged": (check_product, "return found.unbind(0)",
                                "return found.flip(0).unbind(0)"),
    "halves have the floor": (check_quantised, "max(floor, SMALLEST), SMALLEST",
                              "*[max(floor, SMALLEST)] * 2"),
    "the product has no floor": (check_quantised, "max(floor, SMALLEST), SMALLEST",
                                 "SMALLEST, SMALLEST"),
    "halves in the product's format": (check_quantised, "steps_of(gate.dtype, halves_scale)",
                                       "steps_of(gate.dtype, hidden_scale)"),
    "scales of another group": (check_copies, "j.to(tl.int64) * up_scale_j", "0 * up_scale_j"),
    "a quarter is missing": (check_copies, "for q in tl.static_range(1, 4)",
                             "for q in tl.static_range(1, 3)"),
    "words in another order": (check_copies, "<< (8 * q)", "<< (24 - 8 * q)"),
    "scales of another row": (check_copies, "turned_scale + (g * K + k)", "turned_scale + k"),
    "quarters are rows of 32": (check_copies, "m = g * 128 + 4 * tl.arange(0, 32)",
                                "m = g * 128 + tl.arange(0, 32)"),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug):
    if not cards.interpreted():
        pytest.skip("NOT RUN: bugs are planted where the interpreter runs, on CPU")
    assert_caught(ffn_swiglu, *BUGS[bug])


# What the compiler makes of it for Hopper, and that it compiles for other cards


def launch(call: str, shape, dtype: str, config=None, scale_fmt=None) -> None:
    """Call a wrapper as on a GPU, on memory that is not there."""
    if config is None:
        _launch(call, *shape, getattr(torch, dtype), scale_fmt)
        return
    with configs.trying(*config) as trial:
        _launch(call, *shape, getattr(torch, dtype), scale_fmt)
    assert trial.asked, f"{call} asks for no {config[0]}"


def _launch(call: str, M: int, K: int, dtype: torch.dtype, scale_fmt) -> None:
    if call == "gated_backward":
        values = torch.empty(M, K, dtype=torch.float8_e4m3fn, device="meta")
        half = Scaled(values, torch.empty(-(-K // 128), M, device="meta").mT, TILE)
        gated_backward(torch.empty(M, K, device="meta"), half, half, scale_fmt, dtype)
        return
    gate, up = torch.empty(M, 2 * K, dtype=dtype, device="meta").chunk(2, -1)
    if call == "swiglu":
        y = swiglu(gate.requires_grad_(), up.requires_grad_())
        y.backward(torch.empty_like(y))
    elif call == "swiglu_quantise":
        swiglu_quantise(gate, up, scale_fmt)
    else:
        gated_quantise(gate, up, scale_fmt)


V3 = [(4096, 18432), (32768, 2048), (1, 2048), (128, 18432)]
CALLS = {Tiles: ("swiglu", "swiglu_quantise", "gated_quantise"), Columns: ("gated_backward",)}
BY_RULE = [
    {"call": call, "shape": shape, "dtype": dtype}
    for shape, dtype, calls in (
        (V3[0], "bfloat16", ("swiglu", "swiglu_quantise", "gated_quantise", "gated_backward")),
        (V3[0], "float32", ("gated_quantise", "gated_backward")),
        (V3[2], "bfloat16", ("gated_quantise",)),
    )
    for call in calls
]
TUNED = [
    {"call": call, "shape": V3[0], "dtype": "bfloat16", "scale_fmt": "ue8m0",
     "config": (f"ffn_swiglu.{type(config).__name__}", config._asdict())}
    for config in CANDIDATES for call in CALLS[type(config)]
]  # fmt: skip


@pytest.fixture(scope="module")
def compiled():
    found = compile_calls("test_kernel_ffn_swiglu", "launch", BY_RULE)
    return list(zip(BY_RULE, found, strict=True))


def test_nothing_spills_and_warps_hide_latency(compiled):
    """16 warps a multiprocessor, each with four 16-byte loads in flight, are 32 KiB on their way.

    A card of 3.35 TB/s and 700 ns to its memory needs 18 KiB on each of 132.
    """
    for call, kernels in compiled:
        assert len(kernels) == (2 if call["call"] == "swiglu" else 1), call
        for kernel in kernels:
            assert kernel.spilled_bytes == 0, call
            assert kernel.programs_on_an_sm * kernel.warps >= 16, (call, kernel)


def test_memory_is_moved_16_bytes_at_a_time(compiled):
    """Scales by 4; codes of a card's quarter by 8, as threads of a short row have of theirs."""
    for call, kernels in compiled:
        for kernel in kernels:
            loads = {name for name in kernel.instructions if name.startswith("LDG")}
            stores = {name for name in kernel.instructions if name.startswith("STG")}
            if call["call"] == "gated_backward":
                assert loads == {"LDG.128", "LDG.64", "LDG"}, (call, loads)
                assert stores == {"STG.128", "STG"}, (call, stores)
            else:
                assert loads == {"LDG.128"}, (call, loads)
                wide = {"STG.128"} if call["call"] == "swiglu" else {"STG.128", "STG.64", "STG"}
                assert stores <= wide, (call, stores)


def test_only_the_sigmoid_is_approximate(compiled):
    for call, kernels in compiled:
        for kernel in kernels:
            assert set(kernel.inexact) == {"ex2.approx.f32", "div.full.f32"}, call
            assert len(set(kernel.inexact.values())) == 1, call  # one of each a number


@pytest.mark.slow
def test_no_candidate_spills():
    for call, kernels in zip(
        TUNED, compile_calls("test_kernel_ffn_swiglu", "launch", TUNED), strict=True
    ):
        assert all(kernel.spilled_bytes == 0 for kernel in kernels), call


@pytest.mark.slow
@pytest.mark.parametrize("capability", [card for card in CARDS if card != HOPPER], ids=str)
def test_compiles_for_other_cards(capability):
    calls = [call for call in BY_RULE if call["shape"] == V3[0]]
    for kernels in compile_calls("test_kernel_ffn_swiglu", "launch", calls, capability):
        assert all(kernel.spilled_bytes == 0 for kernel in kernels)


# What only a GPU can show


@pytest.mark.gpu
@pytest.mark.parametrize("shape", V3, ids=str)
def test_v3_shapes_on_a_card(shape):
    gate, up = draw(shape, torch.bfloat16, "cuda")
    d = torch.randn(shape, device="cuda").bfloat16()
    leaves = [x.requires_grad_() for x in torch.cat((gate, up), -1).chunk(2, -1)]
    y = swiglu(*leaves)
    found = torch.autograd.grad(y, leaves, d)
    hidden, *halves = gated_quantise(gate, up, None, None, 1e-4)
    *of_copies, again = gated_backward(d, *halves)
    rows = slice(-min(64, shape[0]), None)  # the last ones: FP64 on the CPU takes long
    assert_forward(y.detach()[rows], gate[rows], up[rows])
    assert_gradients([x[rows] for x in found], d[rows], gate[rows], up[rows])
    assert same(hidden, quantised(gate, up, TILE, None, 1e-4))
    wide = [groups.dequantise(groups.Scaled(*x)) for x in halves]
    assert_gradients([x[rows] for x in of_copies], d[rows], *(x[rows] for x in wide))
    assert same(again, quantised(*wide, COLUMN))


@pytest.mark.gpu
def test_twenty_runs_are_bitwise_equal():
    gate, up = draw((4096, 2048), torch.bfloat16, "cuda")
    d = torch.randn(4096, 2048, device="cuda")
    bitwise_equal(lambda: everything(gate, up, d), times=20)


@pytest.mark.gpu
def test_is_captured_in_a_graph_and_replayed_with_new_numbers():
    gate, up = draw((300, 1000), torch.bfloat16, "cuda")
    d = torch.randn(300, 1000, device="cuda")
    everything(gate, up, d)  # compiles, which a capture must not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything(gate, up, d)
    for x, fresh in zip((gate, up), draw((300, 1000), torch.bfloat16, seed=1), strict=True):
        x.copy_(fresh)
    graph.replay()
    torch.cuda.synchronize()
    assert all_same(captured, everything(gate, up, d))
