import cmath
import math

import pytest
import torch

from minids import Config, preset
from minids.rope import frequencies, phases, ramp_bounds, rotate, softmax_scale

# FP32 angles of up to a few hundred radians round at 2e-5; the tests keep to small positions.
TOLERANCE = 1e-5
# the golden numbers are printed with 6 or 7 digits
PRINTED = 2e-6

V3 = preset("v3")


def turned(x: torch.Tensor, position: int, freq: torch.Tensor) -> torch.Tensor:
    """Return [R] channels rotated at one position."""
    phase = phases(torch.tensor([[position]]), freq)
    return rotate(x[None, None], phase)[0, 0]


def test_by_hand():
    """A quarter turn sends (1, 0) to (0, 1) and (0, 1) to (-1, 0): neighbours are the pairs."""
    phase = torch.polar(torch.ones(1, 1, 2), torch.tensor([[[math.pi / 2, math.pi]]]))
    y = rotate(torch.tensor([[[1.0, 0.0, 3.0, 4.0]]]), phase)
    expected = torch.tensor([[[0.0, 1.0, -3.0, -4.0]]])
    torch.testing.assert_close(y, expected, rtol=0, atol=TOLERANCE)


def test_golden_correction_dims():
    """Fact sheet 11: 10.472241 and 22.513441, so 10 and 23; one step less in length moves them."""
    exact = [64 * math.log(4096 / (2 * math.pi * turns)) / (2 * math.log(1e4)) for turns in (32, 1)]
    assert exact == pytest.approx([10.472241, 22.513441], abs=1e-6)
    assert ramp_bounds(V3) == (10, 23)


def test_ramp_bounds_come_from_wavelengths():
    """Each bound, walked to: the last pair that turns >= 32 times, the first that turns <= once."""
    turns = [4096 * 1e4 ** (-2 * k / 64) / (2 * math.pi) for k in range(32)]
    low, high = ramp_bounds(V3)
    assert turns[low] >= 32 > turns[low + 1]
    assert turns[high - 1] > 1 >= turns[high]


@pytest.mark.parametrize(
    ("k", "expected"),
    [
        (0, 1.0),
        (10, 0.05623413),
        (11, 0.03900693),
        (16, 0.0055),
        (23, 3.33380e-5),
        (31, 3.33380e-6),
    ],
)
def test_golden_frequencies(k: int, expected: float):
    assert frequencies(V3)[k].item() == pytest.approx(expected, rel=PRINTED)


def test_golden_softmax_scales():
    assert softmax_scale(V3) == pytest.approx(0.1352338, rel=PRINTED)
    assert softmax_scale(preset("v2_lite")) == pytest.approx(0.114721, rel=5e-6)


def test_factor_1_is_plain_rope():
    plain = preset("v3", rope_factor=1.0)
    freq = frequencies(plain)
    for k in range(32):
        assert freq[k].item() == pytest.approx(10_000 ** (-2 * k / 64), rel=1e-6)
    assert softmax_scale(plain) == pytest.approx(192**-0.5, rel=1e-12)


def test_a_factor_just_above_1_changes_little():
    """YaRN switches on without a jump."""
    near = preset("v3", rope_factor=1.0 + 1e-6)
    torch.testing.assert_close(
        frequencies(near), frequencies(preset("v3", rope_factor=1.0)), rtol=PRINTED, atol=0
    )


def test_equals_a_loop():
    freq = frequencies(V3)[::4]  # 8 pairs, slow ones too
    x = torch.randn(2, 3, 2, 16)
    positions = torch.tensor([[0, 1, 7], [40, 5, 2]])
    y = rotate(x, phases(positions, freq))
    expected = torch.empty(2, 3, 2, 16)
    for b, t, h, k in torch.cartesian_prod(*map(torch.arange, (2, 3, 2, 8))).tolist():
        angle = positions[b, t].item() * freq[k].item()
        pair = complex(x[b, t, h, 2 * k].item(), x[b, t, h, 2 * k + 1].item())
        pair *= cmath.exp(1j * angle)
        expected[b, t, h, 2 * k], expected[b, t, h, 2 * k + 1] = pair.real, pair.imag
    torch.testing.assert_close(y, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("rope_factor", [1.0, 40.0])
def test_scores_depend_on_distance_only(rope_factor: float):
    freq = frequencies(preset("v3", rope_factor=rope_factor))
    q, k = torch.randn(64), torch.randn(64)
    near = turned(q, 9, freq) @ turned(k, 4, freq)
    far = turned(q, 109, freq) @ turned(k, 104, freq)
    other = turned(q, 9, freq) @ turned(k, 5, freq)
    # angles of 109 radians round at 8e-6, over 64 products
    assert far.item() == pytest.approx(near.item(), abs=1e-3)
    assert abs(other - near) > 0.1


def test_lengths_are_kept_and_position_0_is_still():
    freq = frequencies(V3)
    x = torch.randn(64)
    assert torch.equal(turned(x, 0, freq), x)
    moved = turned(x, 77, freq)
    assert not torch.allclose(moved, x)
    torch.testing.assert_close(moved.norm(), x.norm(), rtol=TOLERANCE, atol=0)


def test_one_key_and_many_heads_turn_alike():
    """[B, T, R] (the shared key) and [B, T, H, R] (queries) see the same angles."""
    phase = phases(torch.arange(5)[None], frequencies(V3))
    x = torch.randn(2, 5, 64)
    alone = rotate(x, phase)
    heads = rotate(x[:, :, None].expand(-1, -1, 3, -1), phase)
    assert torch.equal(heads, alone[:, :, None].expand(-1, -1, 3, -1))


def test_bf16_is_turned_in_fp32():
    freq = frequencies(V3)
    x = torch.randn(64).bfloat16()
    y = turned(x, 123, freq)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, turned(x.float(), 123, freq).bfloat16())


def test_only_mla_turns_a_part_of_the_head():
    """The baselines rotate all of their N channels, and scale by N alone."""
    mha = Config(
        vocab_size=8, dim=8, n_layers=1, inter_dim=8, moe_inter_dim=8, n_heads=2, attn="mha",
        kv_lora_rank=4, qk_nope_head_dim=16, qk_rope_head_dim=4, v_head_dim=4,
    )  # fmt: skip
    assert len(frequencies(mha)) == 8
    assert softmax_scale(mha) == 16**-0.5
