"""Activation functions on vectors, twins of those in nanovllm/model/activation.py.

tanh and the logistic function use one exp each: tanh(x) = 1 - 2 / (exp(2x) + 1). That is exact at
both ends, because exp overflows long after the quotient is 0 or 1. NaN and infinities give what
they give in NumPy.
"""

import math
from collections.abc import Callable, Mapping

from nanovllm.model.kernels.simd.vector import Value, Vectors


def tanh(v: Vectors, x: Value) -> Value:
    """1 - 2 / (exp(2x) + 1)."""
    return v.subtract(
        v.constant(1.0), v.divide(v.constant(2.0), v.add(v.exp(v.add(x, x)), v.constant(1.0)))
    )


def sigmoid(v: Vectors, x: Value) -> Value:
    """1 / (1 + exp(-x))."""
    return v.divide(v.constant(1.0), v.add(v.constant(1.0), v.exp(v.multiply(x, v.constant(-1.0)))))


def gelu_new(v: Vectors, x: Value) -> Value:
    """0.5 x (1 + tanh(u)) = x sigmoid(2u) with u = sqrt(2/pi) (x + 0.044715 x^3)."""
    scale = -2.0 * math.sqrt(2.0 / math.pi)
    minus_2u = v.multiply(
        x, v.fma(v.multiply(x, x), v.constant(scale * 0.044715), v.constant(scale))
    )
    return v.divide(x, v.add(v.constant(1.0), v.exp(minus_2u)))


def gelu(v: Vectors, x: Value) -> Value:
    """0.5 x (1 + erf(x / sqrt(2))), erf by Abramowitz and Stegun 7.1.26."""
    scaled = v.multiply(x, v.constant(math.sqrt(0.5)))
    negative = v.multiply(scaled, v.constant(-1.0))
    magnitude = v.maximum(scaled, negative)
    t = v.divide(v.constant(1.0), v.fma(magnitude, v.constant(0.3275911), v.constant(1.0)))
    polynomial = v.constant(1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        polynomial = v.fma(polynomial, t, v.constant(coefficient))
    tail = v.multiply(v.multiply(polynomial, t), v.exp(v.multiply(scaled, negative)))
    erf = v.subtract(v.constant(1.0), tail)
    positive = v.builder.fcmp_ordered(">", scaled, v.constant(0.0))
    signed = v.where(positive, erf, v.multiply(erf, v.constant(-1.0)))
    return v.multiply(v.multiply(x, v.constant(0.5)), v.add(v.constant(1.0), signed))


def quick_gelu(v: Vectors, x: Value) -> Value:
    """x sigmoid(1.702 x)."""
    return v.multiply(x, sigmoid(v, v.multiply(x, v.constant(1.702))))


def silu(v: Vectors, x: Value) -> Value:
    """x sigmoid(x)."""
    return v.multiply(x, sigmoid(v, x))


def mish(v: Vectors, x: Value) -> Value:
    """x tanh(log(1 + e)) = x (e^2 + 2e) / (e^2 + 2e + 2) with e = exp(min(x, 40)).

    Above 40 the quotient is 1 in float32, and the square of e would overflow.
    """
    e = v.exp(v.minimum(v.constant(40.0), x))
    w = v.multiply(e, v.add(e, v.constant(2.0)))
    return v.multiply(x, v.divide(w, v.add(w, v.constant(2.0))))


def relu(v: Vectors, x: Value) -> Value:
    """max(x, 0)."""
    return v.maximum(v.constant(0.0), x)


def relu2(v: Vectors, x: Value) -> Value:
    """max(x, 0) squared."""
    positive = relu(v, x)
    return v.multiply(positive, positive)


def relu6(v: Vectors, x: Value) -> Value:
    """min(max(x, 0), 6)."""
    return v.minimum(v.constant(6.0), relu(v, x))


def leaky_relu(v: Vectors, x: Value) -> Value:
    """max(x, x / 100)."""
    return v.maximum(x, v.multiply(x, v.constant(0.01)))


def linear(v: Vectors, x: Value) -> Value:
    """x."""
    return x


ACTIVATIONS: Mapping[str, Callable[[Vectors, Value], Value]] = {
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
        linear,
    )
}
