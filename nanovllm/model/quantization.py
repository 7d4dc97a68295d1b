"""Weights in int8 (quantization="int8"): how they are rounded, and why GPT-2's large channels do not suffer from it.

A product's weights get one scale for each output column. Its activations get one scale and one zero point for each row when they are
computed, so the sum over the input channels j is one of whole numbers, exact in int32 (`tests/support/quantized.py` is the product in NumPy):

    weight[j, c] = multiplier[j] * scale[c] * code[j, c]                      code  -127 to 127
    input[j] * multiplier[j] = row_scale * (row_code[j] - zero_point)         row_code 0 to 255
    output[c] = row_scale * scale[c] * sum_j (row_code[j] - zero_point) * code[j, c]  +  bias[c]

A row has a zero point because what GELU gives is nearly all of one sign: without it half of the codes would never be used.

**Multipliers.** In a row that has one scale, a channel 30 times as large as the others leaves them 30 times fewer codes. SmoothQuant (Xiao et
al. 2022, arXiv:2211.10438) moves a part of each channel's size from the activation to the weight. Here multiplier[j] is the length of row j
of the weight, so that every channel is measured by what it does to the output. Scaling a channel by any factor and its weight row by the
inverse then changes next to nothing. It needs no look at activations, and costs nothing where it can be folded into what comes before: into
a layer norm's gain and bias, and, since attention is linear in its values, into the columns of the value projection. Only behind the
activation function a multiplication is left. In the head, rounded weights do as much harm as rounded activations, so the root of the
ratio of the two sizes is taken, which shares the codes between them.

**Outliers.** A channel may really do more to the output than all others together, as some of GPT-2's residual stream do. The few that do
are left out of the codes and multiplied in float32 (LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339). They are chosen once, from one
pass of the float32 model over made-up tokens, so that a request's bits never depend on what it is batched with.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int8, Int64

from nanovllm.errors import CheckpointError
from nanovllm.model.attention import attend
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.config import GPT2Config
from nanovllm.model.gpt2 import Arithmetic, forward
from nanovllm.model.kv_cache import KVCache
from nanovllm.model.linear import product
from nanovllm.model.weights import GPT2Weights, Layer, LayerNorm

LARGEST_CODE = 127
LARGEST_ROW_CODE = 255
MOST_INPUTS = (2**31 - 1) // (LARGEST_CODE * LARGEST_ROW_CODE)
"""Input channels whose products are sure to add up inside an int32."""

CALIBRATION_TOKENS = 256
MOST_OUTLIERS = 16
"""Outliers that a product may have; each costs about as much as 4 to 8 channels in int8."""
OUTLIER_RATIO = 2.0
"""How much larger than the largest channel that has to stay an outlier is."""

_SMALLEST = 1e-30  # rows and columns of numbers below it are taken as zero, since their inverse might not be a float32
_BLOCK = 1 << 19  # numbers rounded at a time, so that the temporaries stay in the cache

Peaks = Float32[np.ndarray, " d_in"]


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """One product. Its input has been multiplied by its multipliers already.

    codes [in, out]; column_scales, bias [out]; outliers: input channels left out of the codes, ascending; outlier_weight [outliers, out].
    """

    codes: Int8[np.ndarray, "d_in d_out"]
    column_scales: Float32[np.ndarray, " d_out"]
    bias: Float32[np.ndarray, " d_out"]
    outliers: Int64[np.ndarray, " outliers"]
    outlier_weight: Float32[np.ndarray, "outliers d_out"]


@dataclass(frozen=True, slots=True)
class QuantizedLayer:
    """One transformer block. Its layer norms, and `qkv` for the values, give what the next product takes.

    down_multipliers [d_ff]: what the activations are multiplied by before `down`.
    """

    attention_norm: LayerNorm
    qkv: QuantizedLinear
    out: QuantizedLinear
    ffn_norm: LayerNorm
    up: QuantizedLinear
    down_multipliers: Float32[np.ndarray, " d_ff"]
    down: QuantizedLinear


@dataclass(frozen=True, slots=True)
class LayerPeaks:
    """The largest magnitude that each input channel of a block's four products reached."""

    qkv: Float32[np.ndarray, " d_model"]
    out: Float32[np.ndarray, " d_model"]
    up: Float32[np.ndarray, " d_model"]
    down: Float32[np.ndarray, " d_ff"]


@dataclass(frozen=True, slots=True)
class Calibration:
    """The peaks of every product."""

    layers: tuple[LayerPeaks, ...]
    head: Peaks


def calibrate(config: GPT2Config, weights: GPT2Weights) -> Calibration:
    """Run the float32 model over one sequence of fixed made-up tokens and see how large each product's inputs get."""
    peaks: list[Peaks] = []

    def measured_product(
        rows: Float32[np.ndarray, "rows d_in"], weight: Float32[np.ndarray, "d_in d_out"]
    ) -> Float32[np.ndarray, "rows d_out"]:
        peaks.append(_peaks(rows))
        return product(rows, weight)

    tokens = min(CALIBRATION_TOKENS, config.max_positions)
    cache = KVCache.allocate(
        layers=config.layers,
        blocks=1,
        block_size=tokens,
        heads=config.heads,
        head_dim=config.head_dim,
    )
    hidden = forward(
        config,
        weights,
        _made_up_batch(config.vocab, tokens),
        cache,
        Arithmetic(measured_product, attend),
    )
    layers = tuple(LayerPeaks(*peaks[start : start + 4]) for start in range(0, len(peaks), 4))
    return Calibration(layers, _peaks(hidden))


