"""Layer normalisation against float64, on rows as the residual stream of GPT-2 has them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.model.layernorm import layer_norm
from tests.support.float32_only import float32_only


def exact(hidden: np.ndarray, gain: np.ndarray, bias: np.ndarray, epsilon: float) -> np.ndarray:
    rows = hidden.astype(np.float64)
    centred = rows - rows.mean(axis=1, keepdims=True)
    normal: np.ndarray = (
        centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + epsilon) * gain + bias
    )
    return normal


def random_case(seed: int, tokens: int, d_model: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    hidden = random.normal(0, 2, (tokens, d_model)).astype(np.float32)
    return (
        hidden,
        random.normal(1, 0.3, d_model).astype(np.float32),
        random.normal(0, 0.3, d_model).astype(np.float32),
    )


@given(
    seed=st.integers(0, 1000),
    tokens=st.integers(0, 9),
    d_model=st.integers(1, 70),
    epsilon=st.sampled_from([1e-5, 1e-6, 1e-3, 1.0]),
)
def test_a_norm_is_its_formula(seed: int, tokens: int, d_model: int, epsilon: float) -> None:
    hidden, gain, bias = random_case(seed, tokens, d_model)
    before = hidden.copy()
    found = layer_norm(hidden, gain, bias, epsilon)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, exact(hidden, gain, bias, epsilon), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(hidden, before)


def test_outliers_cost_no_more_than_the_last_digits() -> None:
    hidden, gain, bias = random_case(1, 50, 768)
    hidden[:, 138], hidden[:, 378], hidden[:, 447] = 1100.0, -700.0, -400.0
    np.testing.assert_allclose(
        layer_norm(hidden, gain, bias, 1e-5), exact(hidden, gain, bias, 1e-5), rtol=1e-5, atol=2e-6
    )


def test_a_mean_far_from_zero_costs_only_what_float32_has_lost_before() -> None:
    hidden, gain, bias = random_case(2, 50, 768)
    hidden += np.float32(1000.0)
    np.testing.assert_allclose(
        layer_norm(hidden, gain, bias, 1e-5), exact(hidden, gain, bias, 1e-5), rtol=1e-4, atol=1e-4
    )


def test_a_row_without_variance_is_the_bias() -> None:
    _, gain, bias = random_case(3, 1, 64)
    for value in (0.0, 1.5, -64.0):
        np.testing.assert_array_equal(
            layer_norm(np.full((2, 64), value, dtype=np.float32), gain, bias, 1e-5),
            np.stack([bias, bias]),
        )


@pytest.mark.parametrize("d_model", [1, 7, 64, 129, 768])
def test_the_bits_of_a_row_do_not_depend_on_the_rows_beside_it(d_model: int) -> None:
    hidden, gain, bias = random_case(4, 33, d_model)
    together = layer_norm(hidden, gain, bias, 1e-5)
    for row in range(33):
        np.testing.assert_array_equal(
            layer_norm(hidden[row : row + 1], gain, bias, 1e-5)[0], together[row]
        )
    np.testing.assert_array_equal(layer_norm(hidden[::-1].copy(), gain, bias, 1e-5), together[::-1])
    hidden[5] = np.nan
    np.testing.assert_array_equal(
        np.delete(layer_norm(hidden, gain, bias, 1e-5), 5, axis=0), np.delete(together, 5, axis=0)
    )


def test_a_norm_computes_in_float32() -> None:
    hidden, gain, bias = float32_only(random_case(5, 3, 16))
    assert layer_norm(hidden, gain, bias, 1e-5).dtype == np.float32
