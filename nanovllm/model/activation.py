"""The activation functions that GPT-2 checkpoints name in `activation_function`, and their slopes.

GPT-2 uses `gelu_new`, the tanh approximation of GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415).
The other names and formulas are those of transformers' ACT2FN table. Each is a pure elementwise
function, in the type of its argument; so is its slope, the derivative, which training needs.
Operations in place save memory traffic.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from jaxtyping import Float

Values = Float[np.ndarray, "..."]

_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)


def gelu_new(x: Values) -> Values:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""
    result = _inner_gelu_new(x)
    np.tanh(result, out=result)
    result += 1.0
    result *= x
    result *= 0.5
    return result


def gelu_new_slope(x: Values) -> Values:
    """0.5 (1 + t) + 0.5 x (1 - t^2) u', t = tanh(u), u = sqrt(2/pi) (x + 0.044715 x^3)."""
    t = np.tanh(_inner_gelu_new(x))
    inner_slope = _SQRT_2_OVER_PI * (1.0 + 3.0 * 0.044715 * x * x)
    return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner_slope


def _inner_gelu_new(x: Values) -> Values:
    return _SQRT_2_OVER_PI * (x + 0.044715 * x * x * x)


def gelu(x: Values) -> Values:
    """x Phi(x) = 0.5 x (1 + erf(x / sqrt(2)))."""
    result = erf(x * np.float32(math.sqrt(0.5)))
    result += np.float32(1.0)
    result *= x
    result *= np.float32(0.5)
    return result


def gelu_slope(x: Values) -> Values:
    """Phi(x) + x phi(x), the distribution function and the density of a normal variable."""
    density = np.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)
    return 0.5 * (1.0 + erf(x * math.sqrt(0.5))) + x * density


def erf(x: Values) -> Values:
    """Return the error function to 5e-7 (Abramowitz and Stegun 1964, formula 7.1.26)."""
    # erf(9) rounds to 1 already, and exp(-81) is still a normal number
    magnitude = np.minimum(np.abs(x), np.float32(9.0))
    t = np.float32(1.0) / (np.float32(1.0) + np.float32(0.3275911) * magnitude)
    polynomial = np.full_like(t, 1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        polynomial *= t
        polynomial += np.float32(coefficient)
    polynomial *= t
    polynomial *= np.exp(-magnitude * magnitude)
    return np.copysign(np.float32(1.0) - polynomial, x)


def sigmoid(x: Values) -> Values:
    """1 / (1 + exp(-x)), by tanh, which does not overflow."""
    result = np.tanh(x * np.float32(0.5))
    result += np.float32(1.0)
    result *= np.float32(0.5)
    return result


def sigmoid_slope(x: Values) -> Values:
    """s (1 - s), s = sigmoid(x)."""
    s = sigmoid(x)
    return s * (1.0 - s)


def silu(x: Values) -> Values:
    """x sigmoid(x), also called swish."""
    return x * sigmoid(x)


def silu_slope(x: Values) -> Values:
    """s (1 + x (1 - s)), s = sigmoid(x)."""
    s = sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


def quick_gelu(x: Values) -> Values:
    """x sigmoid(1.702 x)."""
    return x * sigmoid(x * np.float32(1.702))


def quick_gelu_slope(x: Values) -> Values:
    """s (1 + 1.702 x (1 - s)), s = sigmoid(1.702 x)."""
    s = sigmoid(1.702 * x)
    return s * (1.0 + 1.702 * x * (1.0 - s))


def mish(x: Values) -> Values:
    """x tanh(log(1 + exp(x))) (Misra 2019, arXiv:1908.08681)."""
    return x * np.tanh(np.logaddexp(x, np.float32(0.0)))


def mish_slope(x: Values) -> Values:
    """t + x (1 - t^2) sigmoid(x), t = tanh(log(1 + exp(x)))."""
    t = np.tanh(np.logaddexp(x, x.dtype.type(0.0)))
    return t + x * (1.0 - t * t) * sigmoid(x)


def relu(x: Values) -> Values:
    """max(x, 0)."""
    return np.maximum(x, np.float32(0.0))


def relu_slope(x: Values) -> Values:
    """1 where x > 0, else 0."""
    return (x > 0.0).astype(x.dtype)


def relu2(x: Values) -> Values:
    """max(x, 0) squared."""
    return np.square(relu(x))


def relu2_slope(x: Values) -> Values:
    """2 max(x, 0)."""
    return 2.0 * np.maximum(x, 0.0)


def relu6(x: Values) -> Values:
    """min(max(x, 0), 6)."""
    return np.clip(x, np.float32(0.0), np.float32(6.0))


def relu6_slope(x: Values) -> Values:
    """1 where 0 < x < 6, else 0."""
    return ((x > 0.0) & (x < 6.0)).astype(x.dtype)


def leaky_relu(x: Values) -> Values:
    """max(x, 0.01 x)."""
    return np.maximum(x, x * np.float32(0.01))


def leaky_relu_slope(x: Values) -> Values:
    """1 where x > 0, else 0.01."""
    return np.where(x > 0.0, 1.0, 0.01).astype(x.dtype)


def tanh(x: Values) -> Values:
    """tanh(x)."""
    return np.tanh(x)


def tanh_slope(x: Values) -> Values:
    """1 - tanh(x)^2."""
    return 1.0 - np.square(np.tanh(x))


def linear(x: Values) -> Values:
    """x."""
    return x


def linear_slope(x: Values) -> Values:
    """1."""
    return np.ones_like(x)


@dataclass(frozen=True, slots=True)
class Activation:
    """An activation function, called as activation(x), and its derivative `slope`."""

    function: Callable[[Values], Values]
    slope: Callable[[Values], Values]

    @property
    def name(self) -> str:
        """The name of the function, one for all names that checkpoints give it."""
        return self.function.__name__

    def __call__(self, x: Values) -> Values:
        """Return f(x)."""
        return self.function(x)


_GELU_NEW, _GELU = Activation(gelu_new, gelu_new_slope), Activation(gelu, gelu_slope)
_SILU = Activation(silu, silu_slope)

ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_accurate"), _GELU_NEW),
        **dict.fromkeys(("gelu", "gelu_python"), _GELU),
        **dict.fromkeys(("silu", "swish"), _SILU),
        "quick_gelu": Activation(quick_gelu, quick_gelu_slope),
        "relu": Activation(relu, relu_slope),
        "relu2": Activation(relu2, relu2_slope),
        "relu6": Activation(relu6, relu6_slope),
        "leaky_relu": Activation(leaky_relu, leaky_relu_slope),
        "sigmoid": Activation(sigmoid, sigmoid_slope),
        "tanh": Activation(tanh, tanh_slope),
        "mish": Activation(mish, mish_slope),
        "linear": Activation(linear, linear_slope),
    }
)
GATES = ("silu", "gelu_new", "gelu")
"""Activations that the gate of a feed-forward block may have."""
