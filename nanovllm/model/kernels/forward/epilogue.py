"""The end of a linear layer, applied to its accumulators while they are in the first-level cache.

    STORE          out  = x @ weight + bias
    an activation  out  = activation(x @ weight + bias)
    RESIDUAL       out += x @ weight + bias
    a gate         out  = activation(gate) * up, where gate and up are the first and the second half
                   of the columns of each panel of x @ weight + bias

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

from nanovllm.model.activation import GATES
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
    GATED,
    NUM_EPILOGUES,
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
    target: KernelTarget, weights: str, *, kinds: Sequence[int] = range(NUM_EPILOGUES)
) -> Any:
    """Return epilogue: the results of some rows and one panel, from their accumulators.

    kind           number of an epilogue, see step_record.py; one of `kinds`, because only those are
                   compiled
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
                load_sums = columns(i)
                with v.range(rows) as row:
                    result_ptr = out.row(row) + i * (2 if as_bfloat16 else WORD_BYTES)
                    value = finish(load_sums(row), result_ptr)
                    v.store(v.round_bfloat16(value) if as_bfloat16 else value, result_ptr)

        def emit_gate(finish: _Finish, *, as_bfloat16: bool) -> None:
            """Emit the same for a gate, whose results are half as many."""
            half = target.panel_width // 2
            with v.range(v.scalar(half), v.lanes) as i:
                load_gate, load_up = columns(i), columns(i + half)
                with v.range(rows) as row:
                    result_ptr = out.row(row) + i * (2 if as_bfloat16 else WORD_BYTES)
                    value = finish(load_gate(row), result_ptr) * load_up(row)
                    v.store(v.round_bfloat16(value) if as_bfloat16 else value, result_ptr)

        def columns(i: Value) -> Callable[[Value], Value]:
            """Load what a vector of columns has; return load_sums(row), x @ weight + bias."""
            first = column + i
            quantization = _load_quantization(v, linear, first) if weights == "int8" else None
            bias = v.load(v.element(linear.bias_ptr, first))

            def load_sums(row: Value) -> Value:
                accumulator_ptr = v.element(accumulators.row(row), i)
                if quantization is None:
                    return v.load(accumulator_ptr) + bias
                quant_ptr = row_quant_ptr + row * ROW_QUANT_BYTES
                return _dequantize(v, v.load_words(accumulator_ptr), quantization, quant_ptr) + bias

            return load_sums

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
                    is_gate = number >= GATED
                    name = GATES[number - GATED] if is_gate else ACTIVATION_NAMES[number]
                    emit = emit_gate if is_gate else emit_loops
                    emit(_activation(v, name), as_bfloat16=is_bfloat16)

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
    """Return result_bytes(kind): the bytes of results to a column of the weight.

    They are 2 for bfloat16 and 4 for float32; of a gate half of that.
    """
    activated_bytes = 2 if inputs == "bfloat16" else WORD_BYTES
    activations = len(ACTIVATION_NAMES)

    @compiled
    def result_bytes(kind: int) -> int:
        if kind >= GATED:
            return activated_bytes // 2
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
