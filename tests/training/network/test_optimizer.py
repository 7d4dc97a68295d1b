"""Clipping and parameter groups."""

import math

import numpy as np
import pytest

from nanovllm.training.network.numpy_operations import NumpyOperations
from nanovllm.training.network.optimizer import AdamW
from nanovllm.training.network.parameters import Parameters

SHAPES = {"h.0.mlp.c_fc.weight": (3, 4), "h.0.mlp.c_fc.bias": (4,)}


def test_gradients_are_clipped_to_the_norm() -> None:
    """The first update is lr * sign(gradient) for any clipping; the moments show it."""
    parameters = Parameters(SHAPES)
    optimizer = AdamW(parameters, NumpyOperations(), weight_decay=0.0, grad_clip=1.0)
    parameters.gradients[:4] = 3.0
    assert optimizer.update(1e-3) == pytest.approx(6.0)
    np.testing.assert_allclose(optimizer.first_moment[:4], 0.1 * 0.5, rtol=1e-5)
    assert not parameters.gradients.any()
    parameters.gradients[:4] = 0.25
    assert optimizer.update(1e-3) == pytest.approx(0.5)
    np.testing.assert_allclose(optimizer.first_moment[:4], 0.9 * 0.05 + 0.1 * 0.25, rtol=1e-5)


def test_only_matrices_decay() -> None:
    parameters = Parameters(SHAPES)
    for tensor in parameters.tensors.values():
        tensor.data[...] = 1.0
    AdamW(parameters, NumpyOperations(), weight_decay=0.5, grad_clip=0.0).update(0.1)
    np.testing.assert_allclose(parameters.arrays()["h.0.mlp.c_fc.weight"], 0.95)
    np.testing.assert_array_equal(parameters.arrays()["h.0.mlp.c_fc.bias"], 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(value: float) -> None:
    parameters = Parameters(SHAPES)
    parameters.values[:] = 1.0
    parameters.gradients[2] = value
    optimizer = AdamW(parameters, NumpyOperations(), weight_decay=0.5, grad_clip=1.0)
    assert not math.isfinite(optimizer.update(0.1))
    assert (parameters.values == 1.0).all()
    assert optimizer.updates == 0
