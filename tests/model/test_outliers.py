"""Which input channels of a layer are outliers, which int8 leaves as they are."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.model.quantization import (
    MAX_OUTLIERS,
    choose_outliers,
)

# ---- which channels are outliers


def test_channels_that_are_alike_have_no_outliers() -> None:
    assert choose_outliers(np.ones(256, dtype=np.float32)).size == 0
    assert choose_outliers(np.zeros(256, dtype=np.float32)).size == 0
    assert (
        choose_outliers(
            np.abs(np.random.default_rng(0).normal(0, 1, (256, 768))).max(axis=0).astype(np.float32)
        ).size
        == 0
    )


def test_the_largest_channels_are_outliers_in_ascending_order() -> None:
    peaks = np.ones(256, dtype=np.float32)
    peaks[[200, 9, 40]] = [3, 50, 7]
    np.testing.assert_array_equal(choose_outliers(peaks), [9, 40, 200])
    peaks[:MAX_OUTLIERS] = 1000
    np.testing.assert_array_equal(choose_outliers(peaks), np.arange(MAX_OUTLIERS))


@given(peaks=st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=100))
def test_at_most_half_of_the_channels_are_outliers(peaks: list[float]) -> None:
    chosen = choose_outliers(np.array(peaks, dtype=np.float32))
    assert len(chosen) <= min(MAX_OUTLIERS, len(peaks) // 2)
    assert not len(chosen) or np.delete(peaks, chosen).max() <= np.array(peaks)[chosen].min()
