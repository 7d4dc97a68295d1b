"""Every compiled operation against its NumPy twin, with the same bits for any number of threads."""

from collections.abc import Iterator

import numpy as np
import pytest

from nanovllm.training.kernels.operations import CompiledOperations
from nanovllm.training.operations import AdamWStep, NumpyOperations

NUMPY = NumpyOperations()


@pytest.fixture(scope="module")
def compiled() -> Iterator[list[CompiledOperations]]:
    """Return operations on 1, 2 and 3 threads."""
    operations = [CompiledOperations(threads) for threads in (1, 2, 3)]
    yield operations
    for each in operations:
        each.close()


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("count", [1, 5, 16, 16384, 100_003])
def test_sum_of_squares(compiled: list[CompiledOperations], count: int) -> None:
    values = random(count)
    sums = {operations.sum_of_squares(values) for operations in compiled}
    assert len(sums) == 1
    assert sums.pop() == pytest.approx(NUMPY.sum_of_squares(values), rel=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_sum_of_squares_of_nonfinite_values(
    compiled: list[CompiledOperations], value: float
) -> None:
    values = random(50_000)
    values[40_000] = value
    for operations in compiled:
        np.testing.assert_equal(operations.sum_of_squares(values), value)


@pytest.mark.parametrize("count", [1, 7, 100_003])
def test_adamw(compiled: list[CompiledOperations], count: int) -> None:
    settings = AdamWStep(3, 1e-2, 0.1, 0.9, 0.99, 1e-8, gradient_scale=0.5)
    results = []
    for operations in (NUMPY, *compiled):
        arrays = [random(count, seed=seed) for seed in range(4)]
        arrays[3] **= 2
        parameters, gradients, first, second = arrays
        operations.adamw(parameters, gradients, first, second, settings)
        results.append(arrays)
    expected, *computed = results
    for arrays in computed:
        for array, other in zip(arrays, expected, strict=True):
            np.testing.assert_allclose(array, other, rtol=2e-6, atol=1e-7)
        for array, first in zip(arrays, computed[0], strict=True):
            np.testing.assert_array_equal(array, first)


def test_arrays_of_another_type_or_order_are_refused(compiled: list[CompiledOperations]) -> None:
    with pytest.raises(TypeError, match="values is float64 in C order"):
        compiled[0].sum_of_squares(np.zeros(3))
    with pytest.raises(TypeError, match="values is float32 in another order"):
        compiled[0].sum_of_squares(random(4, 4).T)
