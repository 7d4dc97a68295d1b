"""Axes, ticks and downsampling."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.training.report.formatting import format_ticks
from nanovllm.training.report.scales import Scale, downsample, fit_scale

FINITE = st.floats(-1e100, 1e100)


@given(values=st.lists(FINITE, min_size=1), from_zero=st.booleans(), may_be_log=st.booleans())
def test_every_value_lies_on_its_axis(
    values: list[float], from_zero: bool, may_be_log: bool
) -> None:
    scale = fit_scale(values, from_zero=from_zero, may_be_log=may_be_log)
    assert all(-1e-6 <= scale.fraction(value) <= 1 + 1e-6 for value in values)
    ticks = scale.ticks(5)
    assert len(ticks) <= 7
    assert all(-1e-6 <= scale.fraction(tick) <= 1 + 1e-6 for tick in ticks)
    assert len(format_ticks(ticks)) == len(ticks)


@pytest.mark.parametrize(
    ("scale", "ticks"),
    [
        (Scale(0, 2000), ["0", "500", "1000", "1500", "2000"]),
        (Scale(0, 480_000), ["0", "100k", "200k", "300k", "400k"]),
        (Scale(0, 3.1e9), ["0", "1B", "2B", "3B"]),
        (Scale(1.58, 4.3), ["2", "3", "4"]),
        (Scale(0, 3.2e-5), ["0", "1e-5", "2e-5", "3e-5"]),
        (Scale(0.09, 1100, is_log=True), ["0.1", "1", "10", "100", "1000"]),
        (Scale(0.9, 12, is_log=True), ["1", "2", "5", "10"]),
        (Scale(0.9, 1e12, is_log=True), ["1", "1000", "1M", "1B", "1T"]),
    ],
)
def test_ticks_are_round(scale: Scale, ticks: list[str]) -> None:
    labels = [format_ticks([tick])[0] for tick in scale.ticks(5)]
    assert ticks == (labels if scale.is_log else format_ticks(scale.ticks(5)))


def test_ticks_of_counts_are_integers() -> None:
    assert Scale(0, 1).ticks(5, min_step=1.0) == [0, 1]


def test_a_wide_range_is_logarithmic_where_allowed() -> None:
    assert fit_scale([0.1, 100], may_be_log=True).is_log
    assert not fit_scale([0.1, 100]).is_log
    assert not fit_scale([0.0, 100], may_be_log=True).is_log
    assert not fit_scale([2, 10], may_be_log=True).is_log


@given(values=st.lists(st.none() | st.floats(-100, 100), max_size=600), limit=st.integers(10, 100))
def test_downsampling_keeps_extremes_ends_and_gaps(values: list[float | None], limit: int) -> None:
    kept = downsample(values, limit)
    assert len(kept) <= limit
    assert kept == sorted(set(kept))
    finite = [value for value in values if value is not None]
    shown = [value for index in kept if (value := values[index]) is not None]
    if finite:
        assert (min(shown), max(shown)) == (min(finite), max(finite))
        assert (shown[0], shown[-1]) == (finite[0], finite[-1])
    assert any(values[index] is None for index in kept) == (None in values)
    if len(values) <= limit:
        assert kept == list(range(len(values)))
