"""Mistakes others make: a property for each, which minids has and the planted mistake has not.

A property takes an implementation; CASES names the one of minids and the wrong ones of
mistakes_*.py, each with the words of the assertion that must catch it. The mistake "draft accepted
without verification" is in test_generate.py.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import equations
import mistakes_fp8 as eight_bits
import mistakes_layers as layers
import mistakes_training as training
import pytest
import torch
import torch.nn.functional as F

from minids import Config, Transformer, balance, fp8, preset, router
from minids.attention import causal_mask
from minids.block import Block
from minids.cache import Cache, CacheLayer
from minids.count import count
from minids.mla import MLA
from minids.model import Losses
from minids.mtp import MTP, shift
from minids.rope import frequencies, phases, softmax_scale
from minids.router import Router
from minids.schedule import Rates
from minids.train import make_optimizer, take_step

NEAR = 1e-4  # relative; FP32 rounding stays below it, every planted mistake far above


def near(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).norm() <= NEAR * other.norm())


def draw(module: torch.nn.Module) -> torch.nn.Module:
    """Give a module seeded weights; gains stay 1."""
    for name, weight in module.named_parameters():
        if not name.endswith("gain"):
            torch.nn.init.normal_(weight, std=0.5)
    return module


# router


def route(cls: type[Router], logits: list[float], bias: list[float] | None = None):
    """Return what a router of width 1 makes of one token with these logits, K = 2."""
    one = dict(n_expert_groups=1, n_limited_groups=1)
    module = cls(preset("toy", dim=1, n_routed_experts=len(logits), **one))
    with torch.no_grad():
        module.centroids[:, 0] = torch.tensor(logits)
        if bias is not None:
            module.bias.copy_(torch.tensor(bias))
        gate, ids, score = module(torch.ones(1, 1))[:3]
    return dict(zip(ids[0].tolist(), gate[0].tolist(), strict=True)), score[0].tolist()


def property_bias_picks_and_does_not_weigh(cls):
    logits = [0.3, -0.4, 0.1]
    weights, _ = route(cls, logits, [1.0, 1.0, 0.0])
    shifted, _ = route(cls, logits, [1.5, 1.0, 0.0])
    assert set(weights) == set(shifted) == {0, 1}, "the set was to stay"
    assert weights == pytest.approx(shifted, rel=NEAR), "the bias reached the weights"


def property_affinities_do_not_compete(cls):
    weights, score = route(cls, [0.0, math.log(3), -2.0])
    _, moved = route(cls, [0.0, math.log(3), -0.5])
    assert score[:2] == pytest.approx(moved[:2], rel=NEAR), "a third expert moved the scores"
    assert weights[1] == pytest.approx(1.5 * weights[0], rel=NEAR), "no ratio of sigmoids"


def property_dropped_groups_stay_dropped(limit_groups):
    cfg = preset("toy", n_routed_experts=32, n_activated_experts=8, n_expert_groups=4)
    module = draw(Router(cfg))
    module.bias.fill_(-1.5)  # every biased score is negative
    with mock.patch.object(router, "limit_groups", limit_groups):
        _, ids, score = module(torch.randn(50, cfg.dim))[:3]
    worth = (score + module.bias).unflatten(-1, (4, 8)).topk(2).values.sum(-1)
    kept = worth.topk(cfg.n_limited_groups).indices.tolist()
    for picks, groups in zip(ids.tolist(), kept, strict=True):
        assert {pick // 8 for pick in picks} <= set(groups), "a pick lies outside the kept groups"


def property_a_small_router_has_a_bias(cls):
    module = draw(cls(preset("toy")))
    assert "bias" in module.state_dict(), "no buffer"
    module.bias[5] = 100.0
    assert (module(torch.randn(9, 8))[1] == 5).any(-1).all(), "it picks nothing"


# latent attention


def attention(cls: type[MLA], **changes) -> MLA:
    return draw(cls(preset("toy", norm_eps=1e-12, **changes)))


def attend(mla: MLA, x: torch.Tensor, start: int = 0, cache=None) -> torch.Tensor:
    """Run a layer on tokens at positions from `start` on, naive form."""
    at = torch.arange(x.shape[1])[None]
    phase = phases(at + start, frequencies(mla.cfg))
    return mla(x, phase, causal_mask(at, at[0]), cache, absorb=False)


def remembered(cls: type[MLA], n_heads: int) -> int:
    """Count the numbers a token that a layer gives to its cache."""
    mla, widths = attention(cls, n_heads=n_heads), []

    def append(_layer, new):
        widths.append(new.shape[-1])
        return new

    layer = Cache(1, 1, 4, 1, like=torch.zeros(())).layer(0)
    with mock.patch.object(CacheLayer, "append", append), torch.no_grad():
        attend(mla, torch.randn(1, 3, 8), cache=layer)
    return sum(widths)


def property_cache_does_not_grow_with_heads(cls):
    assert remembered(cls, n_heads=2) == remembered(cls, n_heads=6), "it grows with the heads"


def property_cache_holds_latent_and_rotary_key(cls):
    assert remembered(cls, n_heads=2) == 4 + 2, "other numbers are cached"  # C + R of toy


def property_formula_equals_measured_bytes(elements):
    cfg = preset("toy", n_layers=3)
    model = Transformer(cfg)
    cache = model.new_cache(batch=1, capacity=5)
    model(torch.zeros(1, 5, dtype=torch.int64), cache=cache)  # it fills every number
    assert cache.store.ne(0).all()
    assert cache.nbytes == 4 * 5 * elements(cfg), "formula and cache differ"


def property_rotary_key_bypasses_the_latent(cls):
    mla, x = attention(cls), torch.randn(1, 5, 8)
    phase = phases(torch.arange(5)[None], frequencies(mla.cfg))
    key = mla.latents(x, phase)[..., 4:]
    with torch.no_grad():
        mla.w_dkv.weight[:4] *= -1  # another latent
    assert mla.latents(x, phase)[..., 4:].equal(key), "the key follows the latent"


def property_order_matters_and_distance_alone(cls):
    mla, x = attention(cls), torch.randn(1, 6, 8)
    other = x[:, [2, 0, 4, 1, 3, 5]]
    last = attend(mla, x)[:, -1]
    assert not near(attend(mla, other)[:, -1], last), "blind to the order of the past"
    assert near(attend(mla, x, start=7)[:, -1], last), "absolute positions"


def property_queries_are_the_same_in_evaluation(cls):
    mla, x = attention(cls), torch.randn(1, 6, 8)
    trained = attend(mla.train(), x)
    assert near(attend(mla.eval(), x), trained), "evaluation takes another path"


def property_scale_of_a_down_projection_is_forgotten(cls):
    mla, x = attention(cls), torch.randn(1, 6, 8)
    before = attend(mla, x)
    with torch.no_grad():
        mla.w_dkv.weight[:4] *= 3
        assert near(attend(mla, x), before), "the KV latent has no norm"
        mla.w_dq.weight *= 3
        assert near(attend(mla, x), before), "the query latent has no norm"


class Yarn(NamedTuple):
    frequencies: Callable[[Config], torch.Tensor] = frequencies
    softmax_scale: Callable[[Config], float] = softmax_scale


def property_yarn_beyond_position_0(yarn):
    cfg = preset("toy", qk_rope_head_dim=16, rope_factor=8.0, original_seq_len=64, mscale=0.6,
                 max_seq_len=512, beta_fast=8.0, init_std=0.5)  # fmt: skip
    with (
        mock.patch("minids.model.frequencies", yarn.frequencies),
        mock.patch("minids.mla.softmax_scale", yarn.softmax_scale),
    ):
        model = Transformer(cfg)
    ids = torch.randint(cfg.vocab_size, (1, 20))
    with torch.no_grad():
        loop = equations.forward(equations.weights_of(model), cfg, ids[0].tolist()).logits[0]
        logits = model(ids)[0].double()
    assert near(logits[0], loop[0]), "position 0 attends to itself: any YaRN is right there"
    assert near(logits[1:], torch.stack(loop)[1:]), "wrong beyond position 0"


# multi-token prediction


def property_loss_does_not_follow_the_future(chosen_shift):
    model = draw(Transformer(preset("toy", mtp_depth=1)))
    tokens, states, i = torch.randperm(32)[None, :10], [], 4
    model.mtp[0].register_forward_hook(lambda _module, _inputs, output: states.append(output[0]))
    future = tokens[0, i + 2 :]  # the target of position i and what comes after it
    with mock.patch("minids.model.shift", chosen_shift), torch.no_grad():
        model.losses(tokens)
        model.embed[future] = model.embed[future.roll(1)]
        model.losses(tokens)
    assert near(states[1][0, : i + 1], states[0][0, : i + 1]), "the state follows its own target"


def predictor(cls: type[MTP]) -> MTP:
    cfg = preset("toy")
    return draw(cls(cfg, Block(cfg, index=1)))


def predict(module: MTP, hidden: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    at = torch.arange(hidden.shape[1])[None]
    phase = phases(at + 1, frequencies(module.block.attn.cfg))
    return module(hidden, embedding, phase, causal_mask(at, at[0]))[0]


def property_gradient_reaches_the_next_word_and_not_the_one_after(cls):
    hidden, embedding = torch.randn(2, 1, 7, 8, requires_grad=True).unbind(0)
    out, i = predict(predictor(cls), hidden, embedding)[0, 3].sin().sum(), 3
    grads = torch.autograd.grad(out, [hidden, embedding], materialize_grads=True)
    from_state, from_word = (grad[0].abs().sum(-1) for grad in grads)
    assert from_word[i] > 0, "Emb(t_(i+1)) is not read"
    assert not from_word[i + 1 :].any(), "Emb(t_(i+2)) is read"
    assert not from_state[i + 1 :].any(), "a later state is read"
    assert (from_state[:i] > 0).all(), "no block: the past is not read"


def property_the_left_half_of_the_merge_reads_the_embedding(cls):
    module = predictor(cls)
    hidden, embedding, other = torch.randn(3, 1, 7, 8)
    with torch.no_grad():
        module.w_merge.weight[:, :8] = 0.0  # as the release lays it out: [embedding; hidden]
    kept = predict(module, hidden, embedding)
    assert near(predict(module, hidden, other), kept), "the left half reads the state"


# balance


def step(model: Transformer, tokens: torch.Tensor, micro_batches: int, recompute: bool) -> None:
    """Take minids' own optimiser step, at learning rate 0: only biases move."""
    rates, documents = Rates(lr=0.0, mtp_weight=0.3, bias_speed=0.01), torch.zeros_like(tokens)
    cut = dict(micro_batches=micro_batches, recompute=recompute)
    take_step(model, make_optimizer(model), tokens, documents, rates, **cut)


