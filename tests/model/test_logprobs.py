"""Reported log-probabilities against float64, ranks, and the order among equals."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nanovllm.model.logprobs import log_softmax, token_logprobs

GRID = st.sampled_from([-3.0, -1.0, -0.5, 0.0, 0.5, 2.0, 7.0])  # few values, so that many are equal


def exact(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    logprobs: np.ndarray = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return logprobs


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


@pytest.mark.parametrize("spread", [0.01, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("vocab", [1, 97, 50257])
def test_log_softmax_is_that_of_float64(spread: float, vocab: int) -> None:
    logits = np.random.default_rng(1).normal(-50, spread, (5, vocab)).astype(np.float32)
    actual = log_softmax(logits)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, exact(logits), rtol=1e-6, atol=1e-5)


@given(
    logits=arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 12)), elements=GRID),
    data=st.data(),
)
def test_a_report_has_the_token_and_the_most_likely_in_order(
    logits: np.ndarray, data: st.DataObject
) -> None:
    rows, vocab = logits.shape
    tokens = [data.draw(st.integers(0, vocab - 1)) for _ in range(rows)]
    counts = [data.draw(st.integers(0, vocab + 3)) for _ in range(rows)]
    expected = exact(logits)
    for row, actual in enumerate(token_logprobs(logits, ints(*tokens), ints(*counts))):
        by_likelihood = sorted(
            range(vocab),
            key=lambda token, row=row: (-logits[row, token], token),  # type: ignore[misc]
        )
        best = by_likelihood[: counts[row]]
        assert list(actual.token_ids) == [tokens[row], *best]
        assert actual.rank == 1 + by_likelihood.index(tokens[row])
        np.testing.assert_allclose(
            actual.logprobs, expected[row, actual.token_ids], rtol=1e-5, atol=1e-5
        )


def test_reports_are_plain_numbers() -> None:
    (actual,) = token_logprobs(np.zeros((1, 4), dtype=np.float32), ints(2), ints(1))
    assert (list(actual.token_ids), actual.rank) == ([2, 0], 3)
    assert list(actual.logprobs) == pytest.approx([-np.log(4)] * 2)
    assert {type(value) for value in (*actual.token_ids, *actual.logprobs)} == {int, float}


@given(seed=st.integers(0, 1000))
def test_the_greedy_token_has_rank_one(seed: int) -> None:
    """Also where log-probabilities round to equal numbers while the logits differ."""
    logits = np.random.default_rng(seed).normal(0, 1e-7, (1, 50)).astype(np.float32)
    greedy = logits.argmax(axis=1)
    (actual,) = token_logprobs(logits, greedy, ints(3))
    assert actual.rank == 1
    assert actual.token_ids[1] == greedy[0]


def test_a_row_is_reported_as_it_is_alone() -> None:
    logits = np.random.default_rng(2).normal(0, 3, (7, 50257)).astype(np.float32)
    tokens, counts = ints(*range(0, 7000, 1000)), ints(0, 1, 2, 3, 4, 5, 20)
    together = token_logprobs(logits, tokens, counts)
    for row in range(7):
        assert (
            token_logprobs(
                logits[row : row + 1].copy(), tokens[row : row + 1], counts[row : row + 1]
            )
            == together[row : row + 1]
        )


def test_a_row_that_is_not_finite_disturbs_no_other() -> None:
    logits = np.random.default_rng(3).normal(0, 3, (4, 20)).astype(np.float32)
    expected = token_logprobs(logits, ints(1, 2, 3, 4), ints(2, 2, 2, 2))
    logits[1], logits[2, 5] = np.nan, np.inf
    actual = token_logprobs(logits, ints(1, 2, 3, 4), ints(2, 2, 2, 2))
    assert (actual[0], actual[3]) == (expected[0], expected[3])
    assert np.isnan(actual[1].logprobs).all()
    assert np.isnan(actual[2].logprobs[0])
