import pytest
import torch

from minids.norm import RMSNorm

# FP32 rounds at 6e-8; means of a few dozen squares stay within ten times that.
TOLERANCE = 1e-6


def test_by_hand():
    """The root mean square of (3, 4) is sqrt(12.5), so the unit vector is (3, 4) / 3.5355."""
    norm = RMSNorm(2, eps=0.0)
    norm.gain.data = torch.tensor([1.0, 10.0])
    y = norm(torch.tensor([3.0, 4.0]))
    torch.testing.assert_close(y, torch.tensor([0.848528137, 11.3137085]), rtol=TOLERANCE, atol=0)


def test_eps_is_added_to_the_mean_square():
    """A mean square of 1 and an eps of 3: divide by sqrt(4), not by 1 + sqrt(3)."""
    norm = RMSNorm(2, eps=3.0)
    y = norm(torch.tensor([1.0, -1.0]))
    torch.testing.assert_close(y, torch.tensor([0.5, -0.5]), rtol=TOLERANCE, atol=0)


def test_zero_stays_zero():
    assert torch.equal(RMSNorm(4, eps=1e-6)(torch.zeros(2, 4)), torch.zeros(2, 4))


@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3, 48)])
def test_equals_a_loop(shape):
    norm = RMSNorm(shape[-1], eps=1e-6)
    norm.gain.data.normal_()
    x = torch.randn(shape)
    expected = torch.empty(shape, dtype=torch.float64)
    for index in torch.cartesian_prod(
        *(torch.arange(n) for n in shape[:-1]), torch.zeros(1).long()
    ):
        place = tuple(index.reshape(-1)[:-1].tolist())
        row = x[place].double()
        mean_square = sum(value.item() ** 2 for value in row) / len(row)
        for d in range(len(row)):
            expected[(*place, d)] = norm.gain[d].item() * row[d] / (mean_square + 1e-6) ** 0.5
    torch.testing.assert_close(norm(x).double(), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_scale_does_not_matter_but_sign_does():
    norm = RMSNorm(32, eps=1e-12)
    x = torch.randn(5, 32)
    torch.testing.assert_close(norm(1000 * x), norm(x), rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(norm(-x), -norm(x), rtol=0, atol=0)


def test_positions_do_not_mix():
    norm = RMSNorm(8, eps=1e-6)
    x = torch.randn(3, 8)
    moved = x.clone()
    moved[1] *= 2
    moved[1, 0] += 1
    assert torch.equal(norm(moved)[[0, 2]], norm(x)[[0, 2]])


def test_bf16_is_normalised_in_fp32():
    """Squares of 300 summed in BF16 would lose most terms; only input and output are rounded."""
    norm = RMSNorm(512, eps=1e-6).bfloat16()
    x = (300 * torch.randn(4, 512)).bfloat16()
    y = norm(x)
    assert y.dtype == torch.bfloat16
    unit = x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
    # BF16 keeps 8 bits: rounding is at most 2^-9 of the value
    torch.testing.assert_close(y.double(), unit, rtol=2**-8, atol=0)


def test_gain_starts_at_1_and_has_a_gradient():
    norm = RMSNorm(6, eps=1e-6)
    assert torch.equal(norm.gain.data, torch.ones(6))
    norm(torch.randn(2, 6)).sum().backward()
    assert norm.gain.grad is not None
    assert norm.gain.grad.all()


def test_autocast_does_not_round_the_mean_square():
    norm, x = RMSNorm(300, 1e-6), torch.randn(7, 300)
    with torch.autocast("cpu", torch.bfloat16):
        inside = norm(x)
    assert torch.equal(inside, norm(x))
