"""What is done to sums before they are stored: bias, then activation or residual.

    out  = sums + bias
    out  = activation(sums + bias)        stored as the next product takes its rows: bfloat16 where weights are, otherwise float32
    out += sums + bias

Sums of bytes are integers. The bytes of a row have its zero point added to them, so the zero point times the sum of the weight's column
comes off first; what is left is multiplied by the scale of the row and that of the column, and the row's outliers times their weights,
which are float32, are added one after the other.

Rows of a panel are finished together, along short panels a few right after their tiles, while their sums are in the first-level cache: vector by
vector, so that bias and scales are read once for all of them, and everything from sum to result stays in registers.
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
    ADD_TO_RESIDUAL,
    NOTES_BYTES,
    OUTLIER_NOTES,
    STORE,
    WORD_BYTES,
)


@cache
def make_epilogue(
    target: KernelTarget, weights: str, *, kinds: Sequence[int] = range(ADD_TO_RESIDUAL + 1)
) -> Any:
    """epilogue(sums, rows, linear, column, out, out_stride, notes): some rows of one panel, which begins at `column`.

    `sums` are as wide as the panel. `out` is where the first of the rows begins, `notes` those of rows of bytes. May be in place. There is code
    for the `kinds` of linear.finish alone.
    """
    finish, result_bytes = (
        kernel(target, _make_finish_rows(target, weights, kinds)),
        _make_result_bytes(weights),
    )
    width_bytes = target.panel_width * WORD_BYTES

    @compiled
    def epilogue(
        sums: int, rows: int, linear: Any, column: int, out: int, out_stride: int, notes: int
    ) -> None:
        at = column * WORD_BYTES
        finish(
            linear.finish, sums, rows, linear.bias + at, out + column * result_bytes(linear), out_stride, notes,
            linear.column_sums + at, linear.column_scales + at, linear.outliers, linear.outlier_weight + at, linear.panels * width_bytes,
        )  # fmt: skip

    return epilogue


@cache
def make_expect(target: KernelTarget, weights: str) -> Any:
    """expect(rows, linear, column, out, out_stride): ask for what `epilogue` of the same arguments is going to write."""
    result_bytes, width = _make_result_bytes(weights), target.panel_width

    def ask(v: Vectors, rows: Value, out: Value, out_stride: Value, count: Value) -> None:
        def row(number: Value, _: list[Value]) -> list[Value]:
            def line(offset: Value, _: list[Value]) -> list[Value]:
                v.prefetch(v.address(out, v.builder.mul(number, out_stride), offset), writes=True)
                return []

            v.loop(count, LINE_BYTES, [], line)
            return []

        v.loop(rows, 1, [], row)

    ask_for_rows = kernel(target, ask)

    @compiled
    def expect(rows: int, linear: Any, column: int, out: int, out_stride: int) -> None:
        ask_for_rows(
            rows, out + column * result_bytes(linear), out_stride, width * result_bytes(linear)
        )

    return expect


def _make_result_bytes(weights: str) -> Any:
    """result_bytes(linear): of one result of a linear layer, of which only activated ones may be narrow."""
    activated_bytes = 2 if weights == "bfloat16" else WORD_BYTES
    activations = len(ACTIVATION_NAMES)

    @compiled
    def result_bytes(linear: Any) -> int:
        return activated_bytes if linear.finish < activations else WORD_BYTES

    return result_bytes


def _make_finish_rows(
    target: KernelTarget, weights: str, kinds: Sequence[int]
) -> Callable[..., None]:
    def finish_rows(
        v: Vectors,
        kind: Value,
        sums: Value,
        rows: Value,
        bias: Value,
        out: Value,
        out_stride: Value,
        notes: Value,
        column_sums: Value,
        column_scales: Value,
        outliers: Value,
        outlier_weight: Value,
        outlier_stride: Value,
    ) -> None:
        def finish_all(finish: Callable[[Value, Value], Value], *, narrow: bool) -> None:
            def vector(i: Value, _: list[Value]) -> list[Value]:
                weight = v.element(outlier_weight, i)
                columns = (
                    (v.load_words(v.element(column_sums, i)), v.load(v.element(column_scales, i)))
                    if weights == "int8"
                    else ()
                )
                vector_bias = v.load(v.element(bias, i))

                def row(number: Value, _: list[Value]) -> list[Value]:
                    value = v.element(
                        v.address(sums, v.times(number, target.panel_width * WORD_BYTES)), i
                    )
                    if columns:
                        value = _dequantize(
                            v,
                            value,
                            columns,
                            v.address(notes, v.times(number, NOTES_BYTES)),
                            outliers,
                            weight,
                            outlier_stride,
                        )
                    else:
                        value = v.load(value)
                    at = v.address(
                        out,
                        v.builder.mul(number, out_stride),
                        v.times(i, 2 if narrow else WORD_BYTES),
                    )
                    value = finish(v.add(value, vector_bias), at)
                    v.store(v.round_bfloat16(value) if narrow else value, at)
                    return []

                v.loop(rows, 1, [], row)
                return []

            v.loop(I64(target.panel_width), v.lanes, [], vector)

        for number in kinds:
            with v.when_equal(kind, number):
                if number == STORE:
                    finish_all(lambda value, at: value, narrow=False)
                elif number == ADD_TO_RESIDUAL:
                    finish_all(lambda value, at: v.add(v.load(at), value), narrow=False)
                else:
                    finish_all(_activate(v, ACTIVATION_NAMES[number]), narrow=weights == "bfloat16")

    return finish_rows


def _activate(v: Vectors, name: str) -> Callable[[Value, Value], Value]:
    return lambda value, at: ACTIVATIONS[name](v, value)


def _dequantize(
    v: Vectors,
    sums: Value,
    columns: tuple[Value, ...],
    notes: Value,
    outliers: Value,
    weight: Value,
    weight_stride: Value,
) -> Value:
    """A vector of a row's integer sums as float32, its outliers times their weights among them."""
    column_sums, column_scales = columns
    row_scale, zero_point = v.splat(v.load_scalar(notes)), v.splat(v.load_word(notes, WORD_BYTES))
    total = v.to_float(v.builder.sub(v.load_words(sums), v.builder.mul(column_sums, zero_point)))

    def add_outlier(k: Value, carried: list[Value]) -> list[Value]:
        outlier = v.splat(v.load_scalar(v.element(v.address(notes, OUTLIER_NOTES * WORD_BYTES), k)))
        return [
            v.fma(outlier, v.load(v.address(weight, v.builder.mul(k, weight_stride))), carried[0])
        ]

    return v.loop(
        outliers, 1, [v.multiply(total, v.multiply(column_scales, row_scale))], add_outlier
    )[0]
