"""int8 weights (quantization="int8"): how they are rounded, and how large channels are treated.

A weight has one scale for each output column. Its input has one scale and one zero point for each
row, found when the row is computed. The sum over the input channels j is then one of integers,
exact in int32 (tests/support/quantized.py is this matmul in NumPy):

    weight[j, c] = multiplier[j] * scale[c] * code[j, c]                   code     -127 to 127
    input[j] * multiplier[j] = row_scale * (row_code[j] - zero_point)      row_code    0 to 255
    output[c] = row_scale * scale[c] * sum_j (row_code[j] - zero_point) * code[j, c]  +  bias[c]

A row has a zero point because GELU's outputs nearly all have one sign: without it half of the codes
would not be used.

**Multipliers.** In a row with one scale, a channel 30 times as large as the others leaves them 30
times fewer codes. SmoothQuant (Xiao et al. 2022, arXiv:2211.10438) moves a part of each channel's
size from the activation to the weight. Here multiplier[j] is the length of row j of the weight, so
a channel counts by its effect on the output. Scaling a channel by a factor, and its weight row by
the inverse, then changes almost nothing. The multipliers need no calibration. They cost nothing
where they fold into the operation before: into the gain and bias of a layer norm and, because
attention is linear in its values, into the columns of the value projection. Only behind the
activation function a multiplication remains. In the head, rounded weights do as much harm as
rounded activations, so its multipliers are the square root of the ratio of the two sizes.

**Outliers.** A channel may affect the output more than all others together, as some of GPT-2's
residual stream do. These few are left out of the codes and multiplied in float32 (LLM.int8(),
Dettmers et al. 2022, arXiv:2208.07339). They are chosen once, from one pass of the float32 model
over a fixed sequence, so a request's bits do not depend on its batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float32, Int8, Int64

from nanovllm.errors import CheckpointError
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.config import ModelConfig
from nanovllm.model.families.forward import forward
from nanovllm.model.kv_cache import KVCache
from nanovllm.model.weights import Layer, LayerNorm, Linear, ModelWeights

LARGEST_CODE = 127
LARGEST_ROW_CODE = 255
MAX_INPUTS = (2**31 - 1) // (LARGEST_CODE * LARGEST_ROW_CODE)
"""Input channels whose sum cannot overflow an int32."""

CALIBRATION_TOKENS = 256
MAX_OUTLIERS = 16
"""Outliers of one matmul; each costs about as much as 4 to 8 channels in int8."""
OUTLIER_RATIO = 2.0
"""A channel is an outlier if its peak is above this multiple of the largest kept channel's."""

_SMALLEST = 1e-30  # smaller sizes count as zero: their inverse might overflow float32
_BLOCK = 1 << 19  # numbers rounded at a time; the temporaries stay in the cache

_MATMUL_INPUTS = ("attention_input", "attn_out", "ffn_input", "ffn_hidden", "final_hidden")
"""The observed arrays that are inputs of qkv, out, up, down and the head."""

Peaks = Float32[np.ndarray, " d_in"]


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """A linear layer whose input has been multiplied by its multipliers.

    Attributes:
        outliers: input channels that are left out of the codes, ascending.
        input_factors: the multipliers, where no operation before could be scaled by them; ones
            elsewhere.
    """

    codes: Int8[np.ndarray, "d_in d_out"]
    column_scales: Float32[np.ndarray, " d_out"]
    bias: Float32[np.ndarray, " d_out"]
    outliers: Int64[np.ndarray, " outliers"]
    outlier_weight: Float32[np.ndarray, "outliers d_out"]
    input_factors: Float32[np.ndarray, " d_in"]


@dataclass(frozen=True, slots=True)
class LayerPeaks:
    """The largest magnitude of each input channel of a block's four matmuls."""

    qkv: Float32[np.ndarray, " d_model"]
    out: Float32[np.ndarray, " queries_width"]
    up: Float32[np.ndarray, " d_model"]
    down: Float32[np.ndarray, " d_ff"]


@dataclass(frozen=True, slots=True)
class Calibration:
    """The peaks of every matmul."""

    layers: tuple[LayerPeaks, ...]
    head: Peaks


