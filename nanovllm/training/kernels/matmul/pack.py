"""Copies of matmul operands in the order in which tiles read them.

    panels    B [steps, columns]  ->  [columns / width][steps][width], padded with zero columns
    slivers   A [rows, steps]     ->  [rows / 6][steps][6]

Panels are those of nanovllm/model/kernels/build/packing.py. A transposed operand is transposed by
its copy.
"""

from functools import cache
from typing import Any, NamedTuple

from llvmlite import ir

from nanovllm.model.kernels.build.compiler import compiled, outlined
from nanovllm.model.kernels.build.layout import LINE_BYTES, WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.kernel import kernel
from nanovllm.model.kernels.simd.memory import (
    load_float,
    make_clear,
    make_copy,
    make_scatter,
    store_float,
)
from nanovllm.model.kernels.simd.tile import TILE_ROWS
from nanovllm.model.kernels.simd.value import F32, Value
from nanovllm.model.kernels.simd.vector import Vectors
from nanovllm.training.kernels.phases import Work

SLIVER_STEP_BYTES = TILE_ROWS * WORD_BYTES


class Panels(NamedTuple):
    """A matrix B and its panels.

    source_ptr      B, or its transpose
    row_bytes       bytes from one row of the source to the next
    is_transposed   whether the rows of the source are columns of B
    steps, columns  size of B
    panels_ptr      the panels; where this is 0, nothing is packed
    """

    source_ptr: int
    row_bytes: int
    is_transposed: bool
    steps: int
    columns: int
    panels_ptr: int


def panels_of(
    source: str, *, steps: str, columns: str, panels: str, is_transposed: bool = False
) -> Any:
    """Return describe(record) -> Panels of a C-contiguous matrix; names are fields of a record."""
    row = steps if is_transposed else columns

    @compiled
    def describe(record: Any) -> Panels:
        return Panels(
            record[source], record[row] * WORD_BYTES, is_transposed, record[steps],
            record[columns], record[panels],
        )  # fmt: skip

    return describe


def pack_work(target: KernelTarget, describe: Any) -> Work:
    """Return the work of packing the matrix that describe(record) returns, a panel an item."""
    width = target.panel_width
    pack_panel = _make_pack_panel(target, width)

    @compiled
    def count(record: Any) -> int:
        matrix = describe(record)
        return (matrix.columns + width - 1) // width if matrix.panels_ptr != 0 else 0

    @compiled
    def compute(record: Any, thread: int, item: int) -> None:
        pack_panel(describe(record), item)

    return Work(count, compute)


