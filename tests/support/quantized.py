"""The int8 forward pass in NumPy, and llama.cpp's q8_0 rounding to compare it with."""

from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from nanovllm.model.activation import ACTIVATIONS
from nanovllm.model.attention import paged_attention
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.config import ModelConfig
from nanovllm.model.families.forward import forward
from nanovllm.model.kv_cache import KVCache
from nanovllm.model.layers import layer_norm, linear
from nanovllm.model.observer import ignore
from nanovllm.model.quantization import (
    LARGEST_ROW_CODE,
    QuantizedLinear,
    calibrate,
    quantize_head,
    quantize_layer,
)
from nanovllm.model.weights import Layer, LayerNorm, Linear, ModelWeights

Q8_GROUP = 32


@dataclass(frozen=True, slots=True)
class QuantizedWeights:
    """The whole network; embeddings are looked up, not multiplied, and so not rounded."""

    token_embedding: Float32[np.ndarray, "vocab d_model"]
    position_embedding: Float32[np.ndarray, "positions d_model"]
    layers: tuple[Layer[QuantizedLinear], ...]
    final_norm: LayerNorm
    head: QuantizedLinear


def quantize(config: ModelConfig, weights: ModelWeights) -> QuantizedWeights:
    """Quantize a whole network."""
    calibration = calibrate(config, weights)
    layers = tuple(
        quantize_layer(layer, peaks, config.head_dim)
        for layer, peaks in zip(weights.layers, calibration.layers, strict=True)
    )
    return QuantizedWeights(
        weights.token_embedding,
        weights.position_embedding,
        layers,
        *quantize_head(weights, calibration.head),
    )


def quantize_rows(
    rows: Float32[np.ndarray, "rows d_in"],
) -> tuple[
    UInt8[np.ndarray, "rows d_in"], Float32[np.ndarray, "rows 1"], Int64[np.ndarray, "rows 1"]
]:
    """Return codes, scales and zero points of activations whose outliers are set to zero."""
    high = np.maximum(rows.max(axis=1, keepdims=True), np.float32(0.0))
    low = np.minimum(rows.min(axis=1, keepdims=True), np.float32(0.0))
    extent = high - low
    usable = extent > np.float32(1e-30)
    inverse = np.where(
        usable,
        np.float32(LARGEST_ROW_CODE) / np.where(usable, extent, np.float32(1.0)),
        np.float32(0.0),
    )
    zero_points = np.rint(-low * inverse)
    codes = np.clip(np.rint(rows * inverse) + zero_points, 0, LARGEST_ROW_CODE)
    return (
        codes.astype(np.uint8),
        extent / np.float32(LARGEST_ROW_CODE),
        zero_points.astype(np.int64),
    )


def quantized_linear(
    rows: Float32[np.ndarray, "rows d_in"], layer: QuantizedLinear
) -> Float32[np.ndarray, "rows d_out"]:
    """Compute a linear layer in the order of the kernels: codes, sums, scales, bias, outliers."""
    inliers = rows.copy()
    inliers[:, layer.outliers] = 0.0
    codes, row_scales, zero_points = quantize_rows(inliers)
    sums = codes.astype(np.float64) @ layer.codes.astype(
        np.float64
    )  # exact: integers far below 2**53
    sums -= zero_points * layer.codes.sum(axis=0, dtype=np.int64)
    out: np.ndarray = sums.astype(np.float32) * (row_scales * layer.column_scales)
    out += layer.bias
    for channel, weight in zip(layer.outliers, layer.outlier_weight, strict=True):
        out += rows[:, channel, None] * weight
    return out


def quantized_forward(
    config: ModelConfig, weights: QuantizedWeights, batch: ForwardBatch, cache: KVCache
) -> Float32[np.ndarray, "rows d_model"]:
    """Run the forward pass of GPT-2 in int8; the result is scaled for the head."""
    activation = ACTIVATIONS[config.activation]
    hidden = weights.token_embedding[batch.token_ids] + weights.position_embedding[batch.positions]
    for index, layer in enumerate(weights.layers):
        normed = layer_norm(hidden, layer.attention_norm, config.epsilon)
        qkv = quantized_linear(normed, layer.qkv)
        queries, keys, values = qkv.reshape(
            batch.tokens, 3, config.heads, config.head_dim
        ).transpose(1, 0, 2, 3)
        cache.write(index, batch.slots, keys, values)
        mixed = paged_attention(queries, cache, index, batch, config.attention_scale(index), ignore)
        hidden = hidden + quantized_linear(mixed.reshape(batch.tokens, config.d_model), layer.out)
        normed = layer_norm(hidden, layer.ffn_norm, config.epsilon)
        middle = activation(quantized_linear(normed, layer.up)) * layer.down.input_factors
        hidden = hidden + quantized_linear(middle, layer.down)
    return layer_norm(hidden[batch.logit_rows], weights.final_norm, config.epsilon)


def q8_0(rows: Float32[np.ndarray, "rows columns"]) -> Float32[np.ndarray, "rows columns"]:
    """Round as llama.cpp's q8_0: 32 neighbours share a scale, their largest magnitude / 127."""
    columns = rows.shape[1]
    groups = np.pad(rows, ((0, 0), (0, -columns % Q8_GROUP))).reshape(rows.shape[0], -1, Q8_GROUP)
    scales = np.abs(groups).max(axis=2, keepdims=True) / np.float32(127.0)
    rounded = np.rint(groups / np.where(scales > 0, scales, np.float32(1.0))) * scales
    kept: np.ndarray = rounded.reshape(rows.shape[0], -1)[:, :columns]
    return kept


def q8_0_logits(
    config: ModelConfig, weights: ModelWeights, batch: ForwardBatch, cache: KVCache
) -> Float32[np.ndarray, "rows vocab"]:
    """Return logits of the float32 model with both sides of every matmul rounded to q8_0."""
    with patch("nanovllm.model.families.gpt2.network.linear", _q8_0_linear):
        hidden = forward(config, weights, batch, cache)
    scores: np.ndarray = q8_0(hidden) @ q8_0(weights.head).T
    return scores


def _q8_0_linear(
    rows: Float32[np.ndarray, "rows d_in"], layer: Linear
) -> Float32[np.ndarray, "rows d_out"]:
    """A linear layer, rounded in groups along the input channels."""
    return linear(q8_0(rows), Linear(q8_0(layer.weight.T).T, layer.bias))
