"""Matmuls against NumPy, at every vector width and in every type of weights."""

import itertools
from typing import Any

import numpy as np
import pytest

from nanovllm.model.kernels.build.packing import (
    pack_rows,
    round_up,
    to_bfloat16,
)
from nanovllm.model.kernels.build.target import PER_WORD, KernelTarget
from nanovllm.model.kernels.step_record import (
    ACTIVATION_NAMES,
    RESIDUAL,
    ROW_QUANT_BYTES,
    ROW_QUANT_OUTLIERS,
)
from tests.support.arrays import numbers, widened
from tests.support.products import RESIDUAL_VALUE, Product, products_of
from tests.support.targets import TARGETS, name_of

pytestmark = pytest.mark.slow(35)


@pytest.fixture(scope="module")
def products(target: KernelTarget) -> dict[str, Product]:
    return products_of(target)


@pytest.fixture(scope="module", params=TARGETS, ids=name_of)
def dot_products(request: pytest.FixtureRequest) -> dict[str, Product]:
    """Linear layers of every target: targets of one width differ in their dot products."""
    return products_of(request.param)


SHAPES = [(1, 1), (24, 72), (33, 130), (800, 70)]


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 13, 64, 65, 200])
@pytest.mark.parametrize(("d_in", "d_out"), SHAPES)
def test_product_is_numpys(products: dict[str, Product], count: int, d_in: int, d_out: int) -> None:
    rows, weight, bias = numbers(count, d_in), numbers(d_in, d_out, seed=1), numbers(d_out, seed=2)
    out = products["float32"](rows, weight, bias)
    expected = rows.astype(np.float64) @ weight.astype(np.float64) + bias
    np.testing.assert_allclose(out[:, :d_out], expected, rtol=0, atol=2e-5 * np.sqrt(d_in))
    assert not out[:, d_out:].any(), "what fills a row up must stay zero"


@pytest.mark.parametrize("count", [1, 7, 65])
@pytest.mark.parametrize(("d_in", "d_out"), [*SHAPES, (3001, 5)])
def test_product_of_bfloat16_is_that_of_the_rounded_numbers(
    dot_products: dict[str, Product], count: int, d_in: int, d_out: int
) -> None:
    rows, weight, bias = (
        to_bfloat16(numbers(count, d_in)),
        to_bfloat16(numbers(d_in, d_out, seed=1)),
        numbers(d_out, seed=2),
    )
    out = dot_products["bfloat16"](rows, weight, bias)
    expected = widened(rows).astype(np.float64) @ widened(weight).astype(np.float64) + bias
    np.testing.assert_allclose(out[:, :d_out], expected, rtol=0, atol=4e-5 * np.sqrt(d_in))


