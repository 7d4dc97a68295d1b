"""A network's weights as the kernels read them: panels of one type, rows filled up, and records that say where everything is.

Layer after layer is read, packed and let go, so that loading takes little more memory than the packed weights and one layer in float32.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from nanovllm.model.activation import ACTIVATIONS
from nanovllm.model.config import GPT2Config
from nanovllm.model.kernels.build.packing import (
    aligned_zeros,
    pack_panels,
    pack_rows,
    panel_steps,
    round_up,
    to_bfloat16,
)
from nanovllm.model.kernels.build.target import PER_WORD, Spec
from nanovllm.model.kernels.step_record import (
    ACTIVATION_NAMES,
    ADD_TO_RESIDUAL,
    LINEAR,
    LINEARS_PER_LAYER,
    MAX_OUTLIERS,
    STORE,
)
from nanovllm.model.quantization import (
    QuantizedLayer,
    QuantizedLinear,
    calibrate,
    quantize_head,
    quantize_layer,
)
from nanovllm.model.weights import GPT2Weights, Layer, LayerNorm, Linear
from nanovllm.progress import progress_bar


class _Part(NamedTuple):
    """Products in the order of their records, what each is multiplied by first, and the layer norms before them; None for the head's part."""

    products: tuple[Linear | QuantizedLinear, ...]
    factors: tuple[np.ndarray | None, ...]
    norms: tuple[LayerNorm, ...]


