"""Multi-token prediction: which state, which word, which target, and who may see whom."""

import math

import equations
import pytest
import torch

from minids import Transformer, preset
from minids.block import Block
from minids.mtp import MTP, shift

FP32 = 1e-5  # relative norm; FP32 model against FP64 loop
FP64 = 1e-12  # other words sort the experts' rows otherwise: the same numbers, rounded elsewhere
T = 9  # tokens the main model reads


def make(depth: int = 2, **changes) -> Transformer:
    return Transformer(preset("toy", mtp_depth=depth, init_std=0.4, **changes), seed=1)


def tokens_of(model: Transformer, batch: int = 2) -> torch.Tensor:
    return torch.randint(model.cfg.vocab_size, (batch, T + 1))


def mtp_states(model: Transformer, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Return h^1, h^2, ... as `losses` computes them."""
    states: list[torch.Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: states.append(output[0]))
        for module in model.mtp
    ]
    model.losses(tokens)
    for hook in hooks:
        hook.remove()
    return states


def test_indices_by_hand():
    # T = 6 tokens are read, one more is known. Position 0 of depth k embeds t_k, predicts t_(k+1).
    tokens = torch.tensor([[10, 11, 12, 13, 14, 15, 16]])
    assert [part.tolist() for part in shift(tokens, 1)] == [
        [[11, 12, 13, 14, 15]],
        [[12, 13, 14, 15, 16]],
    ]
    assert [part.tolist() for part in shift(tokens, 2)] == [[[12, 13, 14, 15]], [[13, 14, 15, 16]]]


def test_merge_by_hand():
    # M = [1 0 0 0; 0 1 0 1] takes the embedding, and adds the state's second channel to its own.
    cfg = preset("toy", dim=2, norm_eps=1e-12)
    module = MTP(cfg, Block(cfg, index=0))
    for weight in module.block.parameters():
        torch.nn.init.zeros_(weight)  # a silent block: its residual path passes the state on
    with torch.no_grad():
        module.w_merge.weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 1.0]]))
    hidden, embedding = torch.tensor([[[30.0, 40.0]]]), torch.tensor([[[8.0, 6.0]]])
    state, _ = module(hidden, embedding, torch.ones(1, 1, 1, dtype=torch.complex64), None)
    # normalised, times 5 / sqrt 2: state (3, 4), embedding (4, 3); merged (4, 3 + 4), norm sqrt 65
    assert state.tolist() == [[pytest.approx([4 * (2 / 65) ** 0.5, 7 * (2 / 65) ** 0.5])]]


def test_losses_of_a_model_that_knows_nothing():
    # Uniform guesses: ln(vocab) a target; Eq. 24 divides T - k targets by T.
    model = make()
    torch.nn.init.zeros_(model.head.weight)
    losses = model.losses(tokens_of(model))
    nats = math.log(model.cfg.vocab_size)
    assert losses.main.item() == pytest.approx(nats)
    assert losses.mtp.tolist() == pytest.approx([nats * (T - 1) / T, nats * (T - 2) / T])


def test_total_weighs_the_mean_of_the_depths():
    model = make(seq_loss_alpha=0.1)
    losses = model.losses(tokens_of(model))
    expected = losses.main + 0.3 / 2 * (losses.mtp[0] + losses.mtp[1]) + losses.balance  # Eq. 25
    assert losses.total(0.3).item() == pytest.approx(expected.item())


def test_states_equal_the_loop():
    model = make()
    tokens = tokens_of(model, batch=1)
    w = equations.weights_of(model)
    loop = equations.forward(w, model.cfg, tokens[0, :-1].tolist(), depth=2)
    for k, state in enumerate(mtp_states(model, tokens), start=1):
        expected = torch.stack(loop.states[k])
        assert state.shape == (1, T - k, model.cfg.dim)
        assert (state[0] - expected).norm() <= FP32 * expected.norm()


@pytest.mark.parametrize("depth", [1, 2])
def test_state_reads_up_to_its_own_token_and_no_further(depth):
    # h^k_i reads t_0 .. t_(i+k): its target t_(i+k+1) and all later words may be shuffled.
    model = make().double()
    tokens = tokens_of(model)
    i = 3
    before = mtp_states(model, tokens)[depth - 1][:, : i + 1]
    future = tokens.clone()
    future[:, i + depth + 1 :] = (future[:, i + depth + 1 :] + 7) % model.cfg.vocab_size
    after = mtp_states(model, future)[depth - 1][:, : i + 1]
    torch.testing.assert_close(after, before, rtol=FP64, atol=FP64)
    near = tokens.clone()
    near[:, i + depth] = (near[:, i + depth] + 7) % model.cfg.vocab_size
    assert not mtp_states(model, near)[depth - 1][:, i].allclose(before[:, i], rtol=0.01)


def test_gradient_reaches_the_next_word_and_no_later_one():
    model = make(depth=1)
    module, i = model.mtp[0], 4
    hidden, embedding = torch.randn(2, 1, T, 8).unbind(0)
    hidden.requires_grad_()
    embedding.requires_grad_()  # position j holds Emb(t_(j+1))
    phase, visible = model.positions(1, T, offset=1)
    state, _ = module(hidden, embedding, phase, visible)
    grads = torch.autograd.grad(state[0, i].sin().sum(), [hidden, embedding])
    for grad in grads:
        assert grad[0, : i + 1].any(dim=-1).all()  # the whole past, through the block
        assert not grad[0, i + 1 :].any()  # t_(i+2) and later: exactly nothing


def test_depths_form_a_causal_chain():
    # Depth 2 reads depth 1's state: its loss teaches module 1; depth 1 knows nothing of module 2.
    model = make()
    losses = model.losses(tokens_of(model))
    first, second = (list(module.parameters()) for module in model.mtp)
    from_second = torch.autograd.grad(losses.mtp[1], first, retain_graph=True, allow_unused=True)
    assert any(grad is not None and grad.any() for grad in from_second)
    from_first = torch.autograd.grad(losses.mtp[0], second, allow_unused=True)
    assert not any(grad is not None and grad.any() for grad in from_first)


def test_embedding_and_head_are_shared():
    model = make()
    own = {name for name, _ in model.mtp[0].named_parameters()}
    assert not {name for name in own if "embed." in name or "head" in name}
    losses = model.losses(tokens_of(model))
    for weight in (model.embed, model.head.weight):
        (grad,) = torch.autograd.grad(losses.mtp[0], weight, retain_graph=True)
        assert grad.any()


def test_dropping_the_modules_leaves_the_logits_bit_identical():
    model, bare = make(), make(depth=0)  # the same seed draws the same main model
    ids = tokens_of(model)
    assert bare(ids).equal(model(ids))
    losses, bare_losses = model.losses(ids), bare.losses(ids)
    assert bare_losses.main.equal(losses.main)
    assert bare_losses.mtp.shape == (0,)
    assert bare_losses.total(0.3).equal(bare_losses.main + bare_losses.balance)


def test_too_few_tokens_are_refused():
    with pytest.raises(ValueError, match="at least 4 tokens a row, got 3"):
        make().losses(torch.zeros(1, 3, dtype=torch.int64))
