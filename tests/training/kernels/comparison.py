"""Random arrays, and the comparison of results with those of NumPy."""

import numpy as np


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def check_equal(results: list[list[np.ndarray]], expected: list[np.ndarray], rtol: float) -> None:
    """Compare results of all thread counts with NumPy's, and bit by bit with each other."""
    for arrays in results:
        for array, other, first in zip(arrays, expected, results[0], strict=True):
            np.testing.assert_allclose(array, other, rtol=rtol, atol=rtol * np.abs(other).max())
            np.testing.assert_array_equal(array.view(np.int32), first.view(np.int32))
