"""minids/schedule.py: V3's published schedule, small copies, what it refuses."""

import math
from dataclasses import replace

import pytest

from minids import preset
from minids.schedule import V3, Rates, Schedule

CFG = preset("v3")
FULL_BATCH = 62_914_560  # fact sheet 4.1: tokens of 15,360 sequences of 4,096


def small(**changes) -> Schedule:
    phases = dict(constant=40.0, cosine=40.0, tail=10.0, last_tail=10.0)
    shape = dict(peak_lr=1.0, warmup_steps=2, cosine_end=0.2, last=0.1, batch=4, first_batch=4)
    return Schedule(**(phases | shape | changes))


def test_a_run_of_100_tokens_by_hand():
    schedule = small()
    steps = [(0, 0), (1, 4), (2, 8), (9, 39), (10, 40), (15, 60), (20, 80), (22, 89), (23, 90)]
    lr = [schedule.rates(CFG, step, tokens).lr for step, tokens in steps]
    # half of the warm-up, its end, constant; top, middle and end of the cosine; both tails
    assert lr == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 0.6, 0.2, 0.2, 0.1])


def test_v3_is_the_fact_sheet():
    assert V3.tokens == 14.8e12 == 10e12 + 4.3e12 + 333e9 + 167e9
    assert V3.batch * CFG.original_seq_len == FULL_BATCH
    assert V3.first_batch * CFG.original_seq_len == 12_582_912
    at = {tokens: V3.rates(CFG, 10**6, tokens) for tokens in (1e12, 12.15e12, 14.3e12, 14.7e12)}
    assert at[1e12] == Rates(2.2e-4, 0.3, 0.001)
    middle = (2.2e-4 + 2.2e-5) / 2
    assert at[12.15e12] == (pytest.approx(middle), pytest.approx(0.1), 0.001)
    assert at[14.3e12] == (pytest.approx(2.2e-5), pytest.approx(0.1), 0)
    assert at[14.7e12] == (pytest.approx(7.3e-6), pytest.approx(0.1), 0)
    assert at[1e12].lr / at[14.7e12].lr == pytest.approx(30.1, abs=0.05)


def test_v3_warms_up_over_2000_steps():
    lr = [V3.rates(CFG, step, 1e9).lr for step in (0, 999, 1999, 2000)]
    assert lr == pytest.approx([2.2e-4 / 2000, 1.1e-4, 2.2e-4, 2.2e-4])


def test_v3_batch_ramp():
    """Both ends are published, the shape between them is ours: it never falls."""
    batches = [V3.batch_at(tokens * 1e9) for tokens in range(470)]
    assert (batches[0], batches[468], batches[469]) == (3072, 12_288, 15_360)
    assert batches == sorted(batches)
    assert set(batches) == {3072, 6144, 9216, 12_288, 15_360}


def test_phases_meet_without_a_jump_down_or_up():
    """The cosine starts at the peak and ends at the tail: neighbours a token apart are close."""
    for border in (V3.constant, V3.constant + V3.cosine):
        before, after = (V3.rates(CFG, 10**6, border + side).lr for side in (-1.0, 1.0))
        assert before == pytest.approx(after, rel=1e-6)


def test_scaled_keeps_the_shape():
    schedule = V3.scaled(64_000, peak_lr=4e-3, warmup_steps=10, batch=20)
    assert schedule.tokens == 64_000
    assert (schedule.batch_at(0), schedule.batch_at(64_000)) == (4, 20)
    for share in (0.1, 0.7, 0.8, 0.97, 0.995):
        ours = schedule.rates(CFG, 10**6, share * schedule.tokens)
        theirs = V3.rates(CFG, 10**6, share * V3.tokens)
        assert ours.lr / 4e-3 == pytest.approx(theirs.lr / 2.2e-4)
        assert ours[1:] == theirs[1:]


def test_scaled_without_a_ramp_where_stairs_do_not_divide_the_batch():
    schedule = V3.scaled(64_000, peak_lr=4e-3, warmup_steps=10, batch=16)
    assert {schedule.batch_at(tokens) for tokens in range(0, 64_000, 100)} == {16}


@pytest.mark.parametrize("tokens", [1, 7, 999, 128_000, 2_048_000, 10**9])
def test_scaled_length_is_exact(tokens):
    """Phases are fractions: their sum must not be a rounding away from the tokens asked for."""
    assert V3.scaled(tokens, peak_lr=1.0, warmup_steps=1, batch=1).tokens == tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(peak_lr=0.0), "peak_lr must not be 0"),
        (dict(peak_lr=-1.0), "peak_lr must be a number >= 0, got -1.0"),
        (dict(peak_lr=math.nan), "peak_lr must be a number >= 0, got nan"),
        (dict(cosine=math.inf), "cosine must be a number >= 0, got inf"),
        (dict(batch=0), "batch must be a number >= 1, got 0"),
        (dict(warmup_steps=0), "warmup_steps must be a number >= 1, got 0"),
        (dict(batch=5), "batch must be a multiple of first_batch, got 5 and 4"),
        (dict(constant=0.0, cosine=0.0, tail=0.0, last_tail=0.0), "tokens and peak_lr must not be"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(small(), **changes)
