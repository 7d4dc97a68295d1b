"""The activation functions that GPT-2 checkpoints name in `activation_function`.

GPT-2 uses `gelu_new`, the tanh approximation of GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415).
The other names and formulas are those of transformers' ACT2FN table. Each is a pure elementwise
function, in the type of its argument. Operations in place save memory traffic.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from jaxtyping import Float

Values = Float[np.ndarray, "..."]

_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)


def gelu_new(values: Values) -> Values:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""
    result = _SQRT_2_OVER_PI * (values + 0.044715 * values * values * values)
    np.tanh(result, out=result)
    result += 1.0
    result *= values
    result *= 0.5
    return result


def gelu(values: Values) -> Values:
    """x Phi(x) = 0.5 x (1 + erf(x / sqrt(2)))."""
    result = erf(values * np.float32(math.sqrt(0.5)))
    result += np.float32(1.0)
    result *= values
    result *= np.float32(0.5)
    return result


def erf(values: Values) -> Values:
    """Return the error function to 5e-7 (Abramowitz and Stegun 1964, formula 7.1.26)."""
    # erf(9) rounds to 1 already, and exp(-81) is still a normal number
    magnitude = np.minimum(np.abs(values), np.float32(9.0))
    t = np.float32(1.0) / (np.float32(1.0) + np.float32(0.3275911) * magnitude)
    polynomial = np.full_like(t, 1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        polynomial *= t
        polynomial += np.float32(coefficient)
    polynomial *= t
    polynomial *= np.exp(-magnitude * magnitude)
    return np.copysign(np.float32(1.0) - polynomial, values)


def sigmoid(values: Values) -> Values:
    """1 / (1 + exp(-x)), by tanh, which does not overflow."""
    result = np.tanh(values * np.float32(0.5))
    result += np.float32(1.0)
    result *= np.float32(0.5)
    return result


def silu(values: Values) -> Values:
    """x sigmoid(x), also called swish."""
    return values * sigmoid(values)


def quick_gelu(values: Values) -> Values:
    """x sigmoid(1.702 x)."""
    return values * sigmoid(values * np.float32(1.702))


def mish(values: Values) -> Values:
    """x tanh(log(1 + exp(x))) (Misra 2019, arXiv:1908.08681)."""
    return values * np.tanh(np.logaddexp(values, np.float32(0.0)))


def relu(values: Values) -> Values:
    """max(x, 0)."""
    return np.maximum(values, np.float32(0.0))


def relu2(values: Values) -> Values:
    """max(x, 0) squared."""
    return np.square(relu(values))


def relu6(values: Values) -> Values:
    """min(max(x, 0), 6)."""
    return np.clip(values, np.float32(0.0), np.float32(6.0))


def leaky_relu(values: Values) -> Values:
    """max(x, 0.01 x)."""
    return np.maximum(values, values * np.float32(0.01))


def tanh(values: Values) -> Values:
    """tanh(x)."""
    return np.tanh(values)


def linear(values: Values) -> Values:
    """x."""
    return values


Activation = Callable[[Values], Values]

ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_accurate"), gelu_new),
        **dict.fromkeys(("gelu", "gelu_python"), gelu),
        **dict.fromkeys(("silu", "swish"), silu),
        "quick_gelu": quick_gelu,
        "relu": relu,
        "relu2": relu2,
        "relu6": relu6,
        "leaky_relu": leaky_relu,
        "sigmoid": sigmoid,
        "tanh": tanh,
        "mish": mish,
        "linear": linear,
    }
)
