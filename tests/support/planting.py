"""Models with planted outlier channels, to test quantization to int8."""

from dataclasses import replace

import numpy as np

from nanovllm.model.config import ModelConfig
from nanovllm.model.weights import Layer, LayerNorm, Linear, ModelWeights


def plant_channels(
    config: ModelConfig, weights: ModelWeights, *, factor: float, count: int, seed: int = 0
) -> ModelWeights:
    """Scale `count` input channels of each linear layer by `factor`, and their weights by its
    inverse.

    The network computes the same function, except behind an activation function, where only relu
    keeps the factor exactly; GELU comes near to it.
    """
    random = np.random.default_rng(seed)

    def factors(channels: int) -> np.ndarray:
        chosen = np.ones(channels, dtype=np.float32)
        chosen[random.choice(channels, count, replace=False)] = factor
        return chosen

    layers = []
    for layer in weights.layers:
        qkv, out, up, down = layer.qkv, layer.out, layer.up, layer.down
        before_qkv, before_out, before_up, before_down = (
            factors(linear.weight.shape[0]) for linear in (qkv, out, up, down)
        )
        values = np.concatenate([np.ones(2 * config.d_model, dtype=np.float32), before_out])
        layers.append(
            Layer(
                attention_norm=_scaled_norm(layer.attention_norm, before_qkv),
                qkv=_scaled(qkv, before_qkv, values),
                out=_scaled(out, before_out),
                ffn_norm=_scaled_norm(layer.ffn_norm, before_up),
                up=_scaled(up, before_up, before_down),
                down=_scaled(down, before_down),
            )
        )
    return replace(weights, layers=tuple(layers))


def plant_residual(
    weights: ModelWeights, *, size: float, pairs: int, seed: int = 0
) -> ModelWeights:
    """Make a few residual channels huge from the first block on, as in the published GPT-2.

    The network computes another function. The layer norms' gains restore the other channels to
    about their size.
    """
    d_model = weights.position_embedding.shape[1]
    channels = np.random.default_rng(seed).choice(d_model, 2 * pairs, replace=False)
    sizes = np.array([size, -size] * pairs, dtype=np.float32)
    stream = 16.0  # about the variance of the stream itself
    gains = np.full(
        d_model, np.sqrt(1 + np.square(sizes).sum() / d_model / stream), dtype=np.float32
    )
    gains[channels] = 1.0
    layers = []
    for index, layer in enumerate(weights.layers):
        if index == 0:
            bias = layer.down.bias.copy()
            bias[channels] += sizes
            layers.append(replace(layer, down=replace(layer.down, bias=bias)))
        else:
            norms = _scaled_norm(layer.attention_norm, gains), _scaled_norm(layer.ffn_norm, gains)
            layers.append(replace(layer, attention_norm=norms[0], ffn_norm=norms[1]))
    return replace(
        weights, layers=tuple(layers), final_norm=_scaled_norm(weights.final_norm, gains)
    )


def _scaled(linear: Linear, inputs: np.ndarray, outputs: np.ndarray | None = None) -> Linear:
    """Return a layer for inputs scaled by `inputs`, with outputs scaled by `outputs`."""
    weight, bias = linear.weight / inputs[:, None], linear.bias
    return Linear(weight, bias) if outputs is None else Linear(weight * outputs, bias * outputs)


def _scaled_norm(norm: LayerNorm, factors: np.ndarray) -> LayerNorm:
    return LayerNorm(norm.gain * factors, norm.bias * factors)
