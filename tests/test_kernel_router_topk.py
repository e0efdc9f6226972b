"""Routing in Triton: the experts that minids.router.route chooses, ties too, and their weights."""

import contextlib
import re
from typing import NamedTuple

import pytest
import torch
from compiled import CARDS, HOPPER, compile_calls
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import (
    LAYOUTS,
    assert_caught,
    bitwise_equal,
    is_written,
    laid_out,
    poisoned_memory,
)
from minids_kernels import cards, configs, router_topk
from minids_kernels.router_topk import CANDIDATES, Routes, Tokens, route, rule_of_thumb
from torch import Tensor

from minids import router

pytestmark = pytest.mark.usefixtures("interpreter")


KERNEL = "router_topk.Tokens"


class How(NamedTuple):
    """What `route` is told beside the numbers."""

    groups: int
    keep: int
    best: int
    k: int
    normalise: bool
    scale: float


V3 = (256, True, How(8, 4, 2, 8, True, 2.5))
V2 = (160, False, How(8, 3, 1, 6, False, 16.0))  # groups of 20
LITE = (64, False, How(1, 1, 1, 6, False, 1.0))
ODD = (30, True, How(5, 3, 2, 7, True, 1.0))
ALL = (12, True, How(4, 2, 2, 12, True, 1.0))  # every expert: dropped ones come last
CASES = [V3, V2, LITE, ODD, ALL]
MARGIN = 1e-5  # of choices: within it the card's exp may order two experts in its own way
# A card's exp2, the product with log2(e) before it and a division are each off by up to two units
# of 2^-24, the product times its exponent
EXACT, OF_LOGIT = 2.0**-20, 2.0**-23
GRADIENT = 4e-6  # of the largest term; FP32, terms cancel in softmax and in normalised gates


def draw(tokens: int, experts: int, biased: bool, device="cpu", seed=0):
    """Return logits and biases, both signs of the same size as differences of scores."""
    generator = torch.Generator().manual_seed(seed)
    logit = 2 * torch.randn(tokens, experts, generator=generator)
    bias = 0.3 * torch.randn(experts, generator=generator)
    return logit.to(device), bias.to(device) if biased else None


@pytest.fixture(autouse=True)
def four_tokens_a_program():
    """Let the interpreter, which takes long for a program, have few of them."""
    with contextlib.ExitStack() as stack:
        if cards.interpreted():
            stack.enter_context(configs.trying(KERNEL, Tokens(4, 1)._asdict()))
        yield


def routed(logit, bias, how, module=router_topk) -> Routes:
    """Route in memory that was full of NaN."""
    with poisoned_memory():
        routes = module.route(logit, bias, *how)
    return Routes(*(x.cpu() for x in routes))


def scores(logit: Tensor, biased: bool) -> Tensor:
    wide = logit.detach().cpu().double()
    return 1 / (1 + torch.exp(-wide)) if biased else wide.softmax(-1)


def choose(score: Tensor, bias: Tensor | None, how: How) -> Tensor:
    """Return the experts by the reference's steps, from these scores, with ties."""
    choice = score if bias is None else score + bias.cpu().to(score)
    return router.top(router.limit_groups(choice, how.groups, how.keep, how.best), how.k)


def decided(score: Tensor, bias: Tensor | None, how: How) -> Tensor:
    """Say which tokens have no two choices, of experts or of groups, within MARGIN."""
    choice = score if bias is None else score + bias.cpu().to(score)
    limited = router.limit_groups(choice, how.groups, how.keep, how.best)
    first = limited.sort(-1, descending=True).values[:, : how.k + 1]
    gaps = first[:, :-1] - first[:, 1:]
    gaps = torch.nn.functional.pad(gaps.nan_to_num(1.0), (0, 1), value=1.0).amin(-1)  # of -inf: NaN
    if how.keep < how.groups:
        parts = choice.unflatten(-1, (how.groups, -1)).topk(how.best).values.sum(-1)
        worth = parts.sort(-1, descending=True).values
        gaps = gaps.minimum(worth[:, how.keep - 1] - worth[:, how.keep])
    return gaps > MARGIN


