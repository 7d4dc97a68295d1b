"""The end of a linear layer, applied to its accumulators while they are in the first-level cache.

    STORE          out  = x @ weight + bias
    an activation  out  = activation(x @ weight + bias)
    RESIDUAL       out += x @ weight + bias

Results are float32, with one exception: where the weights are bfloat16, activated results are
bfloat16, because they are the input rows of the next linear layer. Input rows of int8 are quantized
by an operation of their own (forward.py).

Accumulators are x @ weight, unless the weights are int8. Then they are int32 sums of q * w, where
the inputs x were quantized to q = round(x / row_scale) + zero_point (convert.py). Each sum is too
large by zero_point * sum(w) of its column:

    x @ weight = row_scale * column_scale * (accumulator - zero_point * column_sum)
                 + the row's outliers, times their float32 weights, one after the other

The bias and the column scales of a vector are loaded once for all rows of a group.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import LINE_BYTES, WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.activation import ACTIVATIONS
from nanovllm.model.kernels.simd.kernel import kernel
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


@cache
def make_epilogue(
    target: KernelTarget, weights: str, *, kinds: Sequence[int] = range(RESIDUAL + 1)
) -> Any:
    """Return epilogue: the results of some rows and one panel, from their accumulators.

    kind               STORE, RESIDUAL or the index of an activation; one of `kinds`, because only
                       those are compiled
    accumulators_ptr   [rows, width], float32 or int32
    rows               number of rows
    linear             record of the linear layer (step_record.py)
    column             index of the panel's first column in the output rows
    row_quant_ptr      scale, zero point and outliers of each row, where the weights are int8
    out_ptr            output rows from their column 0, though only the panel's columns are written
    out_stride_bytes   bytes from one output row to the next

    The results may take the place of the accumulators.
    """
    finish_rows = kernel(target, _make_finish_rows(target, weights, kinds))
    result_bytes = _make_result_bytes(weights)
    width_bytes = target.panel_width * WORD_BYTES

    @compiled
    def epilogue(
        kind: int, accumulators_ptr: int, rows: int, linear: Any, column: int, row_quant_ptr: int,
        out_ptr: int, out_stride_bytes: int,
    ) -> None:  # fmt: skip
        column_bytes = column * WORD_BYTES
        finish_rows(
            kind, accumulators_ptr, rows, linear.bias_ptr + column_bytes, row_quant_ptr,
            out_ptr + column * result_bytes(kind), out_stride_bytes,
            linear.column_sums_ptr + column_bytes, linear.column_scales_ptr + column_bytes,
            linear.outliers, linear.outlier_weight_ptr + column_bytes, linear.panels * width_bytes,
        )  # fmt: skip

    return epilogue


@cache
def make_prefetch_output(target: KernelTarget, weights: str) -> Any:
    """Return prefetch_output(kind, rows, column, out_ptr, out_stride_bytes).

    It prefetches, for writing, what `epilogue` stores with the same arguments.
    """
    result_bytes, width = _make_result_bytes(weights), target.panel_width

    def prefetch(
        v: Vectors, rows: Value, out_ptr: Value, out_stride_bytes: Value, count_bytes: Value
    ) -> None:
        with v.range(rows) as row, v.range(count_bytes, LINE_BYTES) as offset_bytes:
            row_bytes = row * out_stride_bytes
            v.prefetch(out_ptr + row_bytes + offset_bytes, writes=True)

    prefetch_rows = kernel(target, prefetch)

    @compiled
    def prefetch_output(
        kind: int, rows: int, column: int, out_ptr: int, out_stride_bytes: int
    ) -> None:
        number_bytes = result_bytes(kind)
        prefetch_rows(rows, out_ptr + column * number_bytes, out_stride_bytes, width * number_bytes)

    return prefetch_output


def _make_result_bytes(weights: str) -> Any:
    """Return result_bytes(kind): the bytes of one result, 2 for bfloat16 and 4 for float32."""
    activated_bytes = 2 if weights == "bfloat16" else WORD_BYTES
    activations = len(ACTIVATION_NAMES)

    @compiled
    def result_bytes(kind: int) -> int:
        return activated_bytes if kind < activations else WORD_BYTES

    return result_bytes


def _make_finish_rows(
    target: KernelTarget, weights: str, kinds: Sequence[int]
) -> Callable[..., None]:
    """Return finish_rows, which emits the epilogue of each kind and a choice between them.

    Its arguments are those of `epilogue`. The addresses are of the panel's first column, and
    `outlier_stride_bytes` is from one outlier's weights to the next outlier's.
    """

    def finish_rows(
        v: Vectors, kind: Value, accumulators_ptr: Value, rows: Value, bias_ptr: Value,
        row_quant_ptr: Value, out_ptr: Value, out_stride_bytes: Value, column_sums_ptr: Value,
        column_scales_ptr: Value, outliers: Value, outlier_weight_ptr: Value,
        outlier_stride_bytes: Value,
    ) -> None:  # fmt: skip
        def emit_loops(finish: _Finish, *, as_bfloat16: bool) -> None:
            """Emit one kind: a loop over the panel's vectors, and within it one over the rows."""
            with v.range(v.scalar(target.panel_width), v.lanes) as i:
                weight_ptr = v.element(outlier_weight_ptr, i)
                column_quant: tuple[Value, ...] = ()
                if weights == "int8":
                    column_sums = v.load_words(v.element(column_sums_ptr, i))
                    column_quant = column_sums, v.load(v.element(column_scales_ptr, i))
                bias = v.load(v.element(bias_ptr, i))

                with v.range(rows) as index:
                    row_bytes = index * (target.panel_width * WORD_BYTES)
                    accumulator_ptr = v.element(accumulators_ptr + row_bytes, i)
                    if column_quant:
                        quant_ptr = row_quant_ptr + index * ROW_QUANT_BYTES
                        value = _dequantize(
                            v,
                            v.load_words(accumulator_ptr),
                            column_quant,
                            quant_ptr,
                            outliers,
                            weight_ptr,
                            outlier_stride_bytes,
                        )
                    else:
                        value = v.load(accumulator_ptr)
                    result_ptr = (
                        out_ptr + index * out_stride_bytes + i * (2 if as_bfloat16 else WORD_BYTES)
                    )
                    value = finish(value + bias, result_ptr)
                    v.store(v.round_bfloat16(value) if as_bfloat16 else value, result_ptr)

        for number in kinds:
            with v.when(kind == number):
                if number == STORE:
                    emit_loops(lambda value, _: value, as_bfloat16=False)
                elif number == RESIDUAL:
                    emit_loops(
                        lambda value, result_ptr: v.load(result_ptr) + value,
                        as_bfloat16=False,
                    )
                else:
                    emit_loops(
                        _activation(v, ACTIVATION_NAMES[number]), as_bfloat16=weights == "bfloat16"
                    )

    return finish_rows


