import torch

from minids import fp8
from minids.linear import Linear

# sums of at most 16 products in another order
TOLERANCE = 1e-6


def test_by_hand():
    linear = Linear(3, 2)
    linear.weight.data = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 1.0]])
    y = linear(torch.tensor([1.0, 10.0, 100.0]))
    assert torch.equal(y, torch.tensor([321.0, 90.0]))


def test_equals_a_loop():
    linear = Linear(16, 5)
    linear.weight.data.normal_()
    x = torch.randn(2, 3, 16)
    expected = torch.zeros(2, 3, 5)
    for b in range(2):
        for t in range(3):
            for out in range(5):
                for d in range(16):
                    expected[b, t, out] += linear.weight[out, d].detach() * x[b, t, d]
    torch.testing.assert_close(linear(x), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_has_no_bias():
    linear = Linear(4, 3)
    linear.weight.data.normal_()
    assert [name for name, _ in linear.named_parameters()] == ["weight"]
    assert torch.equal(linear(torch.zeros(2, 4)), torch.zeros(2, 3))


def test_building_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    Linear(64, 64)
    assert torch.equal(torch.get_rng_state(), before)


def test_in_fp8_while_it_is_trained_so():
    """1/3 beside 1 is 149.3 of 448: the nearest code is 144. Weights are 448 both."""
    in_fp8, plain = Linear(2, 1, fp8.MOST), Linear(2, 1)
    for linear in (in_fp8, plain):
        linear.weight.data = torch.tensor([[3.0, 3.0]])
    x = torch.tensor([[1.0, 1 / 3]])
    expected = 3 * (1 + 144 / 448)
    torch.testing.assert_close(in_fp8(x), torch.tensor([[expected]]), rtol=TOLERANCE, atol=0)
    assert torch.equal(plain(x), torch.tensor([[4.0]]))
    assert torch.equal(in_fp8.eval()(x), plain(x))
