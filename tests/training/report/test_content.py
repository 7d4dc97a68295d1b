"""Downsampling of the lines in a report."""

from hypothesis import given
from hypothesis import strategies as st

from nanovllm.training.report.content import downsample


@given(values=st.lists(st.none() | st.floats(-100, 100), max_size=600), limit=st.integers(10, 100))
def test_downsampling_keeps_extremes_ends_and_gaps(values: list[float | None], limit: int) -> None:
    kept = sorted(downsample(values, limit))
    assert len(kept) <= limit
    finite = [value for value in values if value is not None]
    shown = [value for index in kept if (value := values[index]) is not None]
    if finite:
        assert (min(shown), max(shown)) == (min(finite), max(finite))
        assert (shown[0], shown[-1]) == (finite[0], finite[-1])
    assert any(values[index] is None for index in kept) == (None in values)
    if len(values) <= limit:
        assert kept == list(range(len(values)))
