"""Our model against transformers on random weights, config by config, tensor by tensor."""

from functools import lru_cache
from typing import NamedTuple

import oracle
import pytest
import torch
from oracle import Oracle, relative_error
from small_models import BASE, CONFIGS, WITH_MTP, drawn
from torch import Tensor

from minids import Config, Transformer

# FP32 rounds at 6e-8; sums in another order through a few layers reach 2e-6 in these configs.
# A wrong formula shows at 1e-3 or more.
TOLERANCE = 1e-5

every_config = pytest.mark.parametrize("name", CONFIGS)


class Pair(NamedTuple):
    model: Transformer
    oracle: Oracle
    tokens: Tensor


@lru_cache
def pair(name: str) -> Pair:
    """Return a model whose weights all matter, its oracle, and text past YaRN's original length."""
    model, draw = drawn(name)
    tokens = torch.randint(model.cfg.vocab_size, (2, 41), generator=draw)
    return Pair(model, Oracle(model), tokens)


def test_configs_cover_every_variant():
    configs = [Config(**BASE | changes) for changes in CONFIGS.values()]
    covered = {
        "query latent": {cfg.q_lora_rank > 0 for cfg in configs},
        "groups": {cfg.n_expert_groups for cfg in configs},
        "YaRN": {cfg.rope_factor > 1 for cfg in configs},
        "shared experts": {cfg.n_shared_experts for cfg in configs},
        "dense layers": {cfg.n_dense_layers for cfg in configs},
        "MTP": {cfg.mtp_depth for cfg in configs},
        "scores": {cfg.score_func for cfg in configs},
    }
    assert covered == {
        "query latent": {True, False},
        "groups": {1, 2, 4},
        "YaRN": {True, False},
        "shared experts": {0, 1, 2},
        "dense layers": {0, 1, 3},
        "MTP": {0, 1, 2},
        "scores": {"sigmoid", "softmax"},
    }
    assert all(cfg.original_seq_len < 40 for cfg in configs if cfg.rope_factor > 1)


@every_config
def test_logits(name: str):
    model, theirs, tokens = pair(name)
    assert relative_error(model(tokens), theirs.logits(tokens)) <= TOLERANCE


@every_config
def test_cached_decoding(name: str):
    """Prefill, one token at a time, then several at once, each side with its own cache."""
    model, theirs, tokens = pair(name)
    chunks = [9, *[1] * 12, 5, 15]
    expected = theirs.decode(tokens, chunks).split(chunks, dim=1)
    cache = model.new_cache(batch=2, capacity=41)
    for part, logits in zip(tokens.split(chunks, dim=1), expected, strict=True):
        assert relative_error(model(part, cache=cache), logits) <= TOLERANCE


@every_config
def test_losses(name: str):
    model, theirs, tokens = pair(name)
    losses = model.losses(tokens)
    ours = torch.cat([losses.main[None], losses.mtp])
    for mine, its in zip(ours, theirs.losses(tokens), strict=True):
        assert relative_error(mine, its) <= TOLERANCE


@every_config
def test_gradient_of_every_parameter(name: str):
    model, theirs, tokens = pair(name)
    model.zero_grad()
    model.losses(tokens).total(mtp_weight=0.3).backward()
    expected = theirs.gradients(tokens, mtp_weight=0.3)
    assert expected.keys() == dict(model.named_parameters()).keys()
    for parameter_name, weight in model.named_parameters():
        grad = expected[parameter_name].reshape(weight.shape)
        assert weight.grad is not None, f"{parameter_name} has no gradient"
        error = relative_error(weight.grad, grad)
        assert error <= TOLERANCE, f"{parameter_name} is off by {error:.1e}"
        assert grad.any(), f"{parameter_name} does not matter: the comparison is empty"
        idle = (grad == 0).flatten(1).all(1) if grad.ndim > 1 else grad == 0
        assert not weight.grad[idle].any(), f"{parameter_name}: zero there, not here"


def test_gradient_of_an_unused_expert_is_exactly_zero():
    """Few tokens leave experts and words untouched; both sides agree on which."""
    model, theirs, tokens = pair("not_normalised")
    model.zero_grad()
    model.losses(tokens[:1, :4]).total(mtp_weight=0.3).backward()
    expected = theirs.gradients(tokens[:1, :4], mtp_weight=0.3)
    for name in ("embed", "layers.1.ffn.experts.w_gate_up", "mtp.0.block.ffn.experts.w_down"):
        grad = model.get_parameter(name).grad
        assert grad is not None
        idle = (expected[name] == 0).flatten(1).all(1)
        assert idle.any(), f"every row of {name} was used: the test shows nothing"
        assert torch.equal((grad == 0).flatten(1).all(1), idle), name


@pytest.mark.parametrize("name", WITH_MTP)
def test_mtp_hidden_states(name: str):
    model, theirs, tokens = pair(name)
    with torch.no_grad():
        hidden = model.hidden(tokens[:, :-1])
        ours = [hidden]
        for k, module in enumerate(model.mtp, start=1):
            ids = tokens[:, k:-1]
            phase, visible = model.positions(*ids.shape, offset=k)
            hidden, _ = module(hidden[:, :-1], model.embed[ids], phase, visible)
            ours.append(hidden)
        expected = theirs.hidden_states(tokens)
    for mine, its in zip(ours, expected, strict=True):
        assert relative_error(mine, its) <= TOLERANCE


@pytest.mark.parametrize("name", WITH_MTP)
@torch.no_grad()
def test_drafts(name: str):
    """The main model's next token, then each module's, reading the draft of the one before."""
    model, theirs, tokens = pair(name)
    drafted, logits = theirs.drafts(tokens)
    hidden = model.hidden(tokens)
    chain = [model.head(hidden[:, -1:]).argmax(-1)]
    ids = tokens
    for k, module in enumerate(model.mtp, start=1):
        ids = torch.cat([ids[:, 1:], chain[-1]], dim=1)
        phase, visible = model.positions(*ids.shape, offset=k)
        hidden, _ = module(hidden, model.embed[ids], phase, visible)
        last = model.head(hidden[:, -1:])
        assert relative_error(last, logits[:, k - 1 : k]) <= TOLERANCE
        chain.append(last.argmax(-1))
    assert torch.equal(torch.cat(chain, dim=1), drafted)


def test_negative_bias_would_show_masking_with_zero():
    """Every biased score is below 0: experts of a group masked with 0 would beat the kept ones."""
    model = pair("negative_bias").model
    router = model.routers[0]
    x = torch.randn(200, model.cfg.dim, generator=torch.Generator().manual_seed(3))
    _, ids, score, _ = router(x)
    assert (score + router.bias).max() < 0
    groups = ids // model.cfg.experts_per_group
    assert (groups == groups[:, :1]).all(), "n_limited_groups is 1"


def test_oracle_refuses_what_transformers_cannot_compute():
    with pytest.raises(ValueError, match="1e-6"):
        oracle.hf_config(Config(**BASE | dict(norm_eps=1e-5)))
    with pytest.raises(ValueError, match="one expert a group"):
        oracle.hf_config(Config(**BASE | dict(n_expert_groups=8, n_limited_groups=4)))
