"""The NumPy twin of the tile unit against exact arithmetic."""

from fractions import Fraction

import numpy as np
import pytest

from nanovllm.model.kernels.build.amx import random_tiles
from nanovllm.model.kernels.build.tile_twin import configuration, multiply_add
from tests.support.arrays import widened


def test_a_configuration_says_the_rows_and_bytes_of_each_register() -> None:
    content = np.frombuffer(configuration(7), dtype=np.uint8)
    assert content.size == 64
    assert content[:16].tolist() == [1] + [0] * 15
    assert content[16:32].view(np.uint16).tolist() == [64] * 8
    assert content[48:56].tolist() == [7] * 5 + [16] * 3
    assert not content[32:48].any()
    assert not content[56:].any()


def test_products_of_bytes_are_exact() -> None:
    inputs, weights, accumulators = random_tiles("int8", 5, np.random.default_rng(1))
    result = multiply_add("int8", accumulators, inputs, weights).view(np.int32)
    for row, column in ((0, 0), (4, 15), (2, 7)):
        a = inputs[row].view(np.uint8).tolist()
        b = np.ascontiguousarray(weights[:, column]).view(np.int8).tolist()
        total = int(accumulators.view(np.int32)[row, column]) + sum(map(int.__mul__, a, b))
        assert (total - int(result[row, column])) % (1 << 32) == 0


def rounded(exact: Fraction) -> Fraction:
    """Return a number rounded to 24 bits, ties to even; 0 below the smallest normal float32."""
    if exact == 0:
        return exact
    exponent = abs(exact.numerator).bit_length() - exact.denominator.bit_length() - 25
    while abs(exact) / Fraction(2) ** exponent >= 1 << 24:
        exponent += 1
    result = round(exact / Fraction(2) ** exponent) * Fraction(2) ** exponent
    return result if abs(result) >= Fraction(2) ** -126 else Fraction(0)


def flushed(x: float) -> Fraction:
    return Fraction(x) if abs(x) >= 2.0**-126 else Fraction(0)


@pytest.mark.parametrize("seed", range(4))
def test_products_of_bfloat16_are_rounded_in_the_documented_order(seed: int) -> None:
    inputs, weights, accumulators = random_tiles("bfloat16", 3, np.random.default_rng(seed))
    result = multiply_add("bfloat16", accumulators, inputs, weights).view(np.float32)
    for row in range(3):
        a = widened(inputs[row].view(np.uint16)).tolist()
        for column in range(16):
            b = widened(np.ascontiguousarray(weights[:, column]).view(np.uint16)).tolist()
            chains = [Fraction(0), Fraction(0)]
            for number, (x, y) in enumerate(zip(a, b, strict=True)):
                chains[number % 2] = rounded(chains[number % 2] + flushed(x) * flushed(y))
            before = flushed(float(accumulators.view(np.float32)[row, column]))
            expected = rounded(before + rounded(chains[0] + chains[1]))
            assert Fraction(float(result[row, column])) == expected


def test_denormal_results_are_flushed() -> None:
    """The last but one would round to the smallest normal number among denormal ones."""
    smallest = 2.0**-126

    def total(start: float, *products: tuple[float, float]) -> float:
        """Return start + (the sum of products of bfloat16)."""
        pairs = np.zeros((2, 1, 2 * len(products)), dtype=np.float32)
        pairs[:, 0, ::2] = np.transpose(products)
        inputs, weights = (pairs.view(np.uint32) >> np.uint32(16)).astype(np.uint16).view(np.uint32)
        before = np.array([[start]], dtype=np.float32).view(np.uint32)
        return float(multiply_add("bfloat16", before, inputs, weights.T).view(np.float32)[0, 0])

    half = (2.0**-63, 2.0**-64)
    assert total(smallest, (2.0**-63, 2.0**-63)) == 2 * smallest
    assert total(smallest, half) == smallest, "the product is denormal before it is added"
    assert total(0.0, half, half) == 0, "so is the first one of two"
    assert total(smallest, (-(2.0**-63), 1.5 * 2.0**-63)) == 0
    assert total(0.0, (2.0**-63, 2.0**-63), (-1.5 * 2.0**-75, 2.0**-76)) == 0
    assert total(0.0, (2.0**-63, 2.0**-63), (-0.875 * 2.0**-75, 2.0**-76)) == smallest


def test_what_is_not_finite_stays() -> None:
    ones = np.full((1, 16), 0x3F803F80, dtype=np.uint32)
    for special in (np.inf, -np.inf, np.nan):
        total = np.array([[special]], dtype=np.float32).view(np.uint32)
        result = multiply_add("bfloat16", total, ones, ones.T.copy()).view(np.float32)
        np.testing.assert_array_equal(result, [[special]])
