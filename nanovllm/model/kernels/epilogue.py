"""What is done to a row of sums before it is stored: bias, then activation or residual.

    out  = sums + bias
    out  = activation(sums + bias)        stored as the next product takes its rows: bfloat16 where weights are, otherwise float32
    out += sums + bias

Sums of bytes are integers. The bytes of a row have its zero point added to them, so the zero point times the sum of the weight's column
comes off first; what is left is multiplied by the scale of the row and that of the column, and the row's outliers times their weights,
which are float32, are added one after the other.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from nanovllm.model.kernels.activation import ACTIVATIONS
from nanovllm.model.kernels.compiler import compiled
from nanovllm.model.kernels.parameters import ACTIVATION_NAMES, ADD_TO_RESIDUAL, OUTLIER_NOTES, STORE, WORD_BYTES
from nanovllm.model.kernels.target import Target
from nanovllm.model.kernels.vector import I64, Value, Vectors, kernel


@cache
def make_epilogue(target: Target, weights: str) -> Any:
    """epilogue(sums, linear, column, out, notes): one row of one panel, which begins at `column`.

    `out` is where the whole row begins, `notes` those of a row of bytes. Sums of bytes are overwritten.
    """

    def add_bias(v: Vectors, sums: Value, bias: Value, out: Value, finish: Callable[[Value, Value], Value], *, narrow: bool) -> None:
        def vector(i: Value, _: list[Value]) -> list[Value]:
            at = v.address(out, v.times(i, 2 if narrow else WORD_BYTES))
            value = finish(v.add(v.load(v.element(sums, i)), v.load(v.element(bias, i))), at)
            v.store(v.round_bfloat16(value) if narrow else value, at)
            return []

        v.loop(I64(target.panel_width), v.lanes, [], vector)

    def finish_row(v: Vectors, kind: Value, sums: Value, bias: Value, out: Value) -> None:
        for number, name in enumerate(ACTIVATION_NAMES):
            with v.when_equal(kind, number):
                add_bias(v, sums, bias, out, _activate(v, name), narrow=weights == "bfloat16")
        with v.when_equal(kind, STORE):
            add_bias(v, sums, bias, out, lambda value, at: value, narrow=False)
        with v.when_equal(kind, ADD_TO_RESIDUAL):
            add_bias(v, sums, bias, out, lambda value, at: v.add(v.load(at), value), narrow=False)

    finish = kernel(target, finish_row)
    dequantise = _make_dequantise(target)
    is_int8 = weights == "int8"
    activated_bytes = 2 if weights == "bfloat16" else WORD_BYTES
    activations = len(ACTIVATION_NAMES)
    width_bytes = target.panel_width * WORD_BYTES

    @compiled
    def epilogue(sums: int, linear: Any, column: int, out: int, notes: int) -> None:
        at = column * WORD_BYTES
        if is_int8:
            dequantise(
                sums, linear.column_sums + at, linear.column_scales + at, notes, linear.outliers, linear.outlier_weight + at,
                linear.panels * width_bytes,
            )  # fmt: skip
        out += column * activated_bytes if linear.finish < activations else at
        finish(linear.finish, sums, linear.bias + at, out)

    return epilogue


def _activate(v: Vectors, name: str) -> Callable[[Value, Value], Value]:
    return lambda value, at: ACTIVATIONS[name](v, value)


def _make_dequantise(target: Target) -> Any:
    """dequantise(sums, column_sums, scales, notes, outliers, outlier_weight, outlier_stride): a row's integer sums to float32, in place."""

    def dequantise(
        v: Vectors, sums: Value, column_sums: Value, scales: Value, notes: Value, outliers: Value, outlier_weight: Value, outlier_stride: Value
    ) -> None:
        zero_point, row_scale = v.splat(v.load_word(notes, WORD_BYTES)), v.splat(v.load_scalar(notes))

        def vector(i: Value, _: list[Value]) -> list[Value]:
            def add_outlier(k: Value, carried: list[Value]) -> list[Value]:
                outlier = v.splat(v.load_scalar(v.element(v.address(notes, OUTLIER_NOTES * WORD_BYTES), k)))
                weight = v.load(v.element(v.address(outlier_weight, v.builder.mul(k, outlier_stride)), i))
                return [v.fma(outlier, weight, carried[0])]

            at = v.element(sums, i)
            offset = v.builder.mul(v.load_words(v.element(column_sums, i)), zero_point)
            total = v.to_float(v.builder.sub(v.load_words(at), offset))
            value = v.multiply(total, v.multiply(v.load(v.element(scales, i)), row_scale))
            v.store(v.loop(outliers, 1, [value], add_outlier)[0], at)
            return []

        v.loop(I64(target.panel_width), v.lanes, [], vector)

    return kernel(target, dequantise)
