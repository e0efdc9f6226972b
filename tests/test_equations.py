"""minids equals the loop of equations.py: values, losses, loads and every gradient."""

import math

import equations
import pytest
import torch

from minids import Config, Transformer

# Norm of the difference over norm, tensor by tensor. In FP64 rounding leaves 1e-14 of the values
# and of every gradient, also of those that nearly cancel; a wrong equation leaves over 1e-4.
FP64 = 1e-12
# The same model in FP32: 1e-7 a product, a few dozen of them behind each logit.
FP32 = 1e-5

SMALL = dict(vocab_size=19, dim=12, n_layers=2, n_dense_layers=1, inter_dim=10, moe_inter_dim=7,
             n_heads=2, q_lora_rank=6, kv_lora_rank=5, qk_nope_head_dim=3, qk_rope_head_dim=4,
             v_head_dim=5, n_routed_experts=6, n_activated_experts=3, route_scale=2.5,
             seq_loss_alpha=0.3, aux_loss_alpha=0.2, init_std=0.4)  # fmt: skip
GROUPS = dict(n_routed_experts=8, n_expert_groups=4, n_limited_groups=2)
V2 = dict(score_func="softmax", norm_topk=False, group_score="max", n_shared_experts=2)
YARN = dict(
    rope_factor=8.0, original_seq_len=16, max_seq_len=128, qk_rope_head_dim=8, beta_fast=2.0
)
CONFIGS = {
    "plain": {},
    "no query latent": dict(q_lora_rank=0),
    "groups": GROUPS,
    "no shared expert, all dense but one": dict(n_shared_experts=0, n_layers=3, n_dense_layers=2),
    "mtp": dict(mtp_depth=2, n_dense_layers=0),
    "yarn": YARN | dict(mtp_depth=1),
    "yarn, mscale 0.707": YARN | dict(mscale=0.707, q_lora_rank=0),
    "v2": V2 | GROUPS | dict(n_activated_experts=2, route_scale=16.0),
    "v2-lite": V2 | dict(q_lora_rank=0),
    "one expert a group": dict(n_expert_groups=6, n_limited_groups=4),
    "every expert": dict(n_activated_experts=6, mtp_depth=1),
    "no experts at all": dict(n_dense_layers=2),
}


def build(name: str) -> Transformer:
    """Build a model with random gains and biases: none hides behind its initial value."""
    model = Transformer(Config(**SMALL | CONFIGS[name]), seed=1)
    with torch.no_grad():
        for weight_name, weight in model.named_parameters():
            if weight_name.endswith("gain"):
                weight.uniform_(0.5, 1.5)
    for router in model.routers:
        if router.bias is not None:
            router.bias.uniform_(-2.5, -1.5)  # all biased scores negative: zeros would win
    return model


