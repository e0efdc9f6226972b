"""The MoE layer: every visit is made, none is lost, and sorting changes nothing."""

import equations
import fp8_loop
import numpy as np
import pytest
import torch

from minids import preset
from minids.balance import auxiliary_loss, expert_load, sequence_loss
from minids.experts.grouped import dense_loop, run_expert
from minids.experts.scaled import run_scaled_experts
from minids.formats.groups import BLOCK, quantise
from minids.moe import Experts, MoE

FP64 = 1e-12  # relative; the same products, summed in another order
FP32 = 1e-5  # the same in FP32, relative norm


def make(part, **changes):
    """Build Experts or MoE of the toy size in FP64 with random weights."""
    module = part(preset("toy", **changes))
    for weight in module.parameters():
        torch.nn.init.normal_(weight)
    return module.double()


def near(ours: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(ours, other, rtol=FP64, atol=FP64)


def test_experts_by_hand():
    # All widths 1, gate weight 50: silu(50) = 50, so expert e returns 50 * up * down = e + 1.
    experts = Experts(preset("toy", dim=1, moe_inter_dim=1))
    with torch.no_grad():
        experts.w_gate_up[:, 0] = 50.0
        experts.w_gate_up[:, 1] = 0.02
        experts.w_down[:, 0, 0] = torch.arange(1.0, 9.0)
    gate, ids = torch.tensor([[0.25, 0.75], [0.5, 0.5]]), torch.tensor([[0, 2], [7, 0]])
    y = experts(torch.ones(2, 1), gate, ids)
    assert y[:, 0].tolist() == pytest.approx([0.25 * 1 + 0.75 * 3, 0.5 * 8 + 0.5 * 1])


# tokens, width, hidden width, experts, experts a token
VISITS = {
    "random": (13, 8, 8, 8, 2),
    "odd widths": (5, 7, 3, 5, 3),
    "most experts empty": (2, 8, 8, 8, 1),
    "every expert": (6, 8, 8, 8, 8),
    "one token": (1, 8, 8, 8, 2),
    "one token, one expert": (1, 5, 3, 1, 1),
    "one expert": (9, 8, 8, 1, 1),
    "width 1": (4, 1, 1, 3, 2),
}


def draw(tokens: int, width: int, n_experts: int, top_k: int):
    x = torch.randn(tokens, width, dtype=torch.float64, requires_grad=True)
    gate = torch.rand(tokens, top_k, dtype=torch.float64, requires_grad=True)
    return x, gate, torch.rand(tokens, n_experts).topk(top_k).indices


def values_and_gradients(experts, x, gate, ids, loop=False) -> list[torch.Tensor]:
    weights = (experts.w_gate_up, experts.w_down)
    y = dense_loop(x, gate, ids, *weights) if loop else experts(x, gate, ids)
    wanted = [x, gate, experts.w_gate_up, experts.w_down]
    return [y, *torch.autograd.grad(y.sin().sum(), wanted)]


@pytest.mark.parametrize("name", VISITS)
def test_sorting_equals_the_dense_loop(name):
    tokens, width, hidden, n_experts, top_k = VISITS[name]
    groups = dict(n_expert_groups=1, n_limited_groups=1, n_activated_experts=1)
    experts = make(Experts, dim=width, moe_inter_dim=hidden, n_routed_experts=n_experts, **groups)
    data = draw(tokens, width, n_experts, top_k)
    ours = values_and_gradients(experts, *data)
    for one, other in zip(ours, values_and_gradients(experts, *data, loop=True), strict=True):
        near(one, other)


@pytest.mark.parametrize("name", ["random", "most experts empty", "every expert", "one token"])
def test_the_grouped_product_of_fp32_equals_the_dense_loop(name):
    # FP32 rows of whole 16 bytes take torch's grouped product, the FP64 ones above never do.
    tokens, width, hidden, n_experts, top_k = VISITS[name]
    experts = make(Experts, dim=width, moe_inter_dim=hidden, n_routed_experts=n_experts).float()
    x, gate, ids = draw(tokens, width, n_experts, top_k)
    data = x.detach().float().requires_grad_(), gate.detach().float().requires_grad_(), ids
    ours = values_and_gradients(experts, *data)
    for one, other in zip(ours, values_and_gradients(experts, *data, loop=True), strict=True):
        assert (one - other).norm() <= FP32 * other.norm()


def test_all_tokens_to_one_expert():
    experts = make(Experts)
    x, gate, _ = draw(40, 8, 8, 1)
    ids = torch.full((40, 1), 5)
    y, *_, grad_gate_up, grad_down = values_and_gradients(experts, x, gate, ids)
    near(y, gate * run_expert(x, experts.w_gate_up[5], experts.w_down[5]))  # none is dropped
    for grad in (grad_gate_up, grad_down):
        assert grad[5].any()
        assert not grad[[0, 1, 2, 3, 4, 6, 7]].any()  # exactly zero where no token went


def test_every_token_makes_its_visits_whatever_the_load():
    # Eight tokens in nine choose the same two experts; every row still gets its own sum.
    experts = make(Experts)
    x, gate, ids = draw(90, 8, 8, 2)
    ids[:80] = torch.tensor([3, 6])
    y = experts(x, gate, ids)
    alone = [experts(x[t : t + 1], gate[t : t + 1], ids[t : t + 1]) for t in range(len(x))]
    near(y, torch.cat(alone))


def test_the_order_of_tokens_and_of_choices_does_not_matter():
    experts = make(Experts)
    x, gate, ids = draw(20, 8, 8, 3)
    order = torch.randperm(20)
    near(experts(x, gate, ids)[order], experts(x[order], gate[order], ids[order]))
    near(experts(x, gate, ids), experts(x, gate.flip(-1), ids.flip(-1)))


@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("rule", ["sigmoid", "softmax"])
def test_layer_equals_the_loop(shared, rule):
    layer = make(MoE, n_shared_experts=shared, score_func=rule, norm_topk=rule == "sigmoid")
    if layer.router.bias is not None:
        layer.router.bias.uniform_(-1, 1)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    y, routed = layer(x, stats=True)
    weights = {name: weight.detach() for name, weight in layer.state_dict().items()}
    visited = []
    for b in range(2):
        for t in range(6):
            u, _, chosen = equations.moe(x[b, t], weights, layer.cfg)
            near(y[b, t], u)
            visited += chosen
    assert routed.load.tolist() == [visited.count(expert) for expert in range(8)]


def test_shared_experts_see_every_token():
    layer = make(MoE, n_shared_experts=2)
    torch.nn.init.zeros_(layer.experts.w_down)  # the routed ones fall silent
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    y, routed = layer(x)
    assert routed is None  # statistics were not asked for
    near(y, layer.shared(x))
    assert layer.shared.w_gate.weight.shape == (2 * 8, 8)
    assert make(MoE, n_shared_experts=0).shared is None


def test_load_counts_every_visit_and_alphas_weigh_the_losses():
    layer = make(MoE, seq_loss_alpha=0.5, aux_loss_alpha=0.25)
    x = torch.randn(3, 7, 8, dtype=torch.float64)
    _, routed = layer(x, stats=True)
    _, ids, score, _ = layer.router(x.flatten(0, 1))
    assert routed.load.equal(expert_load(ids, 8))
    assert routed.load.sum() == 3 * 7 * 2
    ids, score = ids.unflatten(0, (3, 7)), score.unflatten(0, (3, 7))
    near(routed.balance_loss, 0.5 * sequence_loss(score, 2) + 0.25 * auxiliary_loss(score, ids))
    _, silent = make(MoE, seq_loss_alpha=0.0)(x, stats=True)
    assert silent.balance_loss.item() == 0.0


def test_the_task_teaches_the_router():
    layer = make(MoE, seq_loss_alpha=0.0)
    y, _ = layer(torch.randn(4, 30, 8, dtype=torch.float64))
    y.square().sum().backward()
    assert layer.router.centroids.grad.any(dim=-1).all()


# in FP8


def in_fp8(**changes) -> Experts:
    experts = Experts(preset("toy", precision="fp8", dim=130, moe_inter_dim=20, **changes))
    for weight in experts.parameters():
        torch.nn.init.normal_(weight)
    return experts


def test_experts_in_fp8_equal_the_loop():
    """Every expert by itself: the groups of 128 tokens of its weight gradients are its own rows."""
    experts, (tokens, top_k) = in_fp8(), (150, 2)
    x, dy = torch.randn(2, tokens, 130).unbind(0)
    gate, ids = torch.ones(tokens, top_k), torch.rand(tokens, 8).topk(top_k).indices
    ids[:140] = torch.tensor([3, 6])  # these have more than one group of 128
    x.requires_grad_()
    y = experts(x, gate, ids)
    dx, d_gate_up, d_down = torch.autograd.grad(y, [x, *experts.parameters()], dy)
    loop = dict(y=np.zeros((tokens, 130)), dx=np.zeros((tokens, 130)))
    for e, (w_gate_up, w_down) in enumerate(zip(*experts.parameters(), strict=True)):
        at = [t for t in range(tokens) if e in ids[t].tolist()]
        if not at:
            assert not d_gate_up[e].any()
            assert not d_down[e].any()
            continue
        rows, d_rows = x.detach()[at].numpy(), dy[at].numpy()
        halves = [w.detach().numpy() for w in w_gate_up]
        into, out = fp8_loop.Roles(inputs=True), fp8_loop.Roles(gradient=True)
        made = [fp8_loop.linear(rows, w, np.ones((len(at), 20)), into).y for w in halves]
        gate_up = [half.astype(np.float32) for half in made]
        down = fp8_loop.gated_linear(*gate_up, w_down.detach().numpy(), d_rows, out)
        loop["y"][at] += down.y
        back = [fp8_loop.linear(rows, w, d.astype(np.float32), into)
                for w, d in zip(halves, down.dx, strict=True)]  # fmt: skip
        loop["dx"][at] += back[0].dx + back[1].dx
        near_in_norm(d_down[e], down.dw)
        for half, products in zip(d_gate_up[e], back, strict=True):
            near_in_norm(half, products.dw)
    near_in_norm(y, loop["y"])
    near_in_norm(dx, loop["dx"])


# FP32 rounding, relative; one value of 100 rounded to another FP8 code would move it by 3e-3
ANOTHER_CODE = 3e-4


def near_in_norm(ours: torch.Tensor, loop: np.ndarray) -> None:
    assert np.linalg.norm(ours.detach().numpy() - loop) <= ANOTHER_CODE * np.linalg.norm(loop)


def test_experts_in_fp8_are_near_the_dense_loop_and_equal_it_in_evaluation():
    experts, (x, gate, ids) = in_fp8(), draw(40, 130, 8, 2)
    given = x.detach().float(), gate.detach().float(), ids
    dense = dense_loop(*given, experts.w_gate_up, experts.w_down)
    assert 0.01 < ((experts(*given) - dense).norm() / dense.norm()).item() < 0.1
    assert (experts.eval()(*given) - dense).norm() <= FP32 * dense.norm()


def test_weights_stored_in_fp8_give_what_training_computes_forward():
    """Inference on blocks as they are published: the same codes, so the same bits."""
    experts, (x, gate, ids) = in_fp8(), draw(40, 130, 8, 2)
    given = x.detach().float(), gate.detach().float(), ids
    weights = (quantise(weight, BLOCK) for weight in experts.parameters())
    assert torch.equal(run_scaled_experts(*given, *weights, "ue8m0"), experts(*given))


def test_one_token_in_fp8():
    """A decoded token takes a way of its own in evaluation alone."""
    experts, (x, gate, ids) = in_fp8(), draw(3, 130, 8, 2)
    given = x.detach().float(), gate.detach().float(), ids
    alone = torch.cat([experts(*(part[t : t + 1] for part in given)) for t in range(3)])
    assert (experts(*given) - alone).norm() <= FP32 * alone.norm()


def test_the_order_of_experts_changes_no_bit_in_fp8():
    experts, (x, gate, ids) = in_fp8(), draw(60, 130, 8, 2)
    given, order = (x.detach().float(), gate.detach().float()), torch.randperm(8)
    y = experts(*given, ids)
    with torch.no_grad():
        for weight in experts.parameters():
            weight.copy_(weight[order])
    assert experts(*given, order.argsort()[ids]).equal(y)