class PackedWeights:
    """`arrays` by the names that their addresses have in the record of kernels/step_record.py, and `held`: those that linear layers' records name.

    `head_multipliers` are what the input channels of a quantized head are multiplied by, folded into the final norm; None for other heads.
    """

    def __init__(
        self, config: GPT2Config, weights: GPT2Weights, spec: Spec, *, narrow_embedding: bool
    ) -> None:
        """Pack; `narrow_embedding` keeps the token embedding in bfloat16."""
        self._spec = spec
        self._width = spec.target.panel_width
        self.held: list[tuple[str, np.ndarray]] = []
        self.linears = np.zeros(config.layers * LINEARS_PER_LAYER + 1, dtype=LINEAR)
        activation = ACTIVATION_NAMES.index(ACTIVATIONS[config.activation].__name__)
        self.linears["finish"] = (
            STORE,
            ADD_TO_RESIDUAL,
            activation,
            ADD_TO_RESIDUAL,
        ) * config.layers + (STORE,)
        norms: list[LayerNorm] = []
        parts = _quantized_parts(config, weights) if spec.weights == "int8" else _parts(weights)
        place = 0
        with progress_bar(
            total=config.layers + 1, desc="Packing weights", unit="layer", leave=False
        ) as progress:
            for part in parts:
                for product, factors in zip(part.products, part.factors, strict=True):
                    self._pack(self.linears[place], product, factors)
                    place += 1
                norms += part.norms
                del part, product  # before the next layer is read
                progress.update()
        self.arrays = {
            "linears": self.linears,
            "token_embedding": self._embedding(weights.token_embedding, narrow=narrow_embedding),
            "position_embedding": pack_rows(list(weights.position_embedding), self._width),
            **self._norms("attention", norms[0:-1:2]),
            **self._norms("ffn", norms[1:-1:2]),
            **self._norms("final", norms[-1:]),
        }
        self.head_multipliers = (
            _multipliers(weights.final_norm, norms[-1]) if spec.weights == "int8" else None
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of everything that is held."""
        return sum(
            array.nbytes for array in (*self.arrays.values(), *(array for _, array in self.held))
        )

    def _pack(
        self, record: Any, linear: Linear | QuantizedLinear, factors: np.ndarray | None
    ) -> None:
        if isinstance(linear, QuantizedLinear):
            numbers = linear.codes
            self._hold(record, "column_scales", pack_rows([linear.column_scales], self._width))
            self._hold(
                record,
                "column_sums",
                _pack_integers(numbers.sum(axis=0, dtype=np.int32), self._width),
            )
            assert linear.outliers.size <= MAX_OUTLIERS
            inputs = np.ones(numbers.shape[0], dtype=np.float32) if factors is None else factors
            without_outliers = inputs.copy()
            without_outliers[linear.outliers] = 0.0
            self._hold(record, "input_factors", pack_rows([without_outliers], self._width))
            self._hold(record, "outlier_factors", pack_rows([inputs[linear.outliers]], self._width))
            record["outliers"] = linear.outliers.size
            self._hold(
                record,
                "outlier_places",
                _pack_integers(linear.outliers.astype(np.int32), self._width),
            )
            if linear.outliers.size:
                self._hold(
                    record, "outlier_weight", pack_rows(list(linear.outlier_weight), self._width)
                )
        else:
            numbers = linear.weight
        d_in, d_out = numbers.shape
        record["steps"] = panel_steps(d_in, PER_WORD[self._spec.weights])
        record["panels"] = round_up(d_out, self._width) // self._width
        is_narrow = self._spec.weights == "bfloat16"
        self._hold(record, "weight", pack_panels(numbers, self._width, narrow=is_narrow))
        self._hold(record, "bias", pack_rows([linear.bias], self._width))

    def _hold(self, record: Any, name: str, array: np.ndarray) -> None:
        self.held.append((f"{name} of a linear layer", array))
        record[name] = array.ctypes.data

    def _norms(self, name: str, norms: list[LayerNorm]) -> dict[str, np.ndarray]:
        gains, biases = [norm.gain for norm in norms], [norm.bias for norm in norms]
        return {
            f"{name}_gain": pack_rows(gains, self._width),
            f"{name}_bias": pack_rows(biases, self._width),
        }

    def _embedding(self, embedding: np.ndarray, *, narrow: bool) -> np.ndarray:
        if not narrow:
            return np.ascontiguousarray(embedding)
        vocab, d_model = embedding.shape
        padded = np.zeros((vocab, round_up(d_model, self._width)), dtype=np.uint16)
        for start in range(0, vocab, 1024):
            padded[start : start + 1024, :d_model] = to_bfloat16(embedding[start : start + 1024])
        return padded


def _parts(weights: GPT2Weights) -> Iterator[_Part]:
    """Every layer in order, and then the head; a layer is not kept while the next is read."""
    for index in range(len(weights.layers)):
        yield _part(weights.layers[index])
    head = weights.head.T
    bias = np.zeros(head.shape[1], dtype=np.float32)
    yield _Part((Linear(head, bias),), (None,), (weights.final_norm,))


def _part(layer: Layer) -> _Part:
    products = (layer.attention.qkv, layer.attention.out, layer.ffn.up, layer.ffn.down)
    return _Part(products, (None,) * 4, (layer.attention_norm, layer.ffn_norm))


def _quantized_parts(config: GPT2Config, weights: GPT2Weights) -> Iterator[_Part]:
    calibration = calibrate(config, weights)
    for index, peaks in enumerate(calibration.layers):
        yield _quantized_part(quantize_layer(weights.layers[index], peaks))
    norm, head = quantize_head(weights, calibration.head)
    yield _Part((head,), (None,), (norm,))


def _quantized_part(layer: QuantizedLayer) -> _Part:
    products = (layer.qkv, layer.out, layer.up, layer.down)
    factors = (None, None, None, layer.down_multipliers)
    return _Part(products, factors, (layer.attention_norm, layer.ffn_norm))


def _multipliers(norm: LayerNorm, scaled: LayerNorm) -> np.ndarray:
    """How much larger each channel of a norm has become; 1 where it is nothing."""
    before, after = np.hypot(norm.gain, norm.bias), np.hypot(scaled.gain, scaled.bias)
    return np.where(
        before * after > 0, after / np.where(before > 0, before, np.float32(1.0)), np.float32(1.0)
    )


def _pack_integers(values: np.ndarray, width: int) -> np.ndarray:
    """32-bit integers filled up with zeros to a multiple of `width`."""
    packed = aligned_zeros(round_up(max(values.size, 1), width)).view(np.int32)
    packed[: values.size] = values
    return packed