def in_fp64(model: Transformer) -> Transformer:
    """Widen a model; rotary frequencies come from the loop, since minids makes them in FP32."""
    pairs = range(model.cfg.rotated_dim // 2)
    exact = torch.tensor([equations.frequency(k, model.cfg) for k in pairs], dtype=torch.float64)
    assert_near(model.freq, exact, "frequencies", FP32)
    model.double().freq.copy_(exact)
    return model


def assert_near(ours: torch.Tensor, loop: torch.Tensor, what: str, tolerance: float) -> None:
    assert ours.shape == loop.shape, what
    if not loop.any():
        assert not ours.any(), f"{what} is zero in the loop"
        return
    error = ((ours.double() - loop).norm() / loop.norm()).item()
    assert error <= tolerance, f"{what}: relative error {error:.1e}"


def table(rows) -> torch.Tensor:
    """Stack a nested list of vectors."""
    return torch.stack([table(row) if isinstance(row, list) else row for row in rows])


def test_the_loop_itself_by_hand():
    # One token, position 0: attention returns its own value, whatever the query.
    cfg = Config(**SMALL | dict(n_heads=1, norm_eps=1e-12))
    w = {"w_dkv.weight": torch.zeros(9, 12).double(), "kv_norm.gain": torch.ones(5).double(),
         "w_ukv.weight": torch.zeros(8, 5).double(), "w_dq.weight": torch.ones(6, 12).double(),
         "q_norm.gain": torch.ones(6).double(), "w_uq.weight": torch.ones(7, 6).double(),
         "w_o.weight": torch.eye(12, 5).double()}  # fmt: skip
    w["w_dkv.weight"][0, 0] = 2.0  # c_kv = (2, 0, 0, 0, 0), normalised: (sqrt 5, 0, 0, 0, 0)
    w["w_ukv.weight"][3, 0] = 3.0  # v = (3 sqrt 5, 0, 0, 0, 0)
    (u,) = equations.attention([torch.ones(12).double()], w, cfg, 0, None)
    assert u[0].item() == pytest.approx(3 * math.sqrt(5))
    assert not u[1:].any()


def test_the_loop_has_the_fact_sheets_yarn():
    # Golden numbers of the fact sheet, section 11; nothing of minids is run here.
    cfg = Config(**SMALL | dict(qk_nope_head_dim=128, qk_rope_head_dim=64, rope_factor=40.0))
    golden = {0: 1.0, 10: 0.05623413, 11: 0.03900693, 16: 0.0055, 23: 3.3338e-5, 31: 3.3338e-6}
    for k, f in golden.items():
        assert equations.frequency(k, cfg) == pytest.approx(f, rel=1e-5)
    assert equations.score_scale(cfg) == pytest.approx(0.1352338, rel=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits(name):
    model = build(name)
    ids = torch.randint(model.cfg.vocab_size, (2, 11))
    with torch.no_grad():
        w = equations.weights_of(model)
        loop = [equations.forward(w, model.cfg, row).logits[0] for row in ids.tolist()]
        assert_near(model(ids), table(loop), "logits", FP32)
        assert_near(in_fp64(model)(ids), table(loop), "logits", FP64)


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_states_and_gradients(name):
    model = in_fp64(build(name))
    tokens = torch.randint(model.cfg.vocab_size, (3, 8))
    states = record_mtp_states(model)
    ours = model.losses(tokens)
    ours.total(mtp_weight=0.3).backward()

    w = equations.weights_of(model)
    loop = equations.losses(w, model.cfg, tokens.tolist())
    assert_near(ours.main, loop.main, "main loss", FP64)
    for k, loss in enumerate(loop.mtp):
        assert_near(ours.mtp[k], loss, f"MTP loss {k + 1}", FP64)
    assert_near(ours.balance, loop.balance, "balance loss", FP64)
    assert ours.load.tolist() == loop.loads
    runs = [equations.forward(w, model.cfg, row[:-1], depth=len(states)) for row in tokens.tolist()]
    for k, state in enumerate(states, start=1):
        assert_near(state.detach(), table([run.states[k] for run in runs]), f"MTP state {k}", FP64)

    extra = sum(loop.mtp) / max(1, len(loop.mtp))  # Eq. 25
    (loop.main + 0.3 * extra + loop.balance).backward()
    for weight_name, weight in model.named_parameters():
        grad = w[weight_name].grad
        grad = torch.zeros_like(weight) if grad is None else grad  # an expert no token chose
        assert_near(weight.grad, grad, weight_name, FP64)


def test_losses_of_packed_documents():
    model = in_fp64(build("mtp"))
    tokens = torch.randint(model.cfg.vocab_size, (2, 10))
    documents = torch.tensor([[0] * 4 + [1] * 6, [5, 5, 6, 7, 7, 7, 7, 8, 8, 8]])
    ours = model.losses(tokens, mask=documents)
    loop = equations.losses(
        equations.weights_of(model), model.cfg, tokens.tolist(), documents.tolist()
    )
    assert_near(ours.main, loop.main, "main loss", FP64)
    assert_near(ours.mtp, torch.stack(loop.mtp), "MTP losses", FP64)
    assert ours.load.tolist() == loop.loads


def record_mtp_states(model: Transformer) -> list[torch.Tensor]:
    """Return a list that fills, during `losses`, with the state each MTP module hands on."""
    states: list[torch.Tensor] = []
    for module in model.mtp:
        module.register_forward_hook(lambda _module, _inputs, output: states.append(output[0]))
    return states