def weights(score: Tensor, ids: Tensor, how: How) -> Tensor:
    gate = score.gather(-1, ids)
    return how.scale * (gate / (gate.sum(-1, keepdim=True) + 1e-20) if how.normalise else gate)


def assert_routes(routes: Routes, logit: Tensor, bias: Tensor | None, how: How) -> None:
    """Compare with FP64; ids also with the reference's of the scores that the kernel has."""
    logit = logit.detach().cpu()
    assert [x.dtype for x in routes] == [torch.float32, torch.int64, torch.float32, torch.int64]
    want = scores(logit, bias is not None)
    spread = logit.abs() if bias is not None else logit.amax(-1, keepdim=True) - logit
    assert ((routes.score - want).abs() <= (EXACT + OF_LOGIT * spread) * want + 2.0**-125).all()
    assert torch.equal(routes.ids, choose(routes.score, bias, how))
    exact = weights(routes.score.double(), routes.ids, how)
    assert ((routes.gate - exact).abs() <= EXACT * exact + 2.0**-125).all()
    assert torch.equal(routes.load, routes.ids.flatten().bincount(minlength=logit.shape[1]))
    sure = decided(want, bias, how)
    assert torch.equal(routes.ids[sure], choose(want, bias, how)[sure])


def test_example_by_hand(device):
    """Scores 0.5, 1, 0.5, 0.5 and 0, 0.5, 1, 0.5: the bias of the last picks it, at its score."""
    big = 200.0
    logit = torch.tensor([[0, big, 0, 0], [-big, 0, big, 0]], device=device)
    bias = torch.tensor([0.0, 0.0, 0.0, 2.0], device=device)
    y = route(logit, bias, 1, 1, 1, 2, True, 3.0)
    assert y.ids.tolist() == [[3, 1], [3, 2]]
    assert y.gate.flatten().tolist() == pytest.approx([1.0, 2.0, 1.0, 2.0])
    assert y.score.tolist() == [[0.5, 1.0, 0.5, 0.5], [0.0, 0.5, 1.0, 0.5]]
    assert y.load.tolist() == [0, 1, 1, 2]
    y = route(logit, bias, 2, 1, 1, 2, False, 1.0)  # the second group holds the best
    assert y.ids.tolist() == [[3, 2], [3, 2]]
    assert y.gate.tolist() == [[0.5, 0.5], [0.5, 1.0]]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_reference(case, device):
    experts, biased, how = case
    logit, bias = draw(9, experts, biased, device)
    y = routed(logit, bias, how)
    assert_routes(y, logit, bias, how)
    sure = decided(scores(logit, biased), bias, how)
    assert sure.float().mean() > 0.8  # of what was drawn, to be compared with
    right = router.route(logit.cpu(), None if bias is None else bias.cpu(), *how)
    assert torch.equal(y.ids[sure], right.ids[sure])
    assert torch.allclose(y.gate[sure], right.gate[sure], rtol=1e-5)
    if sure.all():
        assert torch.equal(y.load, right.load)


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0 and d <= 64]


