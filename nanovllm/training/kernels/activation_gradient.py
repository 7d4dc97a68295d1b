"""Derivatives of activation functions on vectors, twins of those in
nanovllm/training/network/activation_gradients.py.

Inputs that are not finite, and those whose square overflows, give what they give in NumPy: the
limit of the derivative, or NaN.
"""

import math
from collections.abc import Callable, Mapping

from nanovllm.model.kernels.forward.activation import sigmoid as sigmoid_of
from nanovllm.model.kernels.forward.activation import tanh as tanh_of
from nanovllm.model.kernels.simd.vector import Value, Vectors

_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)


def gelu_new(v: Vectors, x: Value) -> Value:
    """s + x s (1 - s) 2u' with s = sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)."""
    scale = -2.0 * _SQRT_2_OVER_PI
    square = v.multiply(x, x)
    one = v.constant(1.0)
    minus_2u = v.multiply(x, v.fma(square, v.constant(scale * 0.044715), v.constant(scale)))
    minus_slope = v.fma(square, v.constant(3.0 * scale * 0.044715), v.constant(scale))
    s = v.divide(one, v.add(one, v.exp(minus_2u)))  # as in the forward activation
    return v.fma(v.multiply(x, minus_slope), v.multiply(s, v.subtract(s, one)), s)


def gelu(v: Vectors, x: Value) -> Value:
    """Phi(x) + x phi(x); Phi by the formula of the forward activation."""
    scaled = v.multiply(x, v.constant(math.sqrt(0.5)))
    negative = v.multiply(scaled, v.constant(-1.0))
    magnitude = v.maximum(scaled, negative)
    t = v.divide(v.constant(1.0), v.fma(magnitude, v.constant(0.3275911), v.constant(1.0)))
    polynomial = v.constant(1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        polynomial = v.fma(polynomial, t, v.constant(coefficient))
    exp = v.exp(v.multiply(scaled, negative))
    tail = v.multiply(v.multiply(v.multiply(polynomial, t), exp), v.constant(0.5))
    is_positive = v.builder.fcmp_ordered(">", scaled, v.constant(0.0))
    distribution = v.where(is_positive, v.subtract(v.constant(1.0), tail), tail)
    density = v.multiply(exp, v.constant(1.0 / math.sqrt(2.0 * math.pi)))
    return v.fma(x, density, distribution)


def sigmoid(v: Vectors, x: Value) -> Value:
    """s (1 - s), s = sigmoid(x)."""
    s = sigmoid_of(v, x)
    return v.multiply(s, v.subtract(v.constant(1.0), s))


def silu(v: Vectors, x: Value) -> Value:
    """s (1 + x (1 - s)), s = sigmoid(x)."""
    s = sigmoid_of(v, x)
    one = v.constant(1.0)
    return v.multiply(s, v.fma(x, v.subtract(one, s), one))


def quick_gelu(v: Vectors, x: Value) -> Value:
    """The derivative of silu at 1.702 x."""
    return silu(v, v.multiply(x, v.constant(1.702)))


def mish(v: Vectors, x: Value) -> Value:
    """t + x (1 - t^2) sigmoid(x), t = tanh(log(1 + exp(x))) = w / (w + 2), w = e^2 + 2e.

    e = exp(min(x, 40)): above 40, t is 1 in float32, and the square of e would overflow.
    """
    e = v.exp(v.minimum(v.constant(40.0), x))
    one = v.constant(1.0)
    w = v.multiply(e, v.add(e, v.constant(2.0)))
    t = v.divide(w, v.add(w, v.constant(2.0)))
    return v.fma(v.multiply(x, v.subtract(one, v.multiply(t, t))), sigmoid_of(v, x), t)


def relu(v: Vectors, x: Value) -> Value:
    """1 where x > 0, else 0."""
    return _where_positive(v, x, v.constant(1.0), v.constant(0.0))


def relu2(v: Vectors, x: Value) -> Value:
    """2 max(x, 0)."""
    return v.multiply(v.constant(2.0), v.maximum(v.constant(0.0), x))


def relu6(v: Vectors, x: Value) -> Value:
    """1 where 0 < x < 6, else 0."""
    is_below = v.builder.fcmp_ordered("<", x, v.constant(6.0))
    return v.where(is_below, relu(v, x), v.constant(0.0))


def leaky_relu(v: Vectors, x: Value) -> Value:
    """1 where x > 0, else 0.01."""
    return _where_positive(v, x, v.constant(1.0), v.constant(0.01))


def tanh(v: Vectors, x: Value) -> Value:
    """1 - tanh(x)^2."""
    t = tanh_of(v, x)
    return v.subtract(v.constant(1.0), v.multiply(t, t))


def _where_positive(v: Vectors, x: Value, a: Value, b: Value) -> Value:
    return v.where(v.builder.fcmp_ordered(">", x, v.constant(0.0)), a, b)


ACTIVATION_GRADIENTS: Mapping[str, Callable[[Vectors, Value], Value]] = {
    function.__name__: function
    for function in (
        gelu_new,
        gelu,
        quick_gelu,
        silu,
        sigmoid,
        tanh,
        mish,
        relu,
        relu2,
        relu6,
        leaky_relu,
    )
}
"""The derivative of each activation but `linear`."""