def property_bias_moves_once_a_step(chosen_step):
    tokens = torch.randint(32, (16, 9))

    def biases(micro_batches: int, recompute: bool = False) -> list[list[float]]:
        model = Transformer(preset("toy", init_std=0.5))
        chosen_step(model, tokens, micro_batches, recompute)
        moved = [module.bias.tolist() for module in model.routers]
        model.eval()(tokens)
        assert moved == [module.bias.tolist() for module in model.routers], "moved in evaluation"
        return moved

    once = biases(1)
    assert any(map(any, once)), "never moved"
    assert biases(4) == once, "depends on accumulation"
    assert biases(1, recompute=True) == once, "moved again by recomputation"


def load_of_losses(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    losses = model.losses(tokens, recompute=True)
    losses.total(0.3).backward()
    return losses.load


def property_recomputation_counts_no_token_twice(counter):
    model, tokens = Transformer(preset("toy")), torch.randint(32, (4, 9))
    visits = [
        4 * 8 * 2,
        4 * 7 * 2,
    ]  # the MoE layer sees T = 8 tokens a row, the MTP module 7; K = 2
    assert counter(model, tokens).sum(-1).tolist() == visits, "counted again"


def circulant(n_experts: int) -> torch.Tensor:
    """Scores of E tokens, each preferring the next expert: perfect balance for any K."""
    first = torch.linspace(0.9, 0.2, n_experts)
    return torch.stack([first.roll(t) for t in range(n_experts)])[None]


def property_each_sequence_is_balanced_by_itself(sequence_loss):
    assert sequence_loss(circulant(6), 2).item() == pytest.approx(1.0), "balance does not cost 1"
    lopsided = torch.linspace(0.9, 0.2, 6).expand(8, 6)
    mirrors = torch.stack([lopsided.roll(shift, dims=-1) for shift in range(6)])
    hidden = sequence_loss(mirrors, 2).item()
    assert hidden == pytest.approx(sequence_loss(mirrors[:1], 2).item()), "mirrors hide it"
    assert hidden > 1.2, "not penalised"


def property_perfect_balance_costs_one_for_any_top_k(auxiliary_loss):
    for top_k in (1, 2, 4, 6):
        cost = auxiliary_loss(circulant(6), circulant(6).topk(top_k).indices).item()
        assert cost == pytest.approx(1.0), "not 1 at perfect balance"


def property_the_balance_loss_is_minimised(total):
    def gradient(alpha: float) -> torch.Tensor:
        model = Transformer(preset("toy", aux_loss_alpha=alpha, init_std=0.5))
        total(
            model.losses(torch.randint(32, (4, 9), generator=torch.manual_seed(0))), 0.3
        ).backward()
        return torch.stack([module.centroids.grad for module in model.routers])

    assert not near(gradient(1.0), gradient(0.0)), "no router hears of it"


# FP8; an implementation is products(x, weight, dy, scale_fmt) -> y, dx, dw


def products(x, weight, dy, scale_fmt=None):
    """Return what minids makes of a layer's input, weight and gradient."""
    given = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    y = fp8.linear(*given, fp8.MOST._replace(input_scale=scale_fmt))
    return y.detach(), *torch.autograd.grad(y, given, dy)


def property_scales_multiply(products):
    x, weight, dy = torch.randn(5, 20), torch.randn(7, 20), torch.randn(5, 7)
    (y, *_), (larger, *_) = products(x, weight, dy), products(8 * x, weight, dy)
    assert near(larger, 8 * y), "a larger scale gave no larger product"
    assert 0.9 < (y.norm() / (x @ weight.mT).norm()).item() < 1.1, "products of another size"


def property_backward_knows_the_fp8_copy_alone(products):
    x, weight, dy = torch.randn(130, 20), torch.randn(7, 20), torch.randn(130, 7)
    copy = fp8.dequantise(fp8.quantise(x))
    *_, dw = products(x, weight, dy)
    assert products(copy, weight, dy)[2].equal(dw), "backward saw digits that FP8 had dropped"


def property_gradients_keep_three_digits(products):
    dy = torch.tensor([[448.0, 9.0]])  # 9 = 1.001 (binary) * 2^3
    _, dx, _ = products(torch.randn(1, 2), torch.eye(2), dy)
    assert near(dx, dy), "a digit of the gradient is lost"


def property_a_token_is_scaled_by_itself(products):
    x, weight, dy = torch.randn(4, 20), torch.randn(7, 20), torch.randn(4, 7)
    loud = x.clone()
    loud[3] *= 1e5
    (y, *_), (other, *_) = products(x, weight, dy), products(loud, weight, dy)
    assert near(other[:3], y[:3]), "an outlier of one token silenced the others"


def property_a_block_of_the_weight_has_one_scale(products):
    weight, x = torch.randn(130, 140) * torch.randn(130, 1).exp(), torch.eye(140)
    y, dx, _ = products(x, weight, x[:, :130])
    assert near(y.mT, dx[:130]), "forward and backward multiply by different weights"
    weight[0, 0] = 1e9
    y, *_ = products(x, weight, x[:, :130])
    assert not y[1:128, 1:128].any(), "rows have scales that no checkpoint has"


def property_scales_are_of_this_call(products):
    x, weight, dy = torch.randn(4, 20), torch.randn(7, 20), torch.randn(4, 7)
    y, *_ = products(x, weight, dy)
    later, *_ = products(64 * x, weight, dy)
    assert near(later, 64 * y), "the scale was that of an earlier call"


def property_the_largest_number_survives(products):
    y, *_ = products(torch.tensor([[600.0]]), torch.ones(1, 1), torch.ones(1, 1), "ue8m0")
    assert y.item() == pytest.approx(600, rel=2**-4), "the largest number was cut off"


def property_nothing_is_nothing(products):
    y, dx, dw = products(torch.zeros(2, 20), torch.ones(7, 20), torch.zeros(2, 7))
    assert not any(part.any() for part in (y, dx, dw)), "zeros became something"


def property_groups_are_scaled_before_they_are_added(products):
    x, weight = torch.ones(1, 256), torch.ones(1, 256)
    x[:, 128:] = 1000.0
    y, *_ = products(x, weight, torch.ones(1, 1))
    assert near(y, torch.tensor([[128 + 128_000.0]])), "one scale for all groups"


def property_the_head_is_not_rounded(build):
    cfg = preset("toy", precision="fp8", n_layers=1, mtp_depth=0)
    model, ids = build(cfg), torch.randint(cfg.vocab_size, (2, 5))
    with torch.no_grad():
        logits, hidden = model(ids), model.hidden(ids)
    assert logits.equal(F.linear(hidden, model.head.weight)), "the head is in FP8"


class Case(NamedTuple):
    holds: Callable[[Any], None]
    right: Any
    wrong: list[tuple[Any, str]]  # a mistake, and the words of the assertion that catches it


CASES = {
    "bias added before the gate weight": Case(property_bias_picks_and_does_not_weigh, Router, [
        (layers.BiasedGate, "the bias reached the weights"),
        (layers.BiasInsideSigmoid, "the bias reached the weights")]),
    "softmax affinity": Case(property_affinities_do_not_compete, Router, [
        (layers.SoftmaxAffinity, "a third expert moved the scores"),
        (layers.CosineAffinity, "no ratio of sigmoids")]),
    "masked groups filled with 0.0": Case(
        property_dropped_groups_stay_dropped, router.limit_groups,
        [(layers.limit_groups_with_zeros, "outside the kept groups")]),
    "router bias lost on a small config": Case(property_a_small_router_has_a_bias, Router, [
        (layers.BiasAtFullSizeOnly, "no buffer")]),
    "rotary key per head": Case(property_cache_does_not_grow_with_heads, MLA, [
        (layers.RotaryKeyPerHead, "it grows with the heads")]),
    "rotary key taken from the latent": Case(property_rotary_key_bypasses_the_latent, MLA, [
        (layers.RotaryKeyFromLatent, "the key follows the latent")]),
    "no rotary path at all": Case(property_order_matters_and_distance_alone, MLA, [
        (layers.NoPosition, "blind to the order"),
        (layers.SinusoidalPosition, "absolute positions")]),
    "cache stores expanded keys and values": Case(property_cache_holds_latent_and_rotary_key, MLA, [
        (layers.ExpandedCache, "other numbers are cached"),
        (layers.RotaryKeyPerHead, "other numbers are cached")]),
    "memory formula forgets the rotary key": Case(
        property_formula_equals_measured_bytes, lambda cfg: count(cfg).cache_elements,
        [(layers.memory_without_rotary_key, "formula and cache differ")]),
    "queries compressed only in training": Case(property_queries_are_the_same_in_evaluation, MLA, [
        (layers.QueriesCompressedInTrainingOnly, "evaluation takes another path")]),
    "latent norm missing": Case(property_scale_of_a_down_projection_is_forgotten, MLA, [
        (layers.NoLatentNorm, "the KV latent has no norm"),
        (layers.NoQueryNorm, "the query latent has no norm")]),
    "YaRN's scale or ramp wrong": Case(property_yarn_beyond_position_0, Yarn(), [
        *[(Yarn(softmax_scale=wrong), "wrong beyond position 0") for wrong in (
            layers.scale_without_mscale, layers.scale_not_squared, layers.scale_reversed,
            layers.scale_from_wrong_field)],
        *[(Yarn(frequencies=wrong), "wrong beyond position 0") for wrong in (
            layers.ramp_by_index, layers.ramp_reversed, layers.all_pairs_stretched,
            layers.no_pair_stretched)]]),
    "MTP fed with its own target": Case(property_loss_does_not_follow_the_future, shift, [
        (training.shift_to_target, "the state follows its own target")]),
    "MTP without embeddings, block or causality": Case(
        property_gradient_reaches_the_next_word_and_not_the_one_after, MTP, [
            (training.WithoutEmbeddings, "Emb(t_(i+1)) is not read"),
            (training.WithoutBlock, "no block"),
            (training.WithoutCausality, "Emb(t_(i+2)) is read")]),
    "concatenation in the report's order": Case(
        property_the_left_half_of_the_merge_reads_the_embedding, MTP,
        [(training.HiddenFirst, "the left half reads the state")]),
    "bias updated in the forward pass": Case(property_bias_moves_once_a_step, step, [
        (training.step_in_forward, "moved in evaluation"),
        (training.step_in_training_forward, "depends on accumulation"),
        (training.step_by_micro_batch, "depends on accumulation"),
        (training.step_with_recomputation, "moved again by recomputation")]),
    "load counted twice under recomputation": Case(
        property_recomputation_counts_no_token_twice, load_of_losses,
        [(training.load_counted_in_forward, "counted again")]),
    "sequence-wise loss averaged over the batch": Case(
        property_each_sequence_is_balanced_by_itself, balance.sequence_loss, [
            (training.product_of_batch_means, "mirrors hide it"),
            (training.sequence_loss_of_raw_affinities, "balance does not cost 1")]),
    "auxiliary loss with the wrong top-k scale": Case(
        property_perfect_balance_costs_one_for_any_top_k, balance.auxiliary_loss,
        [(training.auxiliary_loss_without_top_k, "not 1 at perfect balance")]),
    "auxiliary loss computed but unused": Case(
        property_the_balance_loss_is_minimised, Losses.total,
        [(training.total_without_balance, "no router hears of it")]),
    "FP8 scale divided, not multiplied": Case(property_scales_multiply, products, [
        (eight_bits.scale_divided, "a larger scale gave no larger product")]),
    "weight gradient from the input in full": Case(
        property_backward_knows_the_fp8_copy_alone, products, [
            (eight_bits.weight_gradient_of_the_input, "backward saw digits")]),
    "gradients in E5M2": Case(property_gradients_keep_three_digits, products, [
        (eight_bits.gradients_in_e5m2, "a digit of the gradient is lost")]),
    "groups across tokens": Case(property_a_token_is_scaled_by_itself, products, [
        (eight_bits.tiles_along_tokens, "silenced the others"),
        (eight_bits.one_scale_a_tensor, "silenced the others")]),
    "weights scaled by row": Case(property_a_block_of_the_weight_has_one_scale, products, [
        (eight_bits.weights_by_tiles, "rows have scales that no checkpoint has"),
        (eight_bits.weights_by_tiles_of_each_product, "multiply by different weights")]),
    "delayed scaling": Case(property_scales_are_of_this_call, products, [
        (eight_bits.delayed_scaling(clamp=True), "that of an earlier call"),
        (eight_bits.delayed_scaling(clamp=False), "that of an earlier call")]),
    "power-of-two scales rounded to nearest": Case(property_the_largest_number_survives, products, [
        (eight_bits.powers_of_two_to_nearest(clamp=True), "the largest number was cut off"),
        (eight_bits.powers_of_two_to_nearest(clamp=False), "the largest number was cut off")]),
    "a scale of zero": Case(property_nothing_is_nothing, products, [
        (eight_bits.scale_of_nothing, "zeros became something")]),
    "scales applied after the sum": Case(
        property_groups_are_scaled_before_they_are_added, products,
        [(eight_bits.scaled_after_the_sum, "one scale for all groups")]),
    "head in FP8": Case(property_the_head_is_not_rounded, Transformer, [
        (eight_bits.head_in_fp8, "the head is in FP8")]),
}  # fmt: skip

PLANTED = [
    pytest.param(case.holds, mistake, words, id=f"{name}-{number}")
    for name, case in CASES.items()
    for number, (mistake, words) in enumerate(case.wrong)
]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_holds(case):
    case.holds(case.right)


@pytest.mark.parametrize(("holds", "mistake", "words"), PLANTED)
def test_fails_on_the_mistake(holds, mistake, words):
    with pytest.raises(AssertionError) as caught:
        holds(mistake)
    assert words in str(caught.value)
