"""A network's weights as the kernels read them: packed panels, padded rows, and their records.

Layer after layer is read, packed and dropped, so loading takes little more memory than the packed
weights and one layer in float32.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from nanovllm.model.activation import ACTIVATIONS, GATES
from nanovllm.model.config import ModelConfig
from nanovllm.model.kernels.build.packing import (
    aligned_zeros,
    pack_panels,
    pack_rows,
    round_up,
    to_bfloat16,
)
from nanovllm.model.kernels.build.target import Spec
from nanovllm.model.kernels.step_record import (
    ACTIVATION_NAMES,
    GATED,
    LINEAR_RECORD,
    LINEARS_PER_LAYER,
    OUTLIER_WORDS,
)
from nanovllm.model.quantization import (
    Calibration,
    LayerPeaks,
    QuantizedLinear,
    calibrate,
    quantize_head,
    quantize_layer,
)
from nanovllm.model.weights import Layer, LayerNorm, Linear, ModelWeights
from nanovllm.progress import progress_bar

AnyLinear = Linear | QuantizedLinear


class PackedWeights:
    """The packed weights of a network.

    Attributes:
        arrays: those of a step's record (step_record.py), by name.
        held: those that the records of linear layers point to, with names for messages.
        activation: number of the epilogue of the feed-forward block, see step_record.py.
        head_multipliers: factors of the input channels of a quantized head, which are folded into
            the final norm; None for other heads.
    """

    def __init__(
        self, config: ModelConfig, weights: ModelWeights, spec: Spec, *, narrow_embedding: bool
    ) -> None:
        """Pack; `narrow_embedding` keeps the token embedding in bfloat16."""
        self._spec = spec
        self._width = spec.target.panel_width
        self.held: list[tuple[str, np.ndarray]] = []
        name = ACTIVATIONS[config.activation].name
        self.activation = (
            GATED + GATES.index(name) if config.is_gated else ACTIVATION_NAMES.index(name)
        )
        records = np.zeros(config.layers * LINEARS_PER_LAYER + 1, dtype=LINEAR_RECORD)
        norms: list[LayerNorm] = []
        head_gains: list[np.ndarray] = []
        calibration = calibrate(config, weights) if spec.weights == "int8" else None
        number = 0
        with progress_bar(
            total=config.layers + 1, desc="Packing weights", unit="layer", delay=0.5, leave=False
        ) as progress:
            for part in _parts(config, weights, calibration, self._width):
                for linear in part.linears:
                    self._pack(records[number], linear)
                    number += 1
                norms += part.norms
                head_gains += part.head_gains
                del part, linear  # before the next layer is read
                progress.update()
        self.arrays = {
            "linears": records,
            "token_embedding": self._embedding(weights.token_embedding, narrow=narrow_embedding),
            **self._norms("attention", norms[0:-1:2]),
            **self._norms("ffn", norms[1:-1:2]),
            **self._norms("final", norms[-1:]),
            **self._positions(config, weights),
        }
        if head_gains:
            self.arrays["query_gain"] = np.stack(head_gains[::2])
            self.arrays["key_gain"] = np.stack(head_gains[1::2])
        self.head_multipliers = (
            _multipliers(weights.final_norm, norms[-1]) if spec.weights == "int8" else None
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for _, array in (*self.arrays.items(), *self.held))

    def _pack(self, record: Any, linear: AnyLinear) -> None:
        """Pack a linear layer and write its record."""
        if isinstance(linear, QuantizedLinear):
            weight = linear.codes
            self._pack_scales(record, linear)
        else:
            weight = linear.weight
        d_in, d_out = weight.shape
        record["steps"] = steps = self._spec.target.panel_steps(self._spec.weights, d_in)
        record["panels"] = round_up(d_out, self._width) // self._width
        is_bfloat16 = self._spec.weights == "bfloat16"
        panels = pack_panels(weight, self._width, narrow=is_bfloat16, steps=steps)
        self._hold(record, "weight", panels)
        self._hold(record, "bias", pack_rows([linear.bias], self._width))

    def _pack_scales(self, record: Any, linear: QuantizedLinear) -> None:
        """Pack what int8 weights have besides their codes: scales, sums, factors and outliers."""
        codes, outliers = linear.codes, linear.outliers
        assert outliers.size <= OUTLIER_WORDS
        factors, input_factors = linear.input_factors, linear.input_factors.copy()
        input_factors[outliers] = 0.0
        column_sums = codes.sum(axis=0, dtype=np.int32)
        record["outliers"] = outliers.size
        self._hold(record, "column_scales", pack_rows([linear.column_scales], self._width))
        self._hold(record, "column_sums", _pack_integers(column_sums, self._width))
        self._hold(record, "input_factors", pack_rows([input_factors], self._width))
        self._hold(record, "outlier_factors", pack_rows([factors[outliers]], self._width))
        columns = _pack_integers(outliers.astype(np.int32), self._width)
        self._hold(record, "outlier_columns", columns)
        if outliers.size:
            outlier_weight = pack_rows(list(linear.outlier_weight), self._width)
            self._hold(record, "outlier_weight", outlier_weight)

    def _hold(self, record: Any, name: str, array: np.ndarray) -> None:
        self.held.append((f"{name} of a linear layer", array))
        record[f"{name}_ptr"] = array.ctypes.data

    def _norms(self, name: str, norms: list[LayerNorm]) -> dict[str, np.ndarray]:
        gains, biases = [norm.gain for norm in norms], [norm.bias for norm in norms]
        return {
            f"{name}_gain": pack_rows(gains, self._width),
            f"{name}_bias": pack_rows(biases, self._width),
        }

    def _positions(self, config: ModelConfig, weights: ModelWeights) -> dict[str, np.ndarray]:
        """Return the position embedding, or the cosines and sines of rotary positions."""
        if config.rotary is None:
            rows = list(weights.position_embedding)
            return {"position_embedding": pack_rows(rows, self._width)}
        positions = np.arange(config.max_positions, dtype=np.int64)
        angles = config.rotary.angles(positions, config.head_dim)
        return {"rotary": np.concatenate([np.cos(angles), np.sin(angles)], axis=1)}

    def _embedding(self, embedding: np.ndarray, *, narrow: bool) -> np.ndarray:
        if not narrow:
            return np.ascontiguousarray(embedding)
        vocab, d_model = embedding.shape
        padded = np.zeros((vocab, round_up(d_model, self._width)), dtype=np.uint16)
        for start in range(0, vocab, 1024):
            padded[start : start + 1024, :d_model] = to_bfloat16(embedding[start : start + 1024])
        return padded


class _Part(NamedTuple):
    """A block, or the head.

    Attributes:
        linears: its linear layers.
        norms: the norms before them.
        head_gains: the gains of its queries and keys, if they are normalized.
    """

    linears: Sequence[AnyLinear]
    norms: Sequence[LayerNorm]
    head_gains: Sequence[np.ndarray] = ()


def _parts(
    config: ModelConfig, weights: ModelWeights, calibration: Calibration | None, width: int
) -> Iterator[_Part]:
    """Yield every block, and last the head.

    They are quantized where there is a calibration. No block is kept while the next one is read.
    """
    for index in range(len(weights.layers)):
        peaks = None if calibration is None else calibration.layers[index]
        yield _block(config, weights.layers[index], peaks, width)
    if calibration is not None:
        norm, quantized_head = quantize_head(weights, calibration.head)
        yield _Part((quantized_head,), (norm,))
    else:
        head = weights.head.T
        bias = np.zeros(head.shape[1], dtype=np.float32)
        yield _Part((Linear(head, bias),), (weights.final_norm,))


def _block(
    config: ModelConfig, stored: Layer[Linear], peaks: LayerPeaks | None, width: int
) -> _Part:
    if config.is_gated:
        stored = replace(stored, up=interleaved(stored.up, width))
    layer: Layer[Linear] | Layer[QuantizedLinear] = stored
    if peaks is not None:
        layer = quantize_layer(stored, peaks, config.head_dim)
    gains = [gain for gain in (layer.query_gain, layer.key_gain) if gain is not None]
    norms = layer.attention_norm, layer.ffn_norm
    return _Part((layer.qkv, layer.out, layer.up, layer.down), norms, gains)


def interleaved(up: Linear, width: int) -> Linear:
    """Return a gate and what it multiplies, in turns: half a panel of one, half of the other.

    Columns are filled up with zeros to whole panels of `width`.
    """
    half, d_ff = width // 2, up.bias.size // 2
    panels = round_up(d_ff, half) // half

    def arrange(columns: np.ndarray) -> np.ndarray:
        rows = columns.reshape(-1, 2, d_ff)  # gate, and what it multiplies
        padded = np.zeros((len(rows), 2, panels * half), dtype=np.float32)
        padded[..., :d_ff] = rows
        return padded.reshape(-1, 2, panels, half).swapaxes(1, 2).reshape(len(rows), -1)

    return Linear(arrange(up.weight), arrange(up.bias)[0])


def _multipliers(norm: LayerNorm, scaled: LayerNorm) -> np.ndarray:
    """Return the factor that scaled each channel of a norm; 1 for channels that are 0."""
    before, after = np.hypot(norm.gain, norm.bias), np.hypot(scaled.gain, scaled.bias)
    return np.where(
        before * after > 0, after / np.where(before > 0, before, np.float32(1.0)), np.float32(1.0)
    )


def _pack_integers(values: np.ndarray, width: int) -> np.ndarray:
    """Return int32 values, padded with zeros to a multiple of `width`."""
    packed = aligned_zeros(round_up(max(values.size, 1), width)).view(np.int32)
    packed[: values.size] = values
    return packed
