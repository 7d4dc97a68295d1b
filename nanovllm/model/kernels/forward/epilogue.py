"""The end of a linear layer, applied to its accumulators while they are in the first-level cache.

    STORE          out  = x @ weight + bias
    an activation  out  = activation(x @ weight + bias)
    RESIDUAL       out += x @ weight + bias

Results are float32, with one exception: where linear layers take bfloat16 inputs, activated results
are bfloat16, because they are the input rows of the next linear layer. Input rows of int8 are
quantized by an operation of their own (forward.py).

Accumulators are x @ weight, unless the weights are int8. Then they are int32 sums of q * w, where
the inputs x were quantized to q = round(x / row_scale) + zero_point (convert.py). Each sum is too
large by zero_point * sum(w) of its column:

    x @ weight = row_scale * column_scale * (accumulator - zero_point * column_sum)
                 + the row's outliers, times their float32 weights, one after the other

The bias and the column scales of a vector are loaded once for all rows of a group.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import LINE_BYTES, WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.activation import ACTIVATIONS
from nanovllm.model.kernels.simd.kernel import Record, kernel
from nanovllm.model.kernels.simd.rows import Rows
from nanovllm.model.kernels.simd.value import Value
from nanovllm.model.kernels.simd.vector import Vectors
from nanovllm.model.kernels.step_record import (
    ACTIVATION_NAMES,
    RESIDUAL,
    ROW_QUANT_BYTES,
    ROW_QUANT_OUTLIERS,
    STORE,
)

_Finish = Callable[[Value, Value], Value]
"""_Finish(sums, out_ptr) -> the vector to store at `out_ptr`, where `sums` includes the bias."""


class _Quantization(NamedTuple):
    """What int8 weights have for a vector of columns."""

    sums: Value
    scales: Value
    outliers: Value
    outlier_weight: Rows


@cache
def make_epilogue(
    target: KernelTarget, weights: str, *, kinds: Sequence[int] = range(RESIDUAL + 1)
) -> Any:
    """Return epilogue: the results of some rows and one panel, from their accumulators.

    kind           STORE, RESIDUAL or the index of an activation; one of `kinds`, because only those
                   are compiled
    accumulators   [rows, width], float32 or int32
    rows           number of rows
    linear         record of the linear layer (step_record.py)
    column         index of the panel's first column
    row_quant_ptr  scale, zero point and outliers of each row, where the weights are int8
    out            output rows from the panel's first column on; they may be the accumulators
    """

    def finish_rows(
        v: Vectors, kind: Value, accumulators: Rows, rows: Value, linear: Record, column: Value,
        row_quant_ptr: Value, out: Rows,
    ) -> None:  # fmt: skip
        def emit_loops(finish: _Finish, *, as_bfloat16: bool) -> None:
            """Emit one kind: a loop over the panel's vectors, and within it one over the rows."""
            with v.range(v.scalar(target.panel_width), v.lanes) as i:
                first = column + i
                is_int8 = weights == "int8"
                quantization = _load_quantization(v, linear, first) if is_int8 else None
                bias = v.load(v.element(linear.bias_ptr, first))
                with v.range(rows) as row:
                    accumulator_ptr = v.element(accumulators.row(row), i)
                    if quantization is None:
                        value = v.load(accumulator_ptr)
                    else:
                        quant_ptr = row_quant_ptr + row * ROW_QUANT_BYTES
                        sums = v.load_words(accumulator_ptr)
                        value = _dequantize(v, sums, quantization, quant_ptr)
                    result_ptr = out.row(row) + i * (2 if as_bfloat16 else WORD_BYTES)
                    value = finish(value + bias, result_ptr)
                    v.store(v.round_bfloat16(value) if as_bfloat16 else value, result_ptr)

        for number in kinds:
            with v.when(kind == number):
                if number == STORE:
                    emit_loops(lambda value, _: value, as_bfloat16=False)
                elif number == RESIDUAL:
                    emit_loops(
                        lambda value, result_ptr: v.load(result_ptr) + value, as_bfloat16=False
                    )
                else:
                    is_bfloat16 = target.input_type(weights) == "bfloat16"
                    emit_loops(_activation(v, ACTIVATION_NAMES[number]), as_bfloat16=is_bfloat16)

    return kernel(target, finish_rows)


@cache
def make_prefetch_output(target: KernelTarget, weights: str) -> Any:
    """Return prefetch_output(kind, rows, out).

    It prefetches, for writing, what `epilogue` stores with the same arguments.
    """
    result_bytes, width = make_result_bytes(target.input_type(weights)), target.panel_width

    def prefetch(v: Vectors, rows: Value, out: Rows, count_bytes: Value) -> None:
        with v.range(rows) as row, v.range(count_bytes, LINE_BYTES) as offset_bytes:
            v.prefetch(out.row(row) + offset_bytes, writes=True)

    prefetch_rows = kernel(target, prefetch)

    @compiled
    def prefetch_output(kind: int, rows: int, out: Any) -> None:
        prefetch_rows(rows, out, width * result_bytes(kind))

    return prefetch_output


@cache
def make_result_bytes(inputs: str) -> Any:
    """Return result_bytes(kind): the bytes of one result, 2 for bfloat16 and 4 for float32."""
    activated_bytes = 2 if inputs == "bfloat16" else WORD_BYTES
    activations = len(ACTIVATION_NAMES)

    @compiled
    def result_bytes(kind: int) -> int:
        return activated_bytes if kind < activations else WORD_BYTES

    return result_bytes


def _activation(v: Vectors, name: str) -> _Finish:
    return lambda value, _: ACTIVATIONS[name](v, value)[0]


def _load_quantization(v: Vectors, linear: Record, column: Value) -> _Quantization:
    """Load what int8 weights have for a vector of columns."""
    outlier_ptr = v.element(linear.outlier_weight_ptr, column)
    return _Quantization(
        sums=v.load_words(v.element(linear.column_sums_ptr, column)),
        scales=v.load(v.element(linear.column_scales_ptr, column)),
        outliers=linear.outliers,
        outlier_weight=Rows(outlier_ptr, linear.panels * (v.target.panel_width * WORD_BYTES)),
    )


def _dequantize(
    v: Vectors, accumulators: Value, columns: _Quantization, row_quant_ptr: Value
) -> Value:
    """Return x @ weight of one row and a vector of columns, from their int32 accumulators.

    `row_quant_ptr` is the address of the row's scale, zero point and outliers.
    """
    row_scale = v.splat(v.load_scalar(row_quant_ptr))
    zero_point = v.splat(v.load_word(row_quant_ptr, WORD_BYTES))
    total = (accumulators - columns.sums * zero_point).to_float()
    outliers_ptr = row_quant_ptr + ROW_QUANT_OUTLIERS * WORD_BYTES

    def add_outlier(k: Value, total: Value) -> Value:
        outlier = v.splat(v.load_scalar(v.element(outliers_ptr, k)))
        return v.fma(outlier, v.load(columns.outlier_weight.row(k)), total)

    scaled = total * (columns.scales * row_scale)
    return v.fold(columns.outliers, 1, scaled, add_outlier)