def calibrate(config: ModelConfig, weights: ModelWeights) -> Calibration:
    """Run the float32 model over a fixed sequence and measure every matmul's input."""
    peaks: dict[tuple[str, int | None], Peaks] = {}

    def measure(name: str, layer: int | None, array: np.ndarray, /) -> None:
        if name in _MATMUL_INPUTS:
            peaks[name, layer] = np.maximum(array.max(axis=0), -array.min(axis=0))

    tokens = min(CALIBRATION_TOKENS, config.max_positions)
    cache = KVCache.allocate(config, blocks=1, block_size=tokens)
    batch = ForwardBatch.single(_calibration_ids(config.vocab, tokens), all_rows=True)
    forward(config, weights, batch, cache, measure)
    *of_layer, head = _MATMUL_INPUTS
    layers = (
        LayerPeaks(*(peaks[name, layer] for name in of_layer)) for layer in range(config.layers)
    )
    return Calibration(tuple(layers), peaks[head, None])


def quantize_layer(
    layer: Layer[Linear], peaks: LayerPeaks, head_dim: int
) -> Layer[QuantizedLinear]:
    """Round a block; the multipliers but for those of `down` are folded into the layers before.

    Query heads that share a head of values share its multipliers, which are the root mean squares.

    Raises:
        CheckpointError: weights are not finite, or too many for int32 sums.
    """
    qkv, out, up, down = layer.qkv, layer.out, layer.up, layer.down
    qkv_multipliers, out_multipliers, up_multipliers, down_multipliers = (
        row_lengths(linear.weight) for linear in (qkv, out, up, down)
    )
    values_width = (qkv.bias.size - out_multipliers.size) // 2
    before_values = np.ones(qkv.bias.size - values_width, dtype=np.float32)
    value_multipliers = out_multipliers
    if values_width < out_multipliers.size:
        by_head = out_multipliers.reshape(values_width // head_dim, -1, head_dim)
        shared = np.sqrt(np.square(by_head).mean(axis=1, keepdims=True))
        value_multipliers = shared.ravel()
        out_multipliers = np.broadcast_to(shared, by_head.shape).reshape(-1)
    quantized_down = quantize_linear(down.weight, down.bias, down_multipliers, peaks.down)
    return Layer(
        attention_norm=_scale_norm(layer.attention_norm, qkv_multipliers),
        qkv=scale_columns(
            quantize_linear(qkv.weight, qkv.bias, qkv_multipliers, peaks.qkv),
            np.concatenate([before_values, value_multipliers]),
        ),
        out=quantize_linear(out.weight, out.bias, out_multipliers, peaks.out),
        ffn_norm=_scale_norm(layer.ffn_norm, up_multipliers),
        up=quantize_linear(up.weight, up.bias, up_multipliers, peaks.up),
        down=replace(quantized_down, input_factors=down_multipliers),
        query_gain=layer.query_gain,
        key_gain=layer.key_gain,
    )


def quantize_head(weights: ModelWeights, peaks: Peaks) -> tuple[LayerNorm, QuantizedLinear]:
    """Return the final norm with the head's multipliers, and the rounded head; its bias is zero."""
    norm, weight = weights.final_norm, weights.head.T
    sizes = np.hypot(norm.gain, norm.bias)  # of the norm's output: the normalized row's are 1
    multipliers = np.sqrt(row_lengths(weight) / np.where(sizes > _SMALLEST, sizes, np.float32(1.0)))
    return _scale_norm(norm, multipliers), quantize_linear(
        weight, np.zeros(weight.shape[1], dtype=np.float32), multipliers, peaks
    )


def quantize_linear(
    weight: Float32[np.ndarray, "d_in d_out"],
    bias: Float32[np.ndarray, " d_out"],
    multipliers: Float32[np.ndarray, " d_in"],
    peaks: Peaks,
) -> QuantizedLinear:
    """Round a linear layer.

    Args:
        multipliers: factors of its input channels, above 0.
        peaks: the largest magnitude of each input channel before the multiplication.
    """
    d_in, d_out = weight.shape
    if d_in > MAX_INPUTS:
        raise CheckpointError(
            f"a matmul has {d_in} input channels; int8 sums hold at most {MAX_INPUTS}. "
            "Load the model without quantization"
        )
    outliers = choose_outliers(peaks * multipliers)
    inverse = np.float32(1.0) / multipliers[:, None]
    outlier_weight = weight[outliers] * inverse[outliers]
    inverse[outliers] = 0.0
    # empty_like keeps the order: packing reads the head's codes like the embedding, transposed
    codes = np.empty_like(weight, dtype=np.int8)
    largest = np.empty(d_out, dtype=np.float32)
    for columns in _column_blocks(weight):
        scaled = weight[:, columns] * inverse
        largest[columns] = np.maximum(scaled.max(axis=0), -scaled.min(axis=0))
        scaled *= _inverse_scales(largest[columns])
        np.rint(scaled, out=scaled)
        codes[:, columns] = scaled
    scales, ones = largest / np.float32(LARGEST_CODE), np.ones(d_in, dtype=np.float32)
    return QuantizedLinear(codes, scales, bias.copy(), outliers, outlier_weight, ones)


def scale_columns(
    linear: QuantizedLinear, factors: Float32[np.ndarray, " d_out"]
) -> QuantizedLinear:
    """Multiply the output columns by `factors`; the codes stay the same."""
    return replace(
        linear,
        column_scales=linear.column_scales * factors,
        bias=linear.bias * factors,
        outlier_weight=linear.outlier_weight * factors,
    )


def choose_outliers(peaks: Peaks) -> Int64[np.ndarray, " outliers"]:
    """Return the channels whose peaks exceed OUTLIER_RATIO times the largest kept one, ascending.

    The measure is not an average channel, because GELU's outputs have a long tail, and leaving that
    out gains little.
    """
    order = np.argsort(-peaks, kind="stable")
    count = min(MAX_OUTLIERS, len(peaks) // 2)
    candidates, largest_kept = order[:count], peaks[order[count]]
    outliers = candidates[peaks[candidates] > OUTLIER_RATIO * largest_kept]
    return np.sort(outliers).astype(np.int64)


def _inverse_scales(largest: Float32[np.ndarray, " columns"]) -> Float32[np.ndarray, " columns"]:
    """Return each column's codes per unit of weight; 0 for a column of zeros."""
    if not np.isfinite(largest).all():
        raise CheckpointError(
            "the weights hold numbers that are not finite, which have no int8 codes; "
            "load the model without quantization"
        )
    return np.where(
        largest > _SMALLEST,
        np.float32(LARGEST_CODE) / np.maximum(largest, np.float32(_SMALLEST)),
        np.float32(0.0),
    )


def row_lengths(weight: Float32[np.ndarray, "d_in d_out"]) -> Float32[np.ndarray, " d_in"]:
    """Return the length of each row after scaling all columns to length 1; 1 for a row of zeros.

    Without the scaling a few large columns, such as those of a large value channel, would decide;
    but a column has its own scale.
    """
    squares = np.zeros(weight.shape[0], dtype=np.float32)
    for columns in _column_blocks(weight):
        block = np.square(weight[:, columns])
        lengths = block.sum(axis=0)
        block *= np.where(
            lengths > _SMALLEST,
            np.float32(1.0) / np.maximum(lengths, np.float32(_SMALLEST)),
            np.float32(0.0),
        )
        squares += block.sum(axis=1)
    return np.where(squares > _SMALLEST, np.sqrt(squares), np.float32(1.0))


def _column_blocks(weight: Float32[np.ndarray, "d_in d_out"]) -> Iterator[slice]:
    d_in, d_out = weight.shape
    step = max(1, _BLOCK // d_in)
    return (slice(start, start + step) for start in range(0, d_out, step))


def _scale_norm(norm: LayerNorm, multipliers: Float32[np.ndarray, " d_model"]) -> LayerNorm:
    return LayerNorm(norm.gain * multipliers, norm.bias * multipliers)


def _calibration_ids(vocab: int, tokens: int) -> Int64[np.ndarray, " tokens"]:
    """Return multiples of the golden ratio, which spread evenly over the vocabulary."""
    factors = np.arange(1, tokens + 1, dtype=np.int64)
    return (factors * 2654435769 % 2**32) * vocab // 2**32
