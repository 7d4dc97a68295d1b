"""Central differences, the reference of hand-written gradients."""

from collections.abc import Callable

import numpy as np


def numeric_gradient(
    function: Callable[[], float], array: np.ndarray, *, step: float = 1e-6
) -> np.ndarray:
    """Return (f(x + h) - f(x - h)) / 2h for each element of `array`, which `function` reads."""
    gradient = np.zeros_like(array)
    for index in np.ndindex(array.shape):
        value = array[index]
        array[index] = value + step
        above = function()
        array[index] = value - step
        below = function()
        array[index] = value
        gradient[index] = (above - below) / (2.0 * step)
    return gradient
