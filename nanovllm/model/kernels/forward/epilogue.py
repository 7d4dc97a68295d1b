"""The end of a linear layer, applied to accumulators before anything is stored.

    STORE          out  = accumulators + bias
    an activation  out  = activation(accumulators + bias)
    RESIDUAL       out += accumulators + bias

Activated results are stored in the type that the next linear layer takes: bfloat16 where the
weights are bfloat16, otherwise float32. All other results are float32.

int8 accumulators are integers. The inputs x were quantized to q = x / row_scale + zero_point
(convert.py), so sum(q * w) is too large by zero_point * sum(w) of the column:

    x @ weight = row_scale * column_scale * (accumulator - zero_point * column_sum)
                 + the row's outliers, times their float32 weights, one after the other

Rows go through the epilogue in groups while their accumulators are in the first-level cache. It
loads the bias and the column scales of a vector once for all rows of the group.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import LINE_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.forward.activation import ACTIVATIONS
from nanovllm.model.kernels.simd.vector import I64, Value, Vectors, kernel
from nanovllm.model.kernels.step_record import (
    ACTIVATION_NAMES,
    RESIDUAL,
    ROW_QUANT_BYTES,
    ROW_QUANT_OUTLIERS,
    STORE,
    WORD_BYTES,
)

Finish = Callable[[Value, Value], Value]
"""From a vector (bias added) and the address of its output to the vector that is stored."""


@cache
def make_epilogue(
    target: KernelTarget, weights: str, *, kinds: Sequence[int] = range(RESIDUAL + 1)
) -> Any:
    """Return epilogue, for some rows of one panel. Only the epilogues in `kinds` are compiled.

    kind                       STORE, RESIDUAL or the number of an activation
    accumulators_ptr           [rows, width], float32 or int32
    rows                       number of rows
    linear                     record of the linear layer
    column                     the panel's first column
    row_quant_ptr              the rows' quantization, where the weights are int8
    out_ptr, out_stride_bytes  the whole output rows; may be the accumulators themselves
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

    It prefetches the output of `epilogue` with the same arguments.
    """
    result_bytes, width = _make_result_bytes(weights), target.panel_width

    def prefetch(
        v: Vectors, rows: Value, out_ptr: Value, out_stride_bytes: Value, count_bytes: Value
    ) -> None:
        def prefetch_row(row: Value, _: list[Value]) -> list[Value]:
            def prefetch_line(offset_bytes: Value, _: list[Value]) -> list[Value]:
                row_bytes = v.builder.mul(row, out_stride_bytes)
                v.prefetch(v.address(out_ptr, row_bytes, offset_bytes), writes=True)
                return []

            v.loop(count_bytes, LINE_BYTES, [], prefetch_line)
            return []

        v.loop(rows, 1, [], prefetch_row)

    prefetch_rows = kernel(target, prefetch)

    @compiled
    def prefetch_output(
        kind: int, rows: int, column: int, out_ptr: int, out_stride_bytes: int
    ) -> None:
        number_bytes = result_bytes(kind)
        prefetch_rows(rows, out_ptr + column * number_bytes, out_stride_bytes, width * number_bytes)

    return prefetch_output


def _make_result_bytes(weights: str) -> Any:
    """Return result_bytes(kind): the bytes of one result of an epilogue."""
    activated_bytes = 2 if weights == "bfloat16" else WORD_BYTES
    activations = len(ACTIVATION_NAMES)

    @compiled
    def result_bytes(kind: int) -> int:
        return activated_bytes if kind < activations else WORD_BYTES

    return result_bytes


def _make_finish_rows(
    target: KernelTarget, weights: str, kinds: Sequence[int]
) -> Callable[..., None]:
    def finish_rows(
        v: Vectors, kind: Value, accumulators_ptr: Value, rows: Value, bias_ptr: Value,
        row_quant_ptr: Value, out_ptr: Value, out_stride_bytes: Value, column_sums_ptr: Value,
        column_scales_ptr: Value, outliers: Value, outlier_weight_ptr: Value,
        outlier_stride_bytes: Value,
    ) -> None:  # fmt: skip
        def finish_all(finish: Finish, *, as_bfloat16: bool) -> None:
            """Emit the loops over the panel's vectors and the rows."""

            def vector(i: Value, _: list[Value]) -> list[Value]:
                weight_ptr = v.element(outlier_weight_ptr, i)
                columns: tuple[Value, ...] = ()
                if weights == "int8":
                    column_sums = v.load_words(v.element(column_sums_ptr, i))
                    columns = column_sums, v.load(v.element(column_scales_ptr, i))
                bias = v.load(v.element(bias_ptr, i))

                def row(number: Value, _: list[Value]) -> list[Value]:
                    row_bytes = v.times(number, target.panel_width * WORD_BYTES)
                    accumulator_ptr = v.element(v.address(accumulators_ptr, row_bytes), i)
                    if columns:
                        quant_ptr = v.address(row_quant_ptr, v.times(number, ROW_QUANT_BYTES))
                        value = _dequantize(
                            v,
                            v.load_words(accumulator_ptr),
                            columns,
                            quant_ptr,
                            outliers,
                            weight_ptr,
                            outlier_stride_bytes,
                        )
                    else:
                        value = v.load(accumulator_ptr)
                    result_ptr = v.address(
                        out_ptr,
                        v.builder.mul(number, out_stride_bytes),
                        v.times(i, 2 if as_bfloat16 else WORD_BYTES),
                    )
                    value = finish(v.add(value, bias), result_ptr)
                    v.store(v.round_bfloat16(value) if as_bfloat16 else value, result_ptr)
                    return []

                v.loop(rows, 1, [], row)
                return []

            v.loop(I64(target.panel_width), v.lanes, [], vector)

        for number in kinds:
            with v.when_equal(kind, number):
                if number == STORE:
                    finish_all(lambda value, _: value, as_bfloat16=False)
                elif number == RESIDUAL:
                    finish_all(
                        lambda value, result_ptr: v.add(v.load(result_ptr), value),
                        as_bfloat16=False,
                    )
                else:
                    finish_all(
                        _activation(v, ACTIVATION_NAMES[number]), as_bfloat16=weights == "bfloat16"
                    )

    return finish_rows


def _activation(v: Vectors, name: str) -> Finish:
    return lambda value, _: ACTIVATIONS[name](v, value)


def _dequantize(
    v: Vectors,
    accumulators: Value,
    columns: tuple[Value, ...],
    row_quant_ptr: Value,
    outliers: Value,
    outlier_weight_ptr: Value,
    outlier_stride_bytes: Value,
) -> Value:
    """Return a vector of a row's int32 accumulators as float32, with its outliers added."""
    column_sums, column_scales = columns
    row_scale = v.splat(v.load_scalar(row_quant_ptr))
    zero_point = v.splat(v.load_word(row_quant_ptr, WORD_BYTES))
    total = v.to_float(v.builder.sub(accumulators, v.builder.mul(column_sums, zero_point)))
    outliers_ptr = v.address(row_quant_ptr, ROW_QUANT_OUTLIERS * WORD_BYTES)

    def add_outlier(k: Value, carried: list[Value]) -> list[Value]:
        outlier = v.splat(v.load_scalar(v.element(outliers_ptr, k)))
        weight_ptr = v.address(outlier_weight_ptr, v.builder.mul(k, outlier_stride_bytes))
        return [v.fma(outlier, v.load(weight_ptr), carried[0])]

    scaled = v.multiply(total, v.multiply(column_scales, row_scale))
    return v.loop(outliers, 1, [scaled], add_outlier)[0]
