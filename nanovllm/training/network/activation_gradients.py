"""Derivatives of the activation functions of nanovllm/model/activation.py.

Each takes the activation's input x and returns f'(x), elementwise, in the type of x.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from jaxtyping import Float

from nanovllm.model import activation
from nanovllm.model.activation import ACTIVATIONS, Activation

Values = Float[np.ndarray, "..."]

_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)


def gelu_new(x: Values) -> Values:
    """0.5 (1 + t) + 0.5 x (1 - t^2) u', t = tanh(u), u = sqrt(2/pi) (x + 0.044715 x^3)."""
    t = np.tanh(_SQRT_2_OVER_PI * (x + 0.044715 * x * x * x))
    slope = _SQRT_2_OVER_PI * (1.0 + 3.0 * 0.044715 * x * x)
    return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope


def gelu(x: Values) -> Values:
    """Phi(x) + x phi(x), the distribution function and the density of a normal variable."""
    density = np.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)
    return 0.5 * (1.0 + activation.erf(x * math.sqrt(0.5))) + x * density


def sigmoid(x: Values) -> Values:
    """s (1 - s), s = sigmoid(x)."""
    s = activation.sigmoid(x)
    return s * (1.0 - s)


def silu(x: Values) -> Values:
    """s (1 + x (1 - s)), s = sigmoid(x)."""
    s = activation.sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


def quick_gelu(x: Values) -> Values:
    """s (1 + 1.702 x (1 - s)), s = sigmoid(1.702 x)."""
    s = activation.sigmoid(1.702 * x)
    return s * (1.0 + 1.702 * x * (1.0 - s))


def mish(x: Values) -> Values:
    """t + x (1 - t^2) sigmoid(x), t = tanh(log(1 + exp(x)))."""
    t = np.tanh(np.logaddexp(x, x.dtype.type(0.0)))
    return t + x * (1.0 - t * t) * activation.sigmoid(x)


def relu(x: Values) -> Values:
    """1 where x > 0, else 0."""
    return (x > 0.0).astype(x.dtype)


def relu2(x: Values) -> Values:
    """2 max(x, 0)."""
    return 2.0 * np.maximum(x, 0.0)


def relu6(x: Values) -> Values:
    """1 where 0 < x < 6, else 0."""
    return ((x > 0.0) & (x < 6.0)).astype(x.dtype)


def leaky_relu(x: Values) -> Values:
    """1 where x > 0, else 0.01."""
    return np.where(x > 0.0, 1.0, 0.01).astype(x.dtype)


def tanh(x: Values) -> Values:
    """1 - tanh(x)^2."""
    return 1.0 - np.square(np.tanh(x))


def linear(x: Values) -> Values:
    """1."""
    return np.ones_like(x)


_OF_FUNCTION: Mapping[Activation, Activation] = {
    activation.gelu_new: gelu_new,
    activation.gelu: gelu,
    activation.sigmoid: sigmoid,
    activation.silu: silu,
    activation.quick_gelu: quick_gelu,
    activation.mish: mish,
    activation.relu: relu,
    activation.relu2: relu2,
    activation.relu6: relu6,
    activation.leaky_relu: leaky_relu,
    activation.tanh: tanh,
    activation.linear: linear,
}

ACTIVATION_GRADIENTS: Mapping[str, Activation] = MappingProxyType(
    {name: _OF_FUNCTION[function] for name, function in ACTIVATIONS.items()}
)
"""The derivative of each activation by the name that checkpoints use."""
