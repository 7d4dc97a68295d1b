"""The learning rate of each update."""

import pytest

from nanovllm.training.network.schedule import Schedule


def test_learning_rate_rises_and_falls_to_the_floor() -> None:
    schedule = Schedule(peak=1.0, floor=0.1, warmup_steps=9, steps=109)
    rates = [schedule.learning_rate(step) for step in range(120)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert rates[59] == pytest.approx(0.55)
    assert rates[109:] == [0.1] * 11
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_constant_keeps_the_peak_after_the_warmup() -> None:
    schedule = Schedule(peak=0.4, floor=0.1, warmup_steps=3, steps=9, kind="constant")
    rates = [schedule.learning_rate(step) for step in range(12)]
    assert rates == [0.1, 0.2, pytest.approx(0.3)] + [0.4] * 9


def test_wsd_is_constant_and_decays_linearly_at_the_end() -> None:
    schedule = Schedule(1.0, 0.2, warmup_steps=1, steps=10, kind="wsd", decay_steps=4)
    rates = [schedule.learning_rate(step) for step in range(12)]
    assert rates[:7] == [0.5] + [1.0] * 6
    assert rates[7:] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.2])


def test_the_first_difference_of_two_schedules_is_where_the_decay_of_one_begins() -> None:
    short = Schedule(0.3, 0.1, warmup_steps=2, steps=10, kind="wsd", decay_steps=4)
    long = Schedule(0.3, 0.1, warmup_steps=2, steps=99, kind="wsd", decay_steps=4)
    assert short.first_difference(long, 99) == 7
    assert short.first_difference(long, 7) is None