def quantize_layer(layer: Layer, peaks: LayerPeaks) -> QuantizedLayer:
    """Round one block; raises CheckpointError where its weights are not finite or too many for int32 sums."""
    qkv, out, up, down = layer.attention.qkv, layer.attention.out, layer.ffn.up, layer.ffn.down
    qkv_multipliers, out_multipliers, up_multipliers, down_multipliers = (
        row_lengths(linear.weight) for linear in (qkv, out, up, down)
    )
    before_values = np.ones(qkv.bias.shape[0] - out_multipliers.shape[0], dtype=np.float32)
    return QuantizedLayer(
        attention_norm=_scale_norm(layer.attention_norm, qkv_multipliers),
        qkv=scale_columns(
            quantize_linear(qkv.weight, qkv.bias, qkv_multipliers, peaks.qkv),
            np.concatenate([before_values, out_multipliers]),
        ),
        out=quantize_linear(out.weight, out.bias, out_multipliers, peaks.out),
        ffn_norm=_scale_norm(layer.ffn_norm, up_multipliers),
        up=quantize_linear(up.weight, up.bias, up_multipliers, peaks.up),
        down_multipliers=down_multipliers,
        down=quantize_linear(down.weight, down.bias, down_multipliers, peaks.down),
    )


def quantize_head(weights: GPT2Weights, peaks: Peaks) -> tuple[LayerNorm, QuantizedLinear]:
    """Round the head; gives back the final norm whose output it takes, and the head itself, whose bias is zero."""
    norm, weight = weights.final_norm, weights.head.T
    sizes = np.hypot(
        norm.gain, norm.bias
    )  # of the norm's output, where what it normalises has variance 1
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
    """Round one product.

    Args:
        multipliers: what its input is multiplied by, above 0.
        peaks: the largest magnitude of each input channel before that; those much larger than most become outliers.
    """
    d_in, d_out = weight.shape
    if d_in > MOST_INPUTS:
        raise CheckpointError(
            f"a product has {d_in} input channels; int8 sums hold at most {MOST_INPUTS}. Load the model without quantization"
        )
    outliers = choose_outliers(peaks * multipliers)
    inverse = np.float32(1.0) / multipliers[:, None]
    outlier_weight = weight[outliers] * inverse[outliers]
    inverse[outliers] = 0.0
    codes = np.empty_like(
        weight, dtype=np.int8
    )  # in the order of the weight: the head's rows are the embedding's columns
    largest = np.empty(d_out, dtype=np.float32)
    for columns in _column_blocks(weight):
        scaled = weight[:, columns] * inverse
        largest[columns] = np.maximum(scaled.max(axis=0), -scaled.min(axis=0))
        scaled *= _inverse_scales(largest[columns])
        np.rint(scaled, out=scaled)
        codes[:, columns] = scaled
    return QuantizedLinear(
        codes, largest / np.float32(LARGEST_CODE), bias.copy(), outliers, outlier_weight
    )


def scale_columns(
    linear: QuantizedLinear, factors: Float32[np.ndarray, " d_out"]
) -> QuantizedLinear:
    """The product whose output columns are `factors` times as large; the codes stay."""
    return QuantizedLinear(
        linear.codes,
        linear.column_scales * factors,
        linear.bias * factors,
        linear.outliers,
        linear.outlier_weight * factors,
    )


def choose_outliers(peaks: Peaks) -> Int64[np.ndarray, " outliers"]:
    """The channels, ascending, whose peaks are more than `OUTLIER_RATIO` times that of the largest channel which has to stay.

    Compared with an average channel, GELU's outputs would have outliers by the nature of their long tail, and leaving those out gains little.
    """
    order = np.argsort(-peaks, kind="stable")
    most = min(MOST_OUTLIERS, peaks.shape[0] // 2)
    candidates = order[:most]
    return np.sort(candidates[peaks[candidates] > OUTLIER_RATIO * peaks[order[most]]]).astype(
        np.int64
    )


def _inverse_scales(largest: Float32[np.ndarray, " columns"]) -> Float32[np.ndarray, " columns"]:
    """What takes each column to codes; 0 for a column of zeros."""
    if not np.isfinite(largest).all():
        raise CheckpointError(
            "the weights hold numbers that are not finite, which have no int8 codes; load the model without quantization"
        )
    return np.where(
        largest > _SMALLEST,
        np.float32(LARGEST_CODE) / np.maximum(largest, np.float32(_SMALLEST)),
        np.float32(0.0),
    )


def row_lengths(weight: Float32[np.ndarray, "d_in d_out"]) -> Float32[np.ndarray, " d_in"]:
    """The Euclidean length of each row of the weight whose columns have all been brought to length 1; 1 where it is zero.

    Otherwise a few large columns would speak for all: a large value channel is one, and is no more than its own column scale's concern.
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


def _peaks(rows: Float32[np.ndarray, "rows d_in"]) -> Peaks:
    return np.maximum(rows.max(axis=0), -rows.min(axis=0))


def _made_up_batch(vocab: int, tokens: int) -> ForwardBatch:
    """One sequence of ids that are the same on every machine: multiples of the golden ratio, which spread evenly over the vocabulary."""
    places = np.arange(tokens, dtype=np.int64)
    ids = ((places + 1) * 2654435769 % 2**32) * vocab // 2**32
    return ForwardBatch(
        token_ids=ids,
        positions=places,
        query_starts=np.array([0, tokens], dtype=np.int64),
        context_lens=np.array([tokens], dtype=np.int64),
        block_tables=np.zeros((1, 1), dtype=np.int64),
        slots=places,
        logit_rows=places,
    )
