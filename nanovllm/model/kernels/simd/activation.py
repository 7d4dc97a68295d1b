"""Activation functions and their slopes on vectors, twins of those in nanovllm/model/activation.py.

Each function returns (f(x), f'(x)). What the two share is computed once, and where only one is used
LLVM removes the other.

tanh and the logistic function use one exp each: tanh(x) = 1 - 2 / (exp(2x) + 1). That is exact at
both ends, because exp overflows long after the quotient is 0 or 1. NaN and infinities give what
they give in NumPy. The slope of an input that is infinite, or whose square overflows, is as in
NumPy the limit or NaN.
"""

import math
from collections.abc import Callable, Mapping

from nanovllm.model.kernels.simd.value import Value
from nanovllm.model.kernels.simd.vector import Vectors

Pair = tuple[Value, Value]
"""f(x) and f'(x)."""


def tanh(v: Vectors, x: Value) -> Pair:
    """1 - 2 / (exp(2x) + 1); 1 - tanh(x)^2."""
    t = 1.0 - 2.0 / (v.exp(x + x) + 1.0)
    return t, 1.0 - t * t


def sigmoid(v: Vectors, x: Value) -> Pair:
    """s = 1 / (1 + exp(-x)); s (1 - s)."""
    s = 1.0 / (1.0 + v.exp(x * -1.0))
    return s, s * (1.0 - s)


def gelu_new(v: Vectors, x: Value) -> Pair:
    """0.5 x (1 + tanh(u)) = x s; s + x s (1 - s) 2u'.

    s = sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3).
    """
    scale = -2.0 * math.sqrt(2.0 / math.pi)
    square = x * x
    minus_2u = x * v.fma(square, scale * 0.044715, scale)
    minus_slope = v.fma(square, 3.0 * scale * 0.044715, scale)
    divisor = 1.0 + v.exp(minus_2u)
    s = 1.0 / divisor
    return x / divisor, v.fma(x * minus_slope, s * (s - 1.0), s)


def gelu(v: Vectors, x: Value) -> Pair:
    """0.5 x (1 + erf(x / sqrt(2))), erf by Abramowitz and Stegun 7.1.26; Phi(x) + x phi(x)."""
    scaled = x * math.sqrt(0.5)
    negative = scaled * -1.0
    magnitude = v.maximum(scaled, negative)
    t = 1.0 / v.fma(magnitude, 0.3275911, 1.0)
    polynomial = v.constant(1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        polynomial = v.fma(polynomial, t, coefficient)
    exp = v.exp(scaled * negative)
    tail = polynomial * t * exp
    is_positive = scaled > 0.0
    erf_of_magnitude = 1.0 - tail
    erf = v.where(is_positive, erf_of_magnitude, erf_of_magnitude * -1.0)
    distribution = v.where(is_positive, 1.0 - tail * 0.5, tail * 0.5)
    density = exp * (1.0 / math.sqrt(2.0 * math.pi))
    return x * 0.5 * (1.0 + erf), v.fma(x, density, distribution)


def silu(v: Vectors, x: Value) -> Pair:
    """x s; s (1 + x (1 - s)), s = sigmoid(x)."""
    s, _ = sigmoid(v, x)
    return x * s, s * v.fma(x, 1.0 - s, 1.0)


def quick_gelu(v: Vectors, x: Value) -> Pair:
    """x sigmoid(1.702 x); the slope of silu at 1.702 x."""
    scaled = x * 1.702
    s, _ = sigmoid(v, scaled)
    _, slope = silu(v, scaled)
    return x * s, slope


def mish(v: Vectors, x: Value) -> Pair:
    """x t; t + x (1 - t^2) sigmoid(x), t = tanh(log(1 + exp(x))) = w / (w + 2), w = e^2 + 2e.

    e = exp(min(x, 40)): above 40, t is 1 in float32, and the square of e would overflow.
    """
    e = v.exp(v.minimum(40.0, x))
    w = e * (e + 2.0)
    t = w / (w + 2.0)
    s, _ = sigmoid(v, x)
    return x * t, v.fma(x * (1.0 - t * t), s, t)


def relu(v: Vectors, x: Value) -> Pair:
    """max(x, 0); 1 where x > 0, else 0."""
    return v.maximum(0.0, x), v.where(x > 0.0, 1.0, 0.0)


def relu2(v: Vectors, x: Value) -> Pair:
    """max(x, 0) squared; 2 max(x, 0)."""
    positive = v.maximum(0.0, x)
    return positive * positive, 2.0 * positive


def relu6(v: Vectors, x: Value) -> Pair:
    """min(max(x, 0), 6); 1 where 0 < x < 6, else 0."""
    positive, slope = relu(v, x)
    return v.minimum(6.0, positive), v.where(x < 6.0, slope, 0.0)


def leaky_relu(v: Vectors, x: Value) -> Pair:
    """max(x, x / 100); 1 where x > 0, else 0.01."""
    return v.maximum(x, x * 0.01), v.where(x > 0.0, 1.0, 0.01)


def linear(v: Vectors, x: Value) -> Pair:
    """x; 1."""
    return x, v.constant(1.0)


ACTIVATIONS: Mapping[str, Callable[[Vectors, Value], Pair]] = {
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