@cache
def make_pack_panels(target: KernelTarget, width: int) -> Any:
    """Return pack_panels(matrix), which copies a matrix to panels of `width` columns."""
    pack_panel = _make_pack_panel(target, width)

    @compiled
    def pack_panels(matrix: Panels) -> None:
        for panel in range((matrix.columns + width - 1) // width):
            pack_panel(matrix, panel)

    return pack_panels


@cache
def _make_pack_panel(target: KernelTarget, width: int) -> Any:
    """Return pack_panel(matrix, panel), which copies the columns of one panel."""
    width_bytes, lanes = width * WORD_BYTES, target.lanes

    def copy_whole(
        v: Vectors, source_ptr: Value, row_bytes: Value, steps: Value, out_ptr: Value
    ) -> None:
        with v.range(steps) as k:
            from_ptr, to_ptr = source_ptr + k * row_bytes, out_ptr + k * width_bytes
            for offset_bytes in range(0, width_bytes, v.lanes * WORD_BYTES):
                v.store(v.load(from_ptr, offset_bytes), to_ptr, offset_bytes)

    copy_rows, transpose = kernel(target, copy_whole), kernel(target, _transpose_block)
    clear, copy, scatter = make_clear(target), make_copy(target), make_scatter(target)

    @outlined
    def pack_panel(matrix: Panels, panel: int) -> None:
        steps, row_bytes = matrix.steps, matrix.row_bytes
        out_ptr = matrix.panels_ptr + panel * steps * width_bytes
        columns = min(width, matrix.columns - panel * width)
        if columns < width:
            clear(out_ptr, steps * width)
        if not matrix.is_transposed:
            source_ptr = matrix.source_ptr + panel * width_bytes
            if columns == width:
                copy_rows(source_ptr, row_bytes, steps, out_ptr)
            else:
                for k in range(steps):
                    copy(source_ptr + k * row_bytes, out_ptr + k * width_bytes, columns)
            return
        source_ptr = matrix.source_ptr + panel * width * row_bytes
        whole_columns, whole_steps = columns // lanes * lanes, steps // lanes * lanes
        for column in range(columns):
            column_ptr = source_ptr + column * row_bytes
            to_ptr = out_ptr + column * WORD_BYTES
            first = whole_steps if column < whole_columns else 0  # the first step after a square
            if first > 0 and column % lanes == 0:
                transpose(column_ptr, row_bytes, first, to_ptr, width_bytes)
            column_ptr += first * WORD_BYTES
            scatter(column_ptr, to_ptr + first * width_bytes, width_bytes, steps - first)

    return pack_panel


def make_pack_slivers(target: KernelTarget) -> Any:
    """Return pack_slivers, which copies the transpose of the source.

    source_ptr    first element of the first step
    step_bytes    bytes from one step to the next; the rows are adjacent elements
    rows, steps   numbers of rows and of steps
    out_ptr       the slivers [rows / 6][steps][6]; a last one of fewer rows is not padded
    """
    pair = ir.VectorType(F32, 2)
    four = ir.VectorType(F32, 4)

    def copy_six(
        v: Vectors, source_ptr: Value, step_bytes: Value, steps: Value, out_ptr: Value
    ) -> None:
        with v.range(steps) as k:
            from_ptr = source_ptr + k * step_bytes
            to_ptr = out_ptr + k * SLIVER_STEP_BYTES
            v.prefetch(from_ptr, LINE_BYTES)  # the rows are too far apart for the hardware
            for kind, offset_bytes in ((four, 0), (pair, 4 * WORD_BYTES)):
                v.store(v.load_as(kind, from_ptr, offset_bytes), to_ptr, offset_bytes)

    copy_sliver = kernel(target, copy_six)

    @compiled
    def pack_slivers(source_ptr: int, step_bytes: int, rows: int, steps: int, out_ptr: int) -> None:
        for first in range(0, rows, TILE_ROWS):
            from_ptr = source_ptr + first * WORD_BYTES
            to_ptr = out_ptr + first * steps * WORD_BYTES
            if rows - first >= TILE_ROWS:
                copy_sliver(from_ptr, step_bytes, steps, to_ptr)
            else:
                for k in range(steps):
                    for row in range(rows - first):
                        value = load_float(from_ptr + k * step_bytes, row)
                        store_float(to_ptr, k * TILE_ROWS + row, value)

    return pack_slivers


def _transpose_block(
    v: Vectors, in_ptr: Value, in_stride_bytes: Value, columns: Value, out_ptr: Value,
    out_stride_bytes: Value,
) -> None:  # fmt: skip
    """Emit out[columns, lanes] = in[lanes, columns]^T, a square of vectors at a time."""
    with v.range(columns, v.lanes) as column:
        rows = [v.load(v.element(in_ptr + in_stride_bytes * row, column)) for row in range(v.lanes)]
        square_ptr = out_ptr + column * out_stride_bytes
        for row, vector in enumerate(_transpose(v, rows)):
            v.store(vector, square_ptr + out_stride_bytes * row)


def _transpose(v: Vectors, rows: list[Value]) -> list[Value]:
    """Transpose a square: each of log2(lanes) shuffles interleaves the two halves of the rows."""
    half = v.lanes // 2
    masks = [
        [start + lane // 2 + (lane % 2) * v.lanes for lane in range(v.lanes)] for start in (0, half)
    ]
    stages = v.lanes.bit_length() - 1
    for _ in range(stages):
        rows = [
            v.shuffle(rows[pair], rows[pair + half], mask) for pair in range(half) for mask in masks
        ]
    return rows
