"""The loss of states and of logits, and how many targets it is divided by."""

import math

import pytest
import torch

from minids.loss import count_targets, cross_entropy, target_sum


def test_cross_entropy_by_hand():
    # probabilities 1/4, 3/4 and 1/2, 1/2; the third row does not count
    logits = torch.tensor([[0.0, math.log(3)], [1.0, 1.0], [0.0, 9.0]])
    loss = cross_entropy(logits, torch.tensor([0, 1, -100]))
    assert loss.item() == pytest.approx(math.log(4) + math.log(2))


def test_sixteen_bit_logits_are_summed_in_fp32():
    logits = torch.zeros(3000, 3, dtype=torch.bfloat16)
    loss = cross_entropy(logits, torch.zeros(3000, dtype=torch.int64))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(3000 * math.log(3), rel=1e-6)


def test_target_sum_is_the_loss_of_the_heads_logits():
    hidden, weight = torch.randn(7, 5, dtype=torch.float64), torch.randn(11, 5, dtype=torch.float64)
    targets = torch.tensor([0, 3, -100, 10, 3, 3, 1])
    nats = [
        math.log(sum(math.exp(float(row @ word)) for word in weight)) - float(row @ weight[target])
        for row, target in zip(hidden, targets.tolist(), strict=True)
        if target >= 0
    ]
    assert target_sum(hidden, weight, targets).item() == pytest.approx(sum(nats), rel=1e-12)


def test_under_autocast_the_product_is_made_in_sixteen_bits_and_the_sum_is_not():
    hidden, weight = torch.randn(7, 64), torch.randn(11, 64)
    targets = torch.zeros(7, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        loss = target_sum(hidden, weight, targets)
    product = hidden.bfloat16() @ weight.bfloat16().T
    assert loss == cross_entropy(product.float(), targets)


def test_targets_of_another_document_do_not_count():
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    assert count_targets(tokens) == 6
    assert count_targets(tokens, torch.tensor([[1, 1, 2, 2], [1, 2, 3, 4]])) == 2