def _activation(v: Vectors, name: str) -> _Finish:
    return lambda value, _: ACTIVATIONS[name](v, value)[0]


def _dequantize(
    v: Vectors,
    accumulators: Value,
    column_quant: tuple[Value, ...],
    row_quant_ptr: Value,
    outliers: Value,
    outlier_weight_ptr: Value,
    outlier_stride_bytes: Value,
) -> Value:
    """Return x @ weight of one row and a vector of columns, from their int32 accumulators.

    column_quant          the columns' int32 sums and float32 scales
    row_quant_ptr         scale, zero point and outliers of the row
    outliers              number of outliers
    outlier_weight_ptr    these columns of the first outlier's float32 weights
    outlier_stride_bytes  bytes to the next outlier's weights
    """
    column_sums, column_scales = column_quant
    row_scale = v.splat(v.load_scalar(row_quant_ptr))
    zero_point = v.splat(v.load_word(row_quant_ptr, WORD_BYTES))
    total = (accumulators - column_sums * zero_point).to_float()
    outliers_ptr = row_quant_ptr + ROW_QUANT_OUTLIERS * WORD_BYTES

    def add_outlier(k: Value, total: Value) -> Value:
        outlier = v.splat(v.load_scalar(v.element(outliers_ptr, k)))
        weight_ptr = outlier_weight_ptr + k * outlier_stride_bytes
        return v.fma(outlier, v.load(weight_ptr), total)

    scaled = total * (column_scales * row_scale)
    return v.fold(outliers, 1, scaled, add_outlier)
