"""Tiles of training's matmuls (simd/tile.py), which may begin and end with other arrays."""

from typing import Any, NamedTuple

from nanovllm.model.kernels.build.layout import LINE_BYTES, WORD_BYTES
from nanovllm.model.kernels.simd.formats import weight_format
from nanovllm.model.kernels.simd.kernel import kernel_maker
from nanovllm.model.kernels.simd.rows import Rows
from nanovllm.model.kernels.simd.tile import TILE_ROWS, TileInput, emit_tile
from nanovllm.model.kernels.simd.value import Value
from nanovllm.model.kernels.simd.vector import Vectors

GROUP_STEPS = LINE_BYTES // WORD_BYTES
"""Steps between two prefetches: as many as a cache line of a row of A has elements."""


class TileResult(NamedTuple):
    """Rows of the result, and whether an addend of the same stride is added to them.

    The addend is read anyway.
    """

    ptr: Any
    row_bytes: Any
    adds: Any
    addend_ptr: Any


@kernel_maker()
def make_tile(
    v: Vectors, rows: Value, a: TileInput, panel_ptr: Value, steps: Value, start_ptr: Value,
    result: TileResult, c: Rows, out_ptr: Value, next_panel_ptr: Value,
) -> None:  # fmt: skip
    """Make tile: out[rows, width] = [addend +] (start + A[rows, steps] @ panel[steps, width]).

    Arguments of tile:
        rows: number of rows, up to TILE_ROWS.
        a: rows of A.
        panel_ptr, steps: panel of B [steps, width].
        start_ptr: first values of the sums of each row [width].
        result: rows of out.
        c, out_ptr: rows that are written after the steps, and prefetched before; `out_ptr` may be
            that of c.
        next_panel_ptr: part of the next panel that is prefetched, a row for each GROUP_STEPS steps.
            So are the next tile's rows of A.
    """
    width_bytes = v.target.panel_width * WORD_BYTES
    offsets_bytes = range(0, width_bytes, v.lanes * WORD_BYTES)
    panel_format = weight_format(v.target, "float32")

    has_slivers = a.row_bytes == WORD_BYTES
    next_a_ptr = a.ptr + v.where(has_slivers, steps * a.step_bytes, a.row_bytes * TILE_ROWS)
    a_line_bytes = v.where(has_slivers, LINE_BYTES, a.row_bytes)

    def prefetch_rows(written: Rows, height: int) -> None:
        for row in range(height):
            for offset_bytes in range(0, width_bytes, LINE_BYTES):
                v.prefetch(written.row(row), offset_bytes, writes=True)

    def emit_rows(height: int) -> None:
        prefetch_rows(c, height)
        with v.when(out_ptr != c.ptr):
            prefetch_rows(Rows(out_ptr, c.stride_bytes), height)

        def by_row(values: list[Value]) -> list[list[Value]]:
            width = len(offsets_bytes)
            return [values[i : i + width] for i in range(0, len(values), width)]

        def add_group(k: Value, accumulators: list[Value]) -> list[Value]:
            for row in range(height):
                v.prefetch(next_a_ptr + k * a.step_bytes + a_line_bytes * row)
            for offset_bytes in range(0, width_bytes, LINE_BYTES):
                v.prefetch(next_panel_ptr + k * (width_bytes // GROUP_STEPS), offset_bytes)
            group_a = a._replace(ptr=a.ptr + k * a.step_bytes)
            panels = [Rows(panel_ptr + k * width_bytes, width_bytes)]
            count = v.minimum(steps - k, GROUP_STEPS)
            sums = emit_tile(v, panel_format, group_a, panels, count, by_row(accumulators))
            return [total for row_sums in sums for total in row_sums]

        start = [v.load(start_ptr, offset) for offset in offsets_bytes]
        sums = by_row(v.loop(steps, GROUP_STEPS, start * height, add_group))
        is_sum = result.adds != 0
        for row, row_sums in enumerate(sums):
            row_ptr, addend_ptr = (
                ptr + result.row_bytes * row for ptr in (result.ptr, result.addend_ptr)
            )
            for offset, total in zip(offsets_bytes, row_sums, strict=True):
                with_addend = v.load(addend_ptr, offset) + total
                v.store(v.where(is_sum, with_addend, total), row_ptr, offset)

    for height in range(1, TILE_ROWS + 1):
        with v.when(rows == height):
            emit_rows(height)
