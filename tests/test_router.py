"""The router: who is chosen, and with which weight."""

import math

import equations
import pytest
import torch

from minids import Config, preset
from minids.router import Router, limit_groups

FP64 = 1e-12  # relative; the same few operations in another order


def make(cfg: Config, spread: float = 1.0) -> Router:
    """Build a router in FP64 with random centroids and, for sigmoid scores, a random bias."""
    router = Router(cfg)
    torch.nn.init.normal_(router.centroids, std=spread)
    if router.bias is not None:
        router.bias.uniform_(-spread, spread)
    return router.double()


def with_logits(logits: list[float], **changes) -> tuple[Router, torch.Tensor]:
    """Build a router of width 1 and the token [[1]] for which it computes these logits."""
    cfg = preset("toy", dim=1, n_routed_experts=len(logits), **changes)
    router = Router(cfg).double()
    with torch.no_grad():
        router.centroids[:, 0] = torch.tensor(logits, dtype=torch.float64)
    return router, torch.ones(1, 1, dtype=torch.float64)


ONE_GROUP = dict(n_expert_groups=1, n_limited_groups=1)
V3 = dict(n_routed_experts=256, n_activated_experts=8, n_expert_groups=8, n_limited_groups=4,
          route_scale=2.5)  # fmt: skip
V2 = dict(score_func="softmax", norm_topk=False, group_score="max", route_scale=16.0)


def by_expert(gate, ids) -> dict[int, float]:
    return dict(zip(ids[0].tolist(), gate[0].tolist(), strict=True))


def test_by_hand():
    # sigmoids 1/2, 3/4, 1/4, 1/5; the two best weigh 2.5 * 3/5 and 2.5 * 2/5
    logits = [0.0, math.log(3), -math.log(3), -math.log(4)]
    router, x = with_logits(logits, **ONE_GROUP, route_scale=2.5)
    gate, ids, score, _ = router(x)
    assert score[0].tolist() == pytest.approx([0.5, 0.75, 0.25, 0.2])
    assert by_expert(gate, ids) == pytest.approx({1: 1.5, 0: 1.0})
    # a bias of 1 brings expert 2 in; it weighs its own 1/4, not 5/4
    router.bias[2] = 1.0
    gate, ids, _, _ = router(x)
    assert by_expert(gate, ids) == pytest.approx({2: 0.625, 1: 1.875})


def test_v2_rule_by_hand():
    # softmax 1/16, 2/16, 5/16, 8/16, not normalised again, times 16
    router, x = with_logits([math.log(n) for n in (1, 2, 5, 8)], **ONE_GROUP, **V2)
    assert router.bias is None
    gate, ids, _, _ = router(x)
    assert by_expert(gate, ids) == pytest.approx({3: 8.0, 2: 5.0})


@pytest.mark.parametrize(("best", "winner"), [(2, 1), (1, 0)])
def test_group_limit_by_hand(best, winner):
    # sums of the two best: 1.0, 1.1, 1.0; maxima: 0.9, 0.6, 0.8
    choice = torch.tensor([[0.9, 0.1, 0.0, 0.6, 0.5, -2.0, 0.8, 0.2, 0.1]])
    limited = limit_groups(choice, groups=3, keep=1, best=best)
    kept = slice(3 * winner, 3 * winner + 3)
    assert limited[0, kept].tolist() == choice[0, kept].tolist()
    assert limited.isinf().sum() == 6


CASES = {
    "one group": ONE_GROUP,
    "toy": {},
    "v3": V3,
    "v2": V2,
    "v2 ungrouped": V2 | ONE_GROUP,
    "one expert a group": dict(n_expert_groups=8, n_limited_groups=3),
    "all experts of the kept groups": dict(n_activated_experts=4),
    "one expert": dict(n_routed_experts=1, n_activated_experts=1) | ONE_GROUP,
    "not normalised sigmoid": dict(norm_topk=False),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_loop(name):
    router = make(preset("toy", **CASES[name]))
    x = torch.randn(20, 8, dtype=torch.float64)
    w = {"centroids": router.centroids.detach(), "bias": router.bias}
    gate, ids, score, _ = router(x)
    for t in range(len(x)):
        weights, scores = equations.gate(x[t], w, router.cfg)
        assert by_expert(gate[t : t + 1], ids[t : t + 1]) == pytest.approx(
            {i: g.item() for i, g in weights.items()}, rel=FP64
        )
        torch.testing.assert_close(score[t], torch.stack(scores), rtol=FP64, atol=0)


def test_without_bias_and_groups_it_is_top_k_of_sigmoids():
    router = make(preset("toy", **V3 | ONE_GROUP))
    router.bias.zero_()
    x = torch.randn(50, 8, dtype=torch.float64)
    gate, ids, _, _ = router(x)
    best = (x @ router.centroids.T).sigmoid().topk(8)
    assert ids.equal(best.indices)
    torch.testing.assert_close(gate, 2.5 * best.values / best.values.sum(-1, keepdim=True))
    torch.testing.assert_close(gate.sum(-1), torch.full((50,), 2.5).double(), rtol=FP64, atol=0)


@pytest.mark.parametrize("shift", [-7.0, 7.0])
def test_a_constant_on_every_bias_changes_nothing(shift):
    router = make(preset("toy", **V3))
    x = torch.randn(200, 8, dtype=torch.float64)
    gate, ids, score, _ = router(x)
    router.bias += shift
    shifted_gate, shifted_ids, shifted_score, _ = router(x)
    assert ids.equal(shifted_ids)
    assert gate.equal(shifted_gate)
    assert score.equal(shifted_score)


@pytest.mark.parametrize("mean_bias", [-3.0, 0.0, 3.0])
def test_no_token_uses_more_groups_than_allowed(mean_bias):
    router = make(preset("toy", **V3))
    router.bias += mean_bias
    _, ids, _, _ = router(torch.randn(500, 8, dtype=torch.float64))
    groups = [len({expert // 32 for expert in row}) for row in ids.tolist()]
    assert max(groups) == 4
    assert all(len(set(row)) == 8 for row in ids.tolist())  # no expert twice


def test_the_bias_is_no_parameter_and_hides_from_gradients():
    router = make(preset("toy"))
    assert [name for name, _ in router.named_parameters()] == ["centroids"]
    assert "bias" in router.state_dict()
    gate, _, score, _ = router(torch.randn(9, 8, dtype=torch.float64))
    (gate.square().sum() + score.sum()).backward()
    assert router.centroids.grad.any(dim=-1).all()
    assert not router.bias.requires_grad


def test_sixteen_bit_tokens_are_scored_in_fp32():
    # The logits 1 and 1 + 2^-10 are one number in BF16, which would leave the choice to chance.
    cfg = preset("toy", dim=2, n_routed_experts=2, n_activated_experts=1, **ONE_GROUP)
    router = Router(cfg)
    router.centroids = torch.nn.Parameter(torch.tensor([[1.0, 0.0], [1.0, 2**-10]]).bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gate, ids, score, _ = router(torch.ones(1, 2, dtype=torch.bfloat16))
    assert ids.item() == 1
    assert gate.dtype == score.dtype == torch.float32


def test_scores_that_underflow_give_no_nan():
    router, x = with_logits([-200.0] * 4, **ONE_GROUP)
    gate, _, score, _ = router.float()(x.float())
    assert not score.any()
    assert not gate.any()
