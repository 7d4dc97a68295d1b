"""The slow twins of the int8 kernels, and the q8_0 rounding that int8 is compared with."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from nanovllm.model.activation import ACTIVATIONS
from nanovllm.model.attention import attend, paged_attention
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.config import GPT2Config
from nanovllm.model.kv_cache import KVCache
from nanovllm.model.layernorm import layer_norm
from nanovllm.model.linear import product
from nanovllm.model.quantization import (
    LARGEST_ROW_CODE,
    QuantizedLayer,
    QuantizedLinear,
    calibrate,
    quantize_head,
    quantize_layer,
)
from nanovllm.model.weights import GPT2Weights, LayerNorm

Q8_GROUP = 32


@dataclass(frozen=True, slots=True)
class QuantizedWeights:
    """The whole network. The embeddings are looked up and not multiplied, so they stay as they are."""

    token_embedding: Float32[np.ndarray, "vocab d_model"]
    position_embedding: Float32[np.ndarray, "positions d_model"]
    layers: tuple[QuantizedLayer, ...]
    final_norm: LayerNorm
    head: QuantizedLinear


def quantize(config: GPT2Config, weights: GPT2Weights) -> QuantizedWeights:
    """Round a whole network."""
    calibration = calibrate(config, weights)
    layers = tuple(
        quantize_layer(layer, peaks)
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
    """Codes, scales and zero points of activations whose outliers have been set to zero; each row by itself."""
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
    rows: Float32[np.ndarray, "rows d_in"], linear: QuantizedLinear
) -> Float32[np.ndarray, "rows d_out"]:
    """One product in the order of the kernels: codes, exact sums, scales, bias, outliers."""
    inliers = rows.copy()
    inliers[:, linear.outliers] = 0.0
    codes, row_scales, zero_points = quantize_rows(inliers)
    sums = codes.astype(np.float64) @ linear.codes.astype(
        np.float64
    )  # exact: whole numbers far below 2**53
    sums -= zero_points * linear.codes.sum(axis=0, dtype=np.int64)
    out: np.ndarray = sums.astype(np.float32) * (row_scales * linear.column_scales)
    out += linear.bias
    for channel, weight in zip(linear.outliers, linear.outlier_weight, strict=True):
        out += rows[:, channel, None] * weight
    return out


def quantized_forward(
    config: GPT2Config, weights: QuantizedWeights, batch: ForwardBatch, cache: KVCache
) -> Float32[np.ndarray, "rows d_model"]:
    """The forward pass of gpt2.py with every product in int8; the result is the head's input, and no longer the hidden state itself."""
    activation = ACTIVATIONS[config.activation]
    hidden = weights.token_embedding[batch.token_ids] + weights.position_embedding[batch.positions]
    for index, layer in enumerate(weights.layers):
        normed = layer_norm(
            hidden, layer.attention_norm.gain, layer.attention_norm.bias, config.epsilon
        )
        qkv = quantized_linear(normed, layer.qkv)
        queries, keys, values = qkv.reshape(
            batch.tokens, 3, config.heads, config.head_dim
        ).transpose(1, 0, 2, 3)
        cache.write(index, batch.slots, keys, values)
        mixed = paged_attention(queries, cache, index, batch, config.attention_scale(index), attend)
        hidden = hidden + quantized_linear(mixed.reshape(batch.tokens, config.d_model), layer.out)
        normed = layer_norm(hidden, layer.ffn_norm.gain, layer.ffn_norm.bias, config.epsilon)
        middle = activation(quantized_linear(normed, layer.up)) * layer.down_multipliers
        hidden = hidden + quantized_linear(middle, layer.down)
    return layer_norm(
        hidden[batch.logit_rows], weights.final_norm.gain, weights.final_norm.bias, config.epsilon
    )


def q8_0(rows: Float32[np.ndarray, "rows columns"]) -> Float32[np.ndarray, "rows columns"]:
    """What is left of rows rounded as llama.cpp's q8_0 rounds them: 32 neighbours share a scale, their largest magnitude over 127."""
    columns = rows.shape[1]
    groups = np.pad(rows, ((0, 0), (0, -columns % Q8_GROUP))).reshape(rows.shape[0], -1, Q8_GROUP)
    scales = np.abs(groups).max(axis=2, keepdims=True) / np.float32(127.0)
    rounded = np.rint(groups / np.where(scales > 0, scales, np.float32(1.0))) * scales
    kept: np.ndarray = rounded.reshape(rows.shape[0], -1)[:, :columns]
    return kept


def q8_0_product(
    rows: Float32[np.ndarray, "rows d_in"], weight: Float32[np.ndarray, "d_in d_out"]
) -> Float32[np.ndarray, "rows d_out"]:
    """A product, to be given to `Arithmetic`, whose two sides are rounded in groups along the input channels."""
    return product(q8_0(rows), q8_0(weight.T).T)
