"""Layers that families share: linear layers, norms, and the output head."""

import numpy as np
from jaxtyping import Float32

from nanovllm.model.config import ModelConfig
from nanovllm.model.weights import LayerNorm, Linear, ModelWeights


def linear(
    hidden: Float32[np.ndarray, "tokens d_in"], layer: Linear
) -> Float32[np.ndarray, "tokens d_out"]:
    """Return hidden @ weight + bias."""
    out = hidden @ layer.weight
    out += layer.bias
    return out


def layer_norm(
    hidden: Float32[np.ndarray, "tokens d_model"], norm: LayerNorm, epsilon: float
) -> Float32[np.ndarray, "tokens d_model"]:
    """Return gain * (x - mean) / sqrt(variance + epsilon) + bias of each row x.

    Layer normalization is of Ba, Kiros and Hinton 2016 (arXiv:1607.06450). The variance is the mean
    of (x - mean)^2. The shorter mean(x^2) - mean^2 is the small difference of two large numbers
    where the mean is far from 0, and loses its digits in float32.
    """
    centred = hidden - hidden.mean(axis=1, keepdims=True, dtype=np.float32)
    variance = np.square(centred).mean(axis=1, keepdims=True, dtype=np.float32)
    return norm.gain * (centred / np.sqrt(variance + np.float32(epsilon))) + norm.bias


def rms_norm(
    hidden: Float32[np.ndarray, "*rows width"], gain: Float32[np.ndarray, " width"], epsilon: float
) -> Float32[np.ndarray, "*rows width"]:
    """Return gain * x / sqrt(mean(x^2) + epsilon) of each row x (arXiv:1910.07467)."""
    squares = np.square(hidden).mean(axis=-1, keepdims=True, dtype=np.float32)
    return gain * (hidden / np.sqrt(squares + np.float32(epsilon)))


def normalize(
    config: ModelConfig, hidden: Float32[np.ndarray, "tokens d_model"], norm: LayerNorm
) -> Float32[np.ndarray, "tokens d_model"]:
    """Return each row after the kind of norm that the network has."""
    if config.norm == "rms":
        return rms_norm(hidden, norm.gain, config.epsilon)
    return layer_norm(hidden, norm, config.epsilon)


@np.errstate(over="ignore", invalid="ignore")
def logits(
    weights: ModelWeights, hidden: Float32[np.ndarray, "rows d_model"]
) -> Float32[np.ndarray, "rows vocab"]:
    """Return the score of every token at rows of final hidden states."""
    return hidden @ weights.head.T
