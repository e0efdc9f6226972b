"""Balance: load, MaxVio, the bias rule, and the losses it makes nearly needless."""

import equations
import pytest
import torch

from minids import preset
from minids.balance import auxiliary_loss, expert_load, max_vio, sequence_loss, update_bias
from minids.router import Router

FP32 = 1e-6  # relative; means over a few hundred numbers


def circulant(n_experts: int) -> torch.Tensor:
    """Scores [1, E, E] of E tokens, each preferring the next expert: perfect balance for any K."""
    first = torch.linspace(0.9, 0.1, n_experts)
    return torch.stack([first.roll(t) for t in range(n_experts)])[None]


def test_load_by_hand():
    ids = torch.tensor([[[0, 2], [2, 1]], [[2, 0], [2, 4]]])
    assert expert_load(ids, 6).tolist() == [2, 1, 4, 0, 1, 0]


def test_max_vio_by_hand():
    assert max_vio(torch.tensor([4, 0, 2, 2])).item() == 1.0  # (4 - 2) / 2
    assert max_vio(torch.tensor([[5, 5], [10, 0], [6, 4]])).tolist() == pytest.approx([0, 1, 0.2])
    assert max_vio(torch.tensor([0, 8, 0, 0])).item() == 3.0  # all to one of E: E - 1


def test_sign_rule_by_hand():
    bias = torch.tensor([0.0, 0.5, -1.0, 2.0])
    update_bias(bias, torch.tensor([900, 1, 3, 296]), speed=0.001)  # mean 300
    assert bias.tolist() == pytest.approx([-0.001, 0.501, -0.999, 2.001])
    update_bias(bias, torch.tensor([3, 3, 3, 3]), speed=0.001)  # the mean itself: no move
    update_bias(bias, torch.tensor([9, 0, 0, 0]), speed=0.0)  # gamma = 0: frozen
    assert bias.tolist() == pytest.approx([-0.001, 0.501, -0.999, 2.001])


def test_sequence_loss_by_hand():
    # both tokens prefer expert 0: f = (2, 0); shares 3/4 and 5/8: P_0 = 11/16
    score = torch.tensor([[[0.6, 0.2], [0.5, 0.3]]])
    assert sequence_loss(score, 1).item() == pytest.approx(2 * 11 / 16)
    # a second sequence that prefers expert 1 as much: the mean of two equal losses
    both = torch.cat([score, score.flip(-1)])
    assert sequence_loss(both, 1).item() == pytest.approx(2 * 11 / 16)
    assert auxiliary_loss(both, both.topk(1).indices).item() == pytest.approx(1.0)


def test_losses_equal_the_loop():
    score = torch.rand(3, 7, 6)
    ids = torch.rand(3, 7, 6).topk(2).indices  # any choice
    rows = [[list(token) for token in row] for row in score.double()]
    loop = [
        equations.balance_product(row, [equations.best([s.item() for s in t], 2) for t in row], 2)
        for row in rows
    ]
    assert sequence_loss(score, 2).item() == pytest.approx(sum(loop).item() / 3, rel=FP32)
    tokens = [token for row in rows for token in row]
    loop = equations.balance_product(tokens, [t for row in ids.tolist() for t in row], 2)
    assert auxiliary_loss(score, ids).item() == pytest.approx(loop.item(), rel=FP32)


@pytest.mark.parametrize("top_k", [1, 2, 5, 7])
def test_perfect_balance_costs_exactly_one(top_k):
    score = circulant(7)
    assert sequence_loss(score, top_k).item() == pytest.approx(1.0, rel=FP32)
    ids = score.topk(top_k).indices
    assert auxiliary_loss(score, ids).item() == pytest.approx(1.0, rel=FP32)


@pytest.mark.parametrize("top_k", [1, 3])
def test_one_unbalanced_sequence_hidden_among_mirrored_ones_is_still_penalised(top_k):
    lopsided = torch.linspace(0.9, 0.1, 6).expand(8, 6)  # 8 tokens with one taste
    mirrors = torch.stack([lopsided.roll(shift, dims=-1) for shift in range(6)])
    ids = mirrors.topk(top_k).indices
    assert auxiliary_loss(mirrors, ids).item() == pytest.approx(1.0, rel=FP32)  # does not see it
    alone = sequence_loss(lopsided[None], top_k)
    assert alone.item() > 1.3
    assert sequence_loss(mirrors, top_k).item() == pytest.approx(alone.item(), rel=FP32)


def test_the_gradient_lowers_the_score_of_the_busy_expert():
    score = torch.tensor([[[0.6, 0.2, 0.1], [0.5, 0.3, 0.2]]], requires_grad=True)
    sequence_loss(score, 1).backward()
    assert (score.grad[..., 0] > 0).all()
    assert (score.grad[..., 1:] < 0).all()


@pytest.mark.parametrize(("speed", "ends_below"), [(0.01, 0.15), (0.0, None)])
def test_the_bias_rule_balances_skewed_tokens_and_no_speed_freezes_it(speed, ends_below):
    router = Router(preset("toy", n_expert_groups=1, n_limited_groups=1))
    torch.nn.init.normal_(router.centroids)
    x = torch.randn(2000, 8) + torch.linspace(-1.5, 1.5, 8)  # a common direction: favourites
    history = []
    for _ in range(200):
        with torch.no_grad():
            _, ids, _, _ = router(x)
        load = expert_load(ids, 8)
        history.append(max_vio(load).item())
        update_bias(router.bias, load, speed)
    assert history[0] > 1.0
    if ends_below is None:
        assert not router.bias.any()
        assert history[-1] == history[0]
    else:
        assert max(history[-20:]) < ends_below


def test_the_bias_moves_without_a_graph():
    bias = torch.zeros(2, requires_grad=True)
    update_bias(bias, torch.tensor([1, 3]), 0.5)
    assert bias.tolist() == [0.5, -0.5]
    assert bias.grad_fn is None