@st.composite
def any_how(draw_from, most_best=2):
    """Draw what to tell `route`; sums of more than two choices are rounded in any order."""
    experts = draw_from(st.integers(1, 70) | st.sampled_from([127, 128, 129, 160]))
    groups = draw_from(st.sampled_from(divisors(experts)))
    keep = draw_from(st.integers(1, groups))
    best = draw_from(st.integers(1, min(most_best, experts // groups)))
    k = draw_from(st.integers(1, min(experts, 9)))
    return (
        experts,
        draw_from(st.booleans()),
        How(groups, keep, best, k, draw_from(st.booleans()), 2.5),
    )


@settings(max_examples=12)
@given(case=any_how(), tokens=st.integers(1, 6))
def test_random_shapes(device, case, tokens):
    experts, biased, how = case
    logit, bias = draw(tokens, experts, biased, device)
    assert_routes(routed(logit, bias, how), logit, bias, how)


def exact_numbers(tokens: int, experts: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return logits whose scores are 0, 1/2 and 1 everywhere, and biases of the same steps."""
    generator = torch.Generator().manual_seed(seed)

    def pick(values, *shape):
        values = torch.tensor(values)
        return values[torch.randint(len(values), shape, generator=generator)]

    logit = pick([-200.0, 0.0, 200.0, -torch.inf, torch.inf], tokens, experts)
    return logit, pick([-1.5, -0.5, -0.0, 0.0, 0.5, -torch.inf], experts)


@settings(max_examples=12)
@given(case=any_how(most_best=5), seed=st.integers(0, 1000))
def test_ties_go_to_the_lower_index(device, case, seed):
    """Nothing but ties: of experts, of groups, at the last place that is taken."""
    experts, _, how = case
    logit, bias = exact_numbers(4, experts, seed)
    y = routed(logit.to(device), bias.to(device), how)
    right = router.route(logit, bias, *how)
    assert torch.equal(y.score, right.score)
    assert torch.equal(y.ids, right.ids)
    assert torch.equal(y.load, right.load)
    assert torch.allclose(y.gate, right.gate, rtol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equal_logits_choose_the_first(case, device):
    experts, biased, how = case
    logit = torch.full((1, experts), 0.7, device=device)
    y = routed(logit, torch.zeros(experts, device=device) if biased else None, how)
    assert y.ids.tolist() == [list(range(how.k))]


def test_equal_groups_are_kept_from_the_first(device):
    """Worths 1, 1.5, 1, 1.5: the two larger; and of equal ones the first two."""
    logit = torch.zeros(2, 8, device=device)
    logit[0, 3] = logit[0, 6] = 200.0
    bias = torch.zeros(8, device=device)
    y = routed(logit, bias, How(4, 2, 2, 4, False, 1.0))
    assert y.ids.tolist() == [[3, 6, 2, 7], [0, 1, 2, 3]]


def test_negative_choices_are_not_beaten_by_dropped_groups(device):
    """Choices of -0.5 in the group that is kept, -0.7 in the other: a 0 there would be chosen."""
    logit = torch.zeros(1, 4, device=device)
    bias = torch.tensor([-1.2, -1.2, -1.0, -1.0], device=device)
    y = routed(logit, bias, How(2, 1, 2, 2, True, 1.0))
    assert y.ids.tolist() == [[2, 3]]
    assert y.gate[0].tolist() == pytest.approx([0.5, 0.5])


def test_biases_of_minus_infinity_tie_with_dropped_groups(device):
    logit = torch.zeros(1, 6, device=device)
    bias = torch.tensor([-9.0, -9.0, 0.0, -torch.inf, 1.0, -torch.inf], device=device)
    how = How(3, 2, 1, 6, False, 1.0)
    assert routed(logit, bias, how).ids.tolist() == [[4, 2, 0, 1, 3, 5]]
    assert router.route(logit.cpu(), bias.cpu(), *how).ids.tolist() == [[4, 2, 0, 1, 3, 5]]


def test_zeros_of_both_signs_are_equal(device):
    """A score of 0 and a bias of -0 give 0: no choice is ever -0."""
    logit = torch.full((1, 4), -torch.inf, device=device)
    bias = torch.tensor([-0.0, 0.0, -0.0, 0.0], device=device)
    assert routed(logit, bias, How(2, 1, 2, 4, True, 1.0)).ids.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("case", [V3, V2, ODD], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_nan_is_the_largest_and_stays_in_its_row(case, sign, device):
    """Softmax makes a row of NaN out of one: all tie, the first win. As torch's stable sort."""
    experts, biased, how = case
    logit, bias = draw(4, experts, biased)
    spoiled = logit.clone()
    spoiled[1, [7, 21]] = torch.copysign(torch.tensor(torch.nan), torch.tensor(float(sign)))
    on_device = None if bias is None else bias.to(device)
    y = routed(spoiled.to(device), on_device, how)
    right, plain = router.route(spoiled, bias, *how), router.route(logit, bias, *how)
    assert torch.equal(y.ids, right.ids)
    assert y.ids[1, :2].tolist() == ([7, 21] if biased else [0, 1])
    assert torch.equal(y.score.isnan(), right.score.isnan())
    assert torch.equal(y.gate.isnan(), right.gate.isnan())
    assert torch.equal(y.load, right.load)
    others = [0, 2, 3]
    assert torch.equal(y.ids[others], plain.ids[others])
    assert y.gate[others].isfinite().all()


@pytest.mark.parametrize("biased", [True, False])
def test_infinite_logits(biased, device):
    """A logit of inf has score 1; softmax of it is NaN, as in torch."""
    logit, bias = draw(3, 16, biased)
    logit[0, 5], logit[1, 6], logit[2, :] = torch.inf, -torch.inf, -torch.inf
    how = How(4, 2, 2, 3, True, 1.0)
    y = routed(logit.to(device), None if bias is None else bias.to(device), how)
    right = router.route(logit, bias, *how)
    assert torch.equal(y.ids, right.ids)
    assert torch.equal(y.score.isnan(), right.score.isnan())
    assert torch.allclose(y.gate, right.gate, rtol=1e-5, equal_nan=True)


def test_underflowed_scores_are_weighed_with_zeros(device):
    """The sum of k zeros has 1e-20 added: gates are 0, not NaN."""
    logit = torch.full((1, 8), -200.0, device=device)
    y = routed(logit, torch.zeros(8, device=device), How(1, 1, 1, 3, True, 2.5))
    assert y.gate.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout, device):
    experts, _, how = ODD
    logit, bias = draw(5, experts, True, device)
    apart = laid_out(bias[None, :].repeat(2, 1), "every second column")[1]
    y = routed(laid_out(logit, layout), apart, how)
    for a, b in zip(y, routed(logit, bias, how), strict=True):
        assert torch.equal(a, b)


def test_starts_of_rows_may_be_two_billion_numbers_apart(device):
    """Only two rows of the huge tensor are ever touched."""
    step, (experts, _, how) = 2**31 + 16, ODD
    logit, bias = draw(2, experts, True, device)
    storage = torch.empty(step + experts, dtype=torch.float32, device=device)
    rows = storage.as_strided((2, experts), (step, 1))
    rows.copy_(logit)
    y = route(rows, bias, *how)
    assert_routes(Routes(*(x.cpu() for x in y)), logit, bias, how)


@pytest.mark.parametrize("experts", [1, 512])
def test_one_expert_and_the_most(experts, device):
    logit, bias = draw(2, experts, True, device)
    groups = min(8, experts)
    how = How(groups, max(groups // 2, 1), min(2, experts // groups), min(8, experts), True, 2.5)
    assert_routes(routed(logit, bias, how), logit, bias, how)


def test_no_tokens(device):
    logit = torch.empty(0, 8, device=device, requires_grad=True)
    y = route(logit, torch.zeros(8, device=device), 2, 1, 2, 3, True, 1.0)
    assert [tuple(x.shape) for x in y] == [(0, 3), (0, 3), (0, 8), (8,)]
    assert y.load.tolist() == [0] * 8
    (d,) = torch.autograd.grad((y.gate, y.score), logit, (y.gate.detach(), y.score.detach()))
    assert d.shape == (0, 8)


def test_all_tokens_to_the_same_experts(device):
    """The load counts every token: additions of several programs to one number."""
    logit = torch.arange(8.0, device=device).expand(11, 8)
    y = route(logit, torch.zeros(8, device=device), 1, 1, 1, 2, True, 1.0)
    assert y.load.tolist() == [0] * 6 + [11, 11]


# Gradients


def gradients(logit, biased, ids, how, d_gate, d_score) -> Tensor:
    """Return autograd's in FP64 of the equations, for experts that were chosen."""
    leaf = logit.detach().cpu().double().requires_grad_()
    score = 1 / (1 + torch.exp(-leaf)) if biased else leaf.softmax(-1)
    gate = weights(score, ids.cpu(), how)
    total = sum((y * d.cpu().double()).sum() for y, d in ((gate, d_gate), (score, d_score))
                if d is not None)  # fmt: skip
    return torch.autograd.grad(total, leaf)[0]


@pytest.mark.parametrize("given", ["both", "gate", "score"])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("case", [V3, V2, ODD, ALL], ids=str)
def test_gradients_equal_autograd_in_fp64(case, normalise, given, device):
    experts, biased, how = case
    how = how._replace(normalise=normalise)
    logit, bias = draw(3, experts, biased, device)
    logit.requires_grad_()
    y = route(logit, bias, *how)
    d_gate = torch.randn(3, how.k, device=device) if given != "score" else None
    d_score = torch.randn(3, experts, device=device) if given != "gate" else None
    pairs = [(a, b) for a, b in ((y.gate, d_gate), (y.score, d_score)) if b is not None]
    (found,) = torch.autograd.grad([a for a, _ in pairs], logit, [b for _, b in pairs])
    right = gradients(logit, biased, y.ids, how, d_gate, d_score)
    assert found.dtype == torch.float32
    assert (found.cpu() - right).abs().max() < GRADIENT * right.abs().max()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_in_any_layout(layout, device):
    experts, _, how = ODD
    logit, bias = draw(5, experts, True, device)
    logit.requires_grad_()
    y = route(logit, bias, *how)
    grads = torch.randn(5, how.k, device=device), torch.randn(5, experts, device=device)
    want = torch.autograd.grad((y.gate, y.score), logit, grads, retain_graph=True)
    odd = [laid_out(x, layout) for x in grads]
    with poisoned_memory():
        found = torch.autograd.grad((y.gate, y.score), logit, odd)
    assert torch.equal(found[0], want[0])


def test_gradient_that_is_one_number_for_all(device):
    """What a sum gives back has steps of 0."""
    experts, biased, how = V2
    logit, bias = draw(3, experts, biased, device)
    logit.requires_grad_()
    y = route(logit, bias, *how)
    (found,) = torch.autograd.grad(y.gate.sum() + (y.score * y.score).sum(), logit)
    right = gradients(logit, biased, y.ids, how, torch.ones(3, how.k), 2 * y.score.detach())
    assert (found.cpu() - right).abs().max() < GRADIENT * right.abs().max()


def test_ids_and_load_have_no_gradient(device):
    logit, bias = draw(2, 8, True, device)
    bias.requires_grad_()
    y = route(logit.requires_grad_(), bias, 2, 1, 2, 3, True, 1.0)
    assert [x.requires_grad for x in y] == [True, False, True, False]
    y.gate.sum().backward()
    assert bias.grad is None


# Memory, repetition, configs


@pytest.mark.parametrize("config", CANDIDATES, ids=str)
def test_every_candidate_gives_the_same(config, device):
    """A token's result is the same whatever lies beside it."""
    experts, _, how = ODD
    logit, bias = draw(6, experts, True, device)
    logit.requires_grad_()

    def run(x: Tensor) -> list[Tensor]:
        y = route(x, bias, *how)
        return [*y, *torch.autograd.grad((y.gate, y.score), x, (y.gate.detach(), y.score.detach()))]

    want = run(logit)
    with configs.trying(KERNEL, config._asdict()) as trial, poisoned_memory():
        got = run(logit)
        alone = run(logit[2:3].detach().requires_grad_())
    assert len(trial.asked) == 2  # backward takes what forward took
    for a, b, c in zip(want, got, alone, strict=True):
        assert is_written(b.detach())
        assert torch.equal(a, b)
        assert len(a) == experts or torch.equal(a[2:3], c)


def test_two_runs_are_bitwise_equal(device):
    logit, bias = draw(5, 30, True, device)
    bitwise_equal(lambda: route(logit, bias, *ODD[2]))


@pytest.mark.parametrize("capability", CARDS)
def test_rule_of_thumb_gives_a_warp_to_each_token_of_a_small_batch(capability):
    model = CARDS[capability]
    card = cards.Card(model.name, capability, model.n_sm, model.shared_bytes)
    assert rule_of_thumb(1024, card) == Tokens(1, 1)
    assert rule_of_thumb(16384, card) == Tokens(2, 1)
    assert {rule_of_thumb(m, card) for m in (1, 16384)} <= set(CANDIDATES)


BAD = [
    (lambda x, b: route(x[0], b, 1, 1, 1, 1, True, 1.0), "logit must be a matrix of float32, got"),
    (lambda x, b: route(x.half(), b, 1, 1, 1, 1, True, 1.0), "logit must be .*torch.float16: res"),
    (lambda x, b: route(x.new_ones(1, 513), None, 1, 1, 1, 1, True, 1.0), "1 to 512 .*got 513"),
    (lambda x, b: route(x, b[:7], 1, 1, 1, 1, True, 1.0), "bias must be [8] of float32, got [7]"),
    (lambda x, b: route(x, b.long(), 1, 1, 1, 1, True, 1.0), "bias must be .* of torch.int64"),
    (lambda x, b: route(x, b, 3, 1, 1, 1, True, 1.0), "groups must be a divisor of the 8 .*got 3"),
    (lambda x, b: route(x, b, 0, 1, 1, 1, True, 1.0), "groups must be a divisor of the 8 .*got 0"),
    (lambda x, b: route(x.new_ones(1, 128), None, 128, 1, 1, 1, True, 1.0), "at most 64, got 128"),
    (lambda x, b: route(x, b, 4, 5, 1, 1, True, 1.0), "keep must be 1 to 4, got 5"),
    (lambda x, b: route(x, b, 4, 2, 3, 1, True, 1.0), "best must be 1 to 2, got 3"),
    (lambda x, b: route(x, b, 4, 2, 1, 9, True, 1.0), "k must be 1 to 8, got 9"),
    (lambda x, b: route(x, b, 4, 2, 1, 0, True, 1.0), "k must be 1 to 8, got 0"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "words"), BAD)
def test_bad_input_is_named(call, words, device):
    pattern = "route: .*" + ".*".join(re.escape(part) for part in words.split(".*"))
    with pytest.raises(ValueError, match=pattern):
        call(torch.zeros(2, 8, device=device), torch.zeros(8, device=device))


# Bugs that the tests above would see


def check_choice(module) -> None:
    """Compare what a copy of the kernel's file chooses with the reference."""
    for (experts, biased, how), seed in ((ODD, 0), (ALL, 2), (V2, 3)):
        logit, bias = draw(3, experts, biased, seed=seed)
        assert_routes(routed(logit, bias, how, module), logit, bias, how)
        logit, bias = exact_numbers(4, experts, seed)
        bias = bias.clamp(min=-2.0)
        y = routed(logit, bias, how, module)
        assert torch.equal(y.ids, router.route(logit, bias, *how).ids)


def check_gradients(module) -> None:
    for experts, biased, how in (ODD, (30, False, ODD[2])):
        logit, bias = draw(3, experts, biased)
        y = module.route(logit.requires_grad_(), bias, *how)
        d_gate, d_score = torch.randn(3, how.k), torch.randn(3, experts)
        (found,) = torch.autograd.grad((y.gate, y.score), logit, (d_gate, d_score))
        right = gradients(logit, biased, y.ids, how, d_gate, d_score)
        assert (found - right).abs().max() < GRADIENT * right.abs().max()


def check_nan(module) -> None:
    logit, bias = draw(1, 30, True)
    logit[0, 11] = -torch.tensor(torch.nan)
    y = routed(logit, bias, ODD[2], module)
    assert torch.equal(y.ids, router.route(logit, bias, *ODD[2]).ids)


BUGS = {
    "dropped groups get 0": (check_choice, "_DROPPED = tl.constexpr(-2139095041)",
                             "_DROPPED = tl.constexpr(0)"),
    "the last of equal experts": (
        check_choice,
        "tl.min(tl.where(order == tl.expand_dims(largest, AXIS), place, _SIGN), AXIS)",
        "tl.max(tl.where(order == tl.expand_dims(largest, AXIS), place, -1), AXIS)",
    ),
    "the last of equal groups": (check_choice, "(g[None, :] < g[:, None])",
                                 "(g[None, :] > g[:, None])"),
    "negative numbers in reverse": (check_choice, "tl.where(x == x, bits ^ ((bits >> 31) & _SIGN)",
                                    "tl.where(x == x, bits"),
    "a group is worth its best": (check_choice, "in tl.static_range(BEST - 1)",
                                  "in tl.static_range(0)"),
    "a group too many": (check_choice, "2) < KEEP", "2) <= KEEP"),
    "gates are biased": (check_choice, "x = tl.load(logit + taken.to(tl.int64) * logit_e, mask",
                         "x = 0.1 + tl.load(logit + taken.to(tl.int64) * logit_e, mask"),
    "gates are not scaled": (check_choice, "weight * scale, mask", "weight, mask"),
    "padding is a logit of 0": (check_choice, 'mask=inside, other=-float("inf"))',
                                "mask=inside, other=0.0)"),
    "the load counts padding": (check_choice, "tl.int64), wanted, sem", "tl.int64), None, sem"),
    "NaN is the least": (check_nan, "& _SIGN), _SIGN)", "& _SIGN), _DROPPED)"),
    "the normaliser has no slope": (check_gradients, "tl.sum(given * chosen, 1) / total",
                                    "tl.sum(given * chosen, 1) * 0"),
    "softmax has no shift": (check_gradients, "s * (d - tl.sum(d * s, 1)[:, None])", "s * d"),
    "an expert is missing": (check_gradients, "            ids += 1\n", ""),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug):
    if not cards.interpreted():
        pytest.skip("NOT RUN: bugs are planted where the interpreter runs, on CPU")
    assert_caught(router_topk, *BUGS[bug])


# What the compiler makes of it for Hopper, and that it compiles for other cards


def launch(experts: int, biased: bool, how: list, tokens: int = 1024, config=None) -> None:
    """Route as on a GPU, on memory that is not there, and back."""
    empty = lambda *shape: torch.empty(shape, device="meta")  # noqa: E731
    logit, bias = empty(tokens, experts).requires_grad_(), empty(experts) if biased else None
    with configs.trying(KERNEL, config):
        y = route(logit, bias, *how)
        grads = empty(tokens, how[3]), empty(tokens, experts)
        torch.autograd.grad((y.gate, y.score), logit, grads)


def calls_of(cases, config: Tokens | None = None) -> list[dict]:
    config = config and config._asdict()
    return [{"experts": n, "biased": biased, "how": how, "config": config}
            for n, biased, how in cases]  # fmt: skip


@pytest.fixture(scope="module")
def compiled():
    calls = calls_of([V3, V2])
    return list(zip(calls, compile_calls("test_kernel_router_topk", "launch", calls), strict=True))


def test_nothing_spills_and_all_small_batches_run_at_once(compiled):
    """1024 tokens are 8 programs on each of 132 multiprocessors."""
    for call, kernels in compiled:
        assert [kernel.kernel for kernel in kernels] == ["_choose", "_differentiate"], call
        for kernel in kernels:
            assert kernel.spilled_bytes == 0, call
            assert kernel.warps == 1, call
            assert kernel.programs_on_an_sm >= 32, call


def test_logits_and_scores_move_16_bytes_at_a_time(compiled):
    """Groups of 20 lie 16 bytes apart too: of them 8 bytes are read back."""
    for call, (forward, backward) in compiled:
        if call["experts"] == 256:
            assert forward.instructions["LDG.128"] == 4, call  # 8 logits and 8 biases a thread
            assert forward.instructions["STG.128"] == 2, call
            assert forward.instructions["LDG"] == 1, call  # of the chosen experts
        assert backward.instructions["STG.128"] == 2, call


@pytest.mark.slow
def test_no_candidate_spills():
    calls = [call for config in CANDIDATES for call in calls_of([V3], config)]
    calls += calls_of([LITE, ODD, (512, True, V3[2])])
    for call, kernels in zip(
        calls, compile_calls("test_kernel_router_topk", "launch", calls), strict=True
    ):
        assert all(kernel.spilled_bytes == 0 for kernel in kernels), call


@pytest.mark.slow
@pytest.mark.parametrize("capability", [card for card in CARDS if card != HOPPER], ids=str)
def test_compiles_for_other_cards(capability):
    calls = calls_of([V3, V2])
    for kernels in compile_calls("test_kernel_router_topk", "launch", calls, capability):
        assert all(kernel.spilled_bytes == 0 for kernel in kernels)


# What only a GPU can show


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("tokens", [1, 128, 1024, 16385])
def test_batches_on_a_card(tokens, case):
    experts, biased, how = case
    logit, bias = draw(tokens, experts, biased, "cuda")
    y = route(logit, bias, *how)
    assert_routes(Routes(*(x.cpu() for x in y)), logit, bias, how)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(5))
def test_ties_on_a_card(seed):
    for experts, _, how in CASES:
        logit, bias = exact_numbers(500, experts, seed)
        y, right = route(logit.cuda(), bias.cuda(), *how), router.route(logit, bias, *how)
        assert torch.equal(y.ids.cpu(), right.ids)
        assert torch.equal(y.load.cpu(), right.load)


@pytest.mark.gpu
def test_gradients_of_large_batches_on_a_card():
    for experts, biased, how in CASES:
        logit, bias = draw(5000, experts, biased, "cuda")
        y = route(logit.requires_grad_(), bias, *how)
        grads = torch.randn(5000, how.k, device="cuda"), torch.randn(5000, experts, device="cuda")
        (found,) = torch.autograd.grad((y.gate, y.score), logit, grads)
        right = gradients(logit, biased, y.ids, how, *grads)
        assert (found.cpu() - right).abs().max() < GRADIENT * right.abs().max()


@pytest.mark.gpu
def test_twenty_runs_are_bitwise_equal():
    logit, bias = draw(4096, 256, True, "cuda")
    bitwise_equal(lambda: route(logit, bias, *V3[2]), times=20)


@pytest.mark.gpu
def test_is_captured_in_a_graph_and_replayed_with_new_numbers():
    logit, bias = draw(1024, 256, True, "cuda")
    logit.requires_grad_()

    def run() -> list[Tensor]:
        y = route(logit, bias, *V3[2])
        return [*y, *torch.autograd.grad((y.gate, y.score), logit, (y.gate, y.score))]

    run()  # compiles, which a capture must not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        logit.copy_(draw(1024, 256, True, seed=1)[0])
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, run(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_offsets_pass_two_billion():
    tokens = 2**31 // 256 + 300
    needed = tokens * (2 * 256 * 4 + 16 * 12)
    if torch.cuda.mem_get_info()[0] < 1.2 * needed:
        pytest.skip(f"NOT RUN: needs {1.2 * needed / 2**30:.0f} GiB of free memory on the GPU")
    logit = torch.zeros(tokens, 256, device="cuda")
    last, bias = draw(300, 256, True, "cuda")
    logit[-300:] = last
    y, want = route(logit, bias, *V3[2]), route(last, bias, *V3[2])
    for a, b in zip(y[:3], want[:3], strict=True):
        assert torch.equal(a[-300:], b)
    assert int(y.load.sum()) == 8 * tokens
