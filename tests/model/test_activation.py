"""Every activation function against its formula in float64."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from nanovllm.model.activation import ACTIVATIONS, erf
from tests.support.float32_only import float32_only

POINTS = np.array(
    [
        *np.linspace(-12, 12, 4801),
        *np.linspace(-120, 120, 481),
        1e4,
        -1e4,
        0.0,
        -0.0,
        1e-30,
        -1e-30,
        1e-7,
        -1e-7,
        3e3,
        -3e3,
    ],
    dtype=np.float32,
)


def phi(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2.0))


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x > -700 else 0.0


def gelu(x: float) -> float:
    return x * phi(x)


def gelu_new(x: float) -> float:
    return 0.5 * x * (1.0 + math.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


FORMULAS: dict[str, Callable[[float], float]] = {
    "gelu": gelu, "gelu_python": gelu, "gelu_new": gelu_new, "gelu_fast": gelu_new,
    "gelu_pytorch_tanh": gelu_new, "gelu_accurate": gelu_new,
    "quick_gelu": lambda x: x * sigmoid(1.702 * x), "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2, "relu6": lambda x: min(max(x, 0.0), 6.0),
    "leaky_relu": lambda x: x if x > 0 else 0.01 * x, "silu": lambda x: x * sigmoid(x),
    "swish": lambda x: x * sigmoid(x), "sigmoid": sigmoid, "tanh": math.tanh,
    "mish": lambda x: x * math.tanh(softplus(x)), "linear": lambda x: x,
}  # fmt: skip


def test_every_activation_has_its_formula_here() -> None:
    assert FORMULAS.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_its_formula(name: str) -> None:
    before = POINTS.copy()
    actual = ACTIVATIONS[name](POINTS)
    expected = np.array([FORMULAS[name](x) for x in POINTS.tolist()], dtype=np.float64)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(POINTS, before, err_msg="it changed its argument")


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_computes_in_float32_on_arrays_of_any_shape(name: str) -> None:
    for shape in ((), (0,), (3, 0), (2, 3, 4)):
        values = np.ones(shape, dtype=np.float32)
        guarded = ACTIVATIONS[name](float32_only(values))
        assert guarded.shape == shape
        assert guarded.dtype == np.float32


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_hides_no_nan_and_touches_no_neighbour(name: str) -> None:
    values = POINTS[:70].copy()
    expected = ACTIVATIONS[name](values).copy()
    values[35] = np.nan
    with np.errstate(invalid="ignore"):
        actual = ACTIVATIONS[name](values)
    assert np.isnan(actual[35])
    np.testing.assert_array_equal(np.delete(actual, 35), np.delete(expected, 35))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_slope_is_the_central_difference(name: str) -> None:
    x = np.linspace(-4.0, 4.0, 41) + 0.013
    step = 1e-6
    slope = (ACTIVATIONS[name](x + step) - ACTIVATIONS[name](x - step)) / (2 * step)
    # erf is accurate to 5e-7; its slope here is exact
    tolerance = 1e-6 if name in {"gelu", "gelu_python"} else 1e-8
    np.testing.assert_allclose(ACTIVATIONS[name].slope(x), slope, atol=tolerance, rtol=0)


def test_the_two_gelus_differ() -> None:
    """Only the name tells them apart; a checkpoint of one gives wrong results with the other."""
    apart = np.abs(ACTIVATIONS["gelu"](POINTS) - ACTIVATIONS["gelu_new"](POINTS))
    assert 1e-4 < apart.max() < 1e-3


def test_erf_is_as_exact_as_it_says() -> None:
    expected = np.array([math.erf(x) for x in POINTS.tolist()], dtype=np.float64)
    np.testing.assert_allclose(erf(POINTS), expected, rtol=0, atol=5e-7)
    np.testing.assert_array_equal(erf(-POINTS), -erf(POINTS))
    with np.errstate(
        under="raise"
    ):  # numbers below the normal ones are many times slower on some processors
        erf(POINTS[np.abs(POINTS) > 0.1])