@pytest.mark.parametrize("count", [1, 7, 65])
@pytest.mark.parametrize(("d_in", "d_out"), [*SHAPES, (3300, 5)])
@pytest.mark.parametrize("outliers", [0, 1, 16])
def test_product_of_bytes_is_exact_but_for_its_scales(
    dot_products: dict[str, Product], count: int, d_in: int, d_out: int, outliers: int
) -> None:
    width, random = dot_products["int8"].target.panel_width, np.random.default_rng(3)
    rows = random.integers(0, 256, (count, d_in), dtype=np.uint8)
    weight = random.integers(-127, 128, (d_in, d_out), dtype=np.int8)
    scales, row_scales, zero_points = (
        numbers(d_out, seed=4),
        numbers(count, seed=5),
        random.integers(0, 256, count, dtype=np.int32),
    )
    sides, outlier_weight = (
        numbers(count, outliers, seed=6),
        numbers(max(outliers, 1), d_out, seed=7),
    )
    row_quant = np.zeros((count, ROW_QUANT_BYTES // 4), dtype=np.float32)
    row_quant[:, 0], row_quant[:, 1] = row_scales, zero_points.view(np.float32)
    row_quant[:, ROW_QUANT_OUTLIERS : ROW_QUANT_OUTLIERS + outliers] = sides
    sums = np.zeros(round_up(d_out, width), dtype=np.int32)
    sums[:d_out] = weight.sum(axis=0, dtype=np.int32)
    bias = numbers(d_out, seed=2)
    out = dot_products["int8"](
        rows, weight, bias, row_quant=row_quant, column_sums=sums,
        column_scales=pack_rows([scales], width),
        outlier_columns=np.zeros(outliers, dtype=np.int32),
        outlier_weight=pack_rows(list(outlier_weight), width),
    )  # fmt: skip
    exact = (rows.astype(np.int64) - zero_points[:, None]) @ weight.astype(np.int64)
    expected = (
        exact * (row_scales[:, None].astype(np.float64) * scales)
        + sides.astype(np.float64) @ outlier_weight[:outliers]
        + bias
    )
    np.testing.assert_allclose(out[:, :d_out], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("count", [1, 6, 13, 14, 26, 97])
def test_rows_are_finished_as_their_layer_says(products: dict[str, Product], count: int) -> None:
    """Short panels finish a few rows at a time, long ones all rows together."""
    for d_in in (40, 1700):
        rows, weight, bias = (
            numbers(count, d_in),
            numbers(d_in, 70, seed=1) / np.float32(d_in),
            numbers(70, seed=2),
        )
        stored = products["float32"](rows, weight, bias)[:, :70]
        added = products["float32"](rows, weight, bias, epilogue=RESIDUAL)[:, :70]
        np.testing.assert_array_equal(added, RESIDUAL_VALUE + stored)
        activated = products["float32"](
            rows, weight, bias, epilogue=ACTIVATION_NAMES.index("relu")
        )[:, :70]
        np.testing.assert_array_equal(activated, np.maximum(stored, 0))
        narrow = to_bfloat16(rows), to_bfloat16(weight)
        stored = products["bfloat16"](*narrow, bias)[:, :70]
        activated = products["bfloat16"](*narrow, bias, epilogue=ACTIVATION_NAMES.index("relu"))
        if products["bfloat16"].target.bfloat16_dot:
            activated = widened(np.ascontiguousarray(activated).view(np.uint16))
            stored = widened(to_bfloat16(stored))
        np.testing.assert_array_equal(activated[:, :70], np.maximum(stored, 0))


@pytest.mark.parametrize("d_in", [500, 3700])
@pytest.mark.parametrize("kind", PER_WORD)
def test_a_rows_bits_depend_on_nothing_but_the_row(
    products: dict[str, Product], kind: str, d_in: int
) -> None:
    most = 230  # more than a block of rows
    rows, weight, bias = numbers(most, d_in), numbers(d_in, 150, seed=1), numbers(150, seed=2)
    extra: dict[str, Any] = {}
    row_quant = np.zeros((most, ROW_QUANT_BYTES // 4), dtype=np.float32)
    if kind == "bfloat16":
        rows, weight = to_bfloat16(rows), to_bfloat16(weight)
    elif kind == "int8":
        random, width = np.random.default_rng(3), products[kind].target.panel_width
        rows, weight = (
            random.integers(0, 256, rows.shape, dtype=np.uint8),
            random.integers(-127, 128, weight.shape, dtype=np.int8),
        )
        row_quant = numbers(*row_quant.shape, seed=4)
        row_quant[:, 1] = random.integers(0, 256, most, dtype=np.int32).view(np.float32)
        extra = {
            "column_scales": pack_rows([numbers(150, seed=5)], width),
            "column_sums": np.full(round_up(150, width), 9, dtype=np.int32),
            "outlier_columns": np.zeros(3, dtype=np.int32),
            "outlier_weight": pack_rows(list(numbers(3, 150, seed=6)), width),
        }  # fmt: skip

    def product(begin: int, end: int, threads: int) -> np.ndarray:
        given: dict[str, Any] = {**extra, "row_quant": row_quant[begin:end]} if extra else {}
        return products[kind](rows[begin:end], weight, bias, threads=threads, **given)

    alone = np.concatenate([product(row, row + 1, 1) for row in range(most)])
    for count, threads in itertools.product(
        (2, 6, 12, 13, 14, 25, 48, 49, 64, 97, 192, 193, most), (1, 2, 3, 7)
    ):
        np.testing.assert_array_equal(product(0, count, threads), alone[:count])
