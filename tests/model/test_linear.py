"""Products: both ways agree, and one gives a row the same bits whatever is beside it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.model.linear import Product, linear, product, product_by_rows
from nanovllm.model.weights import Linear
from tests.support.float32_only import float32_only

PRODUCTS = pytest.mark.parametrize("take", [product, product_by_rows])
SIZES = st.integers(1, 70)


def random_matrices(
    seed: int, rows: int, d_in: int, d_out: int, *, transposed: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    left = random.normal(0, 1, (rows, d_in)).astype(np.float32)
    right = random.normal(0, 1, (d_out, d_in) if transposed else (d_in, d_out)).astype(np.float32)
    return left, right.T if transposed else right


@PRODUCTS
def test_weights_are_stored_in_by_out(take: Product) -> None:
    layer = Linear(
        np.array([[1, 2, 3], [10, 20, 30]], dtype=np.float32),
        np.array([100, 200, 300], dtype=np.float32),
    )
    hidden = np.array([[1, 1], [2, 0], [0, 0]], dtype=np.float32)
    np.testing.assert_array_equal(
        linear(hidden, layer, take), [[111, 222, 333], [102, 204, 306], [100, 200, 300]]
    )


@PRODUCTS
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(0, 40),
    d_in=SIZES,
    d_out=SIZES,
    transposed=st.booleans(),
)
def test_a_product_is_that_of_float64(
    take: Product, seed: int, rows: int, d_in: int, d_out: int, transposed: bool
) -> None:
    left, right = random_matrices(seed, rows, d_in, d_out, transposed=transposed)
    found = take(left, right)
    assert found.dtype == np.float32
    np.testing.assert_allclose(
        found, left.astype(np.float64) @ right.astype(np.float64), rtol=1e-5, atol=1e-5
    )


@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 40),
    d_in=SIZES,
    d_out=SIZES,
    transposed=st.booleans(),
    data=st.data(),
)
def test_row_by_row_the_bits_depend_on_the_row_alone(
    seed: int, rows: int, d_in: int, d_out: int, transposed: bool, data: st.DataObject
) -> None:
    left, right = random_matrices(seed, rows, d_in, d_out, transposed=transposed)
    together = product_by_rows(left, right)
    chosen = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=8))
    np.testing.assert_array_equal(product_by_rows(left[chosen], right), together[chosen])
    wide = np.zeros(
        (rows, 3 * d_in + 1), dtype=np.float32
    )  # rows that do not lie one after the other, at odd addresses
    wide[:, 1 : 1 + d_in] = left
    np.testing.assert_array_equal(product_by_rows(wide[:, 1 : 1 + d_in], right), together)


@pytest.mark.parametrize(("d_in", "d_out"), [(768, 2304), (256, 4096), (1024, 257)])
@pytest.mark.parametrize("transposed", [False, True])
def test_row_by_row_the_bits_are_the_same_at_real_sizes(
    d_in: int, d_out: int, transposed: bool
) -> None:
    left, right = random_matrices(7, 19, d_in, d_out, transposed=transposed)
    together = product_by_rows(left, right)
    for rows in (slice(0, 1), slice(3, 10), slice(18, None, -1)):
        np.testing.assert_array_equal(
            product_by_rows(np.ascontiguousarray(left[rows]), right), together[rows]
        )
    np.testing.assert_allclose(together, product(left, right), rtol=1e-4, atol=1e-4)


@PRODUCTS
def test_a_row_that_is_not_a_number_stays_alone(take: Product) -> None:
    left, right = random_matrices(8, 40, 33, 21)
    expected = take(left, right)
    left[[0, 17, 39]] = np.nan
    found = take(left, right)
    assert np.isnan(found[[0, 17, 39]]).all()
    others = np.delete(np.arange(40), [0, 17, 39])
    np.testing.assert_allclose(found[others], expected[others], rtol=1e-5, atol=1e-5)


@PRODUCTS
def test_a_linear_layer_computes_in_float32_and_leaves_its_input_alone(take: Product) -> None:
    left, right = random_matrices(9, 5, 16, 8)
    before = left.copy()
    found = linear(
        float32_only(left), float32_only(Linear(right, np.ones(8, dtype=np.float32))), take
    )
    assert found.dtype == np.float32
    np.testing.assert_array_equal(left, before)
    np.testing.assert_allclose(
        np.asarray(found), left.astype(np.float64) @ right + 1, rtol=1e-5, atol=1e-5
    )
