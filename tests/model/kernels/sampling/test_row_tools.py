"""Parts of compiled sampling: ordered integers, selection, sort, Philox; and the fused argmax."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.sampling import philox
from nanovllm.model.kernels.sampling.filters import select
from nanovllm.model.kernels.sampling.logprobs import sort_descending
from nanovllm.model.kernels.sampling.record import BINS_BYTES
from nanovllm.model.kernels.simd.memory import float_to_ordered, ordered_to_float
from nanovllm.model.kernels.step_record import NO_TOKEN, best_bytes
from nanovllm.model.philox import draw_keys, exponentials
from tests.support.kernel_entries import argmax_kernel
from tests.support.targets import WIDTHS

KEYS = st.integers(-(2**31), 2**31 - 1)
FLOATS = st.floats(width=32, allow_nan=False)


@compiled
def to_key(number: Any) -> int:
    return float_to_ordered(number)  # type: ignore[no-any-return]


@compiled
def to_number(key: int) -> Any:
    return ordered_to_float(key)


@given(one=FLOATS, other=FLOATS)
def test_ordered_integers_are_ordered_as_their_floats(one: float, other: float) -> None:
    a, b = np.float32(one), np.float32(other)
    assert to_number(to_key(a)) == a
    if a != b:
        assert (to_key(a) < to_key(b)) == (a < b)
    assert to_number(to_key(np.float32(1)) + 1) == np.nextafter(np.float32(1), np.float32(2))


def selected(
    keys: np.ndarray, weights: np.ndarray, goal: float, *, below: int = 0, above: int = 0
) -> int:
    keys, weights, bins = keys.copy(), weights.copy(), np.full(BINS_BYTES // 8, np.nan)
    low, high = int(keys.min()) - below, int(keys.max()) + above
    return int(
        select(
            keys.ctypes.data,
            weights.ctypes.data,
            bins.ctypes.data,
            keys.size,
            max(low, -(2**31)),
            min(high, 2**31 - 1),
            goal,
        )
    )


@given(
    keys=st.lists(KEYS, min_size=1, max_size=60)
    | st.lists(st.integers(-5, 5), min_size=1, max_size=60),
    data=st.data(),
)
def test_selection_finds_the_kth_largest(keys: list[int], data: st.DataObject) -> None:
    array, ones = np.array(keys, dtype=np.int32), np.ones(len(keys), dtype=np.float32)
    k = data.draw(st.integers(1, len(keys)))
    assert selected(array, ones, float(k)) == sorted(keys, reverse=True)[k - 1]
    assert selected(array, ones, len(keys) + 1.0) == min(keys), "the goal is not reached"
    below, above = data.draw(st.integers(0, 2**32)), data.draw(st.integers(0, 2**32))
    wider = {"below": below, "above": above}
    assert selected(array, ones, float(k), **wider) == sorted(keys, reverse=True)[k - 1]
    assert selected(array, ones, len(keys) + 1.0, **wider) == min(keys)


@given(
    keys=arrays(np.int32, st.integers(1, 80), elements=KEYS | st.integers(-3, 3)), data=st.data()
)
def test_selection_finds_where_the_weights_reach_the_goal(
    keys: np.ndarray, data: st.DataObject
) -> None:
    weights = data.draw(
        arrays(np.float32, keys.size, elements=st.integers(1, 64).map(lambda n: n / 64))
    )  # exact sums, so that no rounding decides
    goal = data.draw(st.integers(1, int(weights.sum(dtype=np.float64) * 64))) / 64
    order = np.argsort(-keys.astype(np.int64), kind="stable")
    reached = np.cumsum(weights[order], dtype=np.float64)
    assert selected(keys, weights, goal) == keys[order][int(np.searchsorted(reached, goal))]


@given(
    values=arrays(
        np.int64, st.integers(0, 70), elements=st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 2)
    )
)
def test_the_sort_is_numpys(values: np.ndarray) -> None:
    actual = values.copy()
    sort_descending(actual.ctypes.data, actual.size)
    np.testing.assert_array_equal(actual, np.sort(values)[::-1])


@given(
    seed=st.integers(0, 2**64 - 1),
    choice=st.integers(0, 2**32 - 1),
    position=st.integers(0, 2**32 - 1),
    token=st.integers(0, 99_999),
)
def test_noise_is_that_of_numpy(seed: int, choice: int, position: int, token: int) -> None:
    key = draw_keys(
        np.array([seed], dtype=np.uint64),
        np.array([choice], dtype=np.int64),
        np.array([position], dtype=np.int64),
    )[0]
    signed = seed - 2**64 if seed >= 2**63 else seed
    words = philox.draw_key(signed, choice, position)
    assert [word % 2**32 for word in words] == key.tolist()
    noise = exponentials(key, token + 1)[token]
    assert philox.exponential(token, *words) == pytest.approx(noise, rel=1e-14)


@pytest.fixture(scope="module", params=WIDTHS)
def greedy(request: pytest.FixtureRequest) -> Any:
    """Return greedy(scores, threads), the token of each row; threads take panels in turn."""
    target = request.param
    run, width, row_bytes = argmax_kernel(target), 4 * target.lanes, best_bytes(target.lanes)

    def tokens_of(logits: np.ndarray, threads: int) -> list[int]:
        rows, vocab = logits.shape
        padded = -(-vocab // width) * width
        scores = np.full((rows, padded), 1e30, dtype=np.float32)  # padding must not count
        scores[:, :vocab] = logits
        best = np.full((threads, rows, row_bytes // 4), np.nan, dtype=np.float32)
        tokens = np.zeros(rows, dtype=np.int64)
        values = np.array(
            [
                scores.ctypes.data, rows, vocab, padded, threads, best.ctypes.data,
                tokens.ctypes.data,
            ],
            dtype=np.int64,
        )  # fmt: skip
        assert run(values.ctypes.data, 0) == 0
        return tokens.tolist()

    return tokens_of


@given(
    logits=arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 300)),
        elements=st.integers(-3, 3).map(float),
    ),
    threads=st.integers(1, 4),
)
def test_the_fused_argmax_is_numpys_ties_included(
    greedy: Any, logits: np.ndarray, threads: int
) -> None:
    assert greedy(logits, threads) == logits.argmax(axis=1).tolist()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("index", [0, 63, 64, 150, 199])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.nan])
def test_a_row_that_is_not_finite_has_no_token(
    greedy: Any, threads: int, index: int, bad: float
) -> None:
    logits = np.random.default_rng(index).standard_normal((3, 200), dtype=np.float32)
    expected = logits.argmax(axis=1).tolist()
    logits[1, index] = bad
    logits[0, index] = -np.inf
    assert greedy(logits, threads) == [int(logits[0].argmax()), NO_TOKEN, expected[2]]
    assert greedy(np.full((1, 70), -np.inf, dtype=np.float32), threads) == [NO_TOKEN]
    assert greedy(np.full((1, 70), -3e38, dtype=np.float32), threads) == [0]
