"""Schedules against their formulas."""

import math

import pytest

from phi35.training.schedule import learning_rate_factor


def curve(steps, **options):
    return [learning_rate_factor(step, total_steps=steps, **options) for step in range(steps)]


def test_warmup_rises_linearly_to_the_peak():
    values = curve(20, schedule="constant", warmup_steps=4)
    assert values[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert values[-1] == 1.0


def test_cosine_follows_its_formula_and_ends_at_the_floor():
    values = curve(110, schedule="cosine", warmup_steps=10, floor=0.1)
    assert values[9] == 1.0 and values[10] == 1.0
    for step in (10, 35, 60, 109):
        expected = 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 10) / 100)) / 2
        assert values[step] == expected
    assert values[60] == pytest.approx(0.55, abs=1e-12)  # half way: the mean of peak and floor
    assert learning_rate_factor(110, schedule="cosine", total_steps=110, warmup_steps=10, floor=0.1) == 0.1


def test_linear_falls_evenly_to_the_floor():
    values = curve(110, schedule="linear", warmup_steps=10, floor=0.2)
    assert values[9] == values[10] == 1.0
    falls = [before - after for before, after in zip(values[10:], values[11:], strict=False)]
    assert falls == pytest.approx([0.008] * 99, abs=1e-12)
    assert learning_rate_factor(110, schedule="linear", total_steps=110, warmup_steps=10, floor=0.2) == 0.2


def test_wsd_holds_the_peak_and_decays_in_the_last_part():
    values = curve(100, schedule="wsd", warmup_steps=5, decay_steps=20, floor=0.0)
    assert set(values[5:80]) == {1.0}
    assert values[80] == 1.0 and values[90] == 0.5 and values[99] == pytest.approx(0.05, abs=1e-12)


def test_no_warmup_starts_at_the_peak():
    assert curve(3, schedule="cosine")[0] == 1.0


def test_unknown_schedule_is_named():
    with pytest.raises(ValueError, match="'sawtooth'"):
        learning_rate_factor(0, schedule="sawtooth", total_steps=1)
