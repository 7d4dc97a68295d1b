"""Linear layers: f(x @ weight + bias), and the gradients of x, weight and bias.

linear           pack weight
                 z = x @ weight + bias, slope = f'(z), out = f(z) or residual + z
linear_backward  grad_z = grad_out * slope, packed, with the sums of each block of its rows;
                 pack weight^T
                 grad_weight += x^T @ grad_z; grad_x = grad_z @ weight^T; grad_bias += sums
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.elements import Elements, for_elements
from nanovllm.model.kernels.simd.kernel import Record, kernel
from nanovllm.model.kernels.simd.rows import Rows
from nanovllm.model.kernels.simd.value import Value
from nanovllm.model.kernels.simd.vector import Vectors
from nanovllm.training.kernels.matmul.matmul import Matmul, matmul_work, plain_matmul
from nanovllm.training.kernels.matmul.pack import pack_work, panels_of
from nanovllm.training.kernels.phases import Work, make_operation, split
from nanovllm.training.kernels.records import GRADIENT_ROWS, STRIP

_WEIGHT = panels_of("weight_ptr", steps="d_in", columns="d_out", panels="panels_ptr")
_TRANSPOSED_WEIGHT = panels_of(
    "weight_ptr", steps="d_out", columns="d_in", panels="weight_panels_ptr", is_transposed=True
)
_GRADIENT = panels_of("grad_out_ptr", steps="rows", columns="d_out", panels="grad_panels_ptr")


def make_linear(target: KernelTarget) -> Any:
    """Return the entry of NumpyOperations.linear."""

    @compiled
    def outputs(record: Any) -> Matmul:
        return Matmul(
            rows=record.rows,
            a_ptr=record.x_ptr,
            is_transposed=False,
            b=_WEIGHT(record),
            out_ptr=record.out_ptr,
            slope_ptr=record.slope_ptr if record.slope_ptr != 0 else record.out_ptr,
            kind=record.kind,
            bias_ptr=record.bias_ptr,
            addend_ptr=record.residual_ptr,
        )

    return make_operation("linear", [pack_work(target, _WEIGHT)], [matmul_work(target, outputs)])


def make_linear_backward(target: KernelTarget) -> Any:
    """Return the entry of NumpyOperations.linear_backward."""
    weight_gradient = plain_matmul(
        "x_ptr", _GRADIENT, "grad_weight_ptr", rows="d_in", is_transposed=True, accumulates=True
    )
    input_gradient = plain_matmul("grad_out_ptr", _TRANSPOSED_WEIGHT, "grad_x_ptr", rows="rows")
    pack_gradient = Work(split("rows", GRADIENT_ROWS), kernel(target, _pack_gradient))
    return make_operation(
        "linear_backward",
        [pack_gradient, pack_work(target, _TRANSPOSED_WEIGHT)],
        [
            matmul_work(target, weight_gradient),
            matmul_work(target, input_gradient),
            Work(split("d_out", STRIP), kernel(target, _add_sums)),
        ],
    )


def _pack_gradient(v: Vectors, record: Record, _thread: Value, block: Value) -> None:
    """Emit grad_out *= slope of a block of rows, its panels, and the sums of its columns."""
    width_bytes = v.target.panel_width * WORD_BYTES
    first, d_out = block * GRADIENT_ROWS, record.d_out
    rows = v.minimum(record.rows - first, GRADIENT_ROWS)
    row_bytes, panel_bytes = d_out * WORD_BYTES, record.rows * width_bytes
    source, factors = (
        Rows(v.element(array_ptr, first * d_out), row_bytes)
        for array_ptr in (record.grad_out_ptr, record.slope_ptr)
    )
    panels_ptr = record.grad_panels_ptr + first * width_bytes
    sums_ptr = _block_sums(v, record, block)

    def pack_columns(columns: Sequence[Elements], *, multiplies: bool) -> None:
        """Pack adjacent columns of a panel, a row of them at a time."""
        panel = columns[0].index // v.target.panel_width
        # From the panel's first column on, because `columns` adds its index.
        panel_ptr = panels_ptr + panel * (panel_bytes - width_bytes)

        def add_row(row: Value, totals: list[Value]) -> list[Value]:
            values = [part.load(source.row(row)) for part in columns]
            if multiplies:
                values = [
                    value * part.load(factors.row(row))
                    for value, part in zip(values, columns, strict=True)
                ]
            for value, part in zip(values, columns, strict=True):
                if multiplies:
                    part.store(value, source.row(row))
                part.store(value, panel_ptr + row * width_bytes)
            return [total + value for total, value in zip(totals, values, strict=True)]

        totals = v.loop(rows, 1, [v.constant(0.0)] * len(columns), add_row)
        for total, part in zip(totals, columns, strict=True):
            part.store(total, sums_ptr)

    def pack_all(*, multiplies: bool) -> None:
        width = v.target.panel_width
        whole = d_out // width * width
        with v.range(whole, width) as i:
            vectors = [Elements(v, i + at, is_single=False) for at in range(0, width, v.lanes)]
            pack_columns(vectors, multiplies=multiplies)

        def pack_rest(part: Elements) -> None:
            pack_columns([replace(part, index=whole + part.index)], multiplies=multiplies)

        for_elements(v, d_out - whole, pack_rest)

    last_panel_ptr = panels_ptr + (d_out - 1) // v.target.panel_width * panel_bytes
    with v.range(rows) as row, v.range(v.scalar(v.target.panel_width), v.lanes) as i:
        v.store(v.constant(0.0), v.element(last_panel_ptr + row * width_bytes, i))  # the padding
    with v.when_else(record.slope_ptr != 0) as (multiplies, copies):
        with multiplies:
            pack_all(multiplies=True)
        with copies:
            pack_all(multiplies=False)


def _block_sums(v: Vectors, record: Record, block: Value) -> Value:
    """Return the address of the sums of a block of rows, which are padded to whole panels."""
    width = v.target.panel_width
    padded = (record.d_out + width - 1) // width * width
    return v.element(record.bias_sums_ptr, block * padded)


def _add_sums(v: Vectors, record: Record, _thread: Value, strip: Value) -> None:
    """Emit grad_bias += the sums of all blocks of rows in order, in a strip of columns."""
    first = strip * STRIP
    count = v.minimum(record.d_out - first, STRIP)
    blocks = (record.rows + GRADIENT_ROWS - 1) // GRADIENT_ROWS
    out_ptr = v.element(record.grad_bias_ptr, first)

    def add_columns(columns: Elements) -> None:
        def add_block(block: Value, total: Value) -> Value:
            return total + columns.load(v.element(_block_sums(v, record, block), first))

        total = v.fold(blocks, 1, v.constant(0.0), add_block)
        columns.store(columns.load(out_ptr) + total, out_ptr)

    for_elements(v, count, add_columns)
