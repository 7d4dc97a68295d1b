"""Tiles of training's matmuls (simd/tile.py), which may begin and end with other arrays."""

from typing import Any, NamedTuple

from nanovllm.model.kernels.build.layout import LINE_BYTES, WORD_BYTES
from nanovllm.model.kernels.simd.formats import weight_format
from nanovllm.model.kernels.simd.kernel import kernel_maker
from nanovllm.model.kernels.simd.rows import Rows
from nanovllm.model.kernels.simd.tile import TILE_ROWS, TileInput, emit_tile
from nanovllm.model.kernels.simd.value import Value
from nanovllm.model.kernels.simd.vector import Vectors


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
    result: TileResult, next_rows: Rows,
) -> None:  # fmt: skip
    """Make tile: out[rows, width] = [addend +] (start + A[rows, steps] @ panel[steps, width]).

    Arguments of tile:
        rows: number of rows, up to TILE_ROWS.
        a: rows of A.
        panel_ptr, steps: panel of B [steps, width].
        start_ptr: first values of the sums of each row [width].
        result: rows of out.
        next_rows: rows that are written next, which are prefetched.
    """
    width_bytes = v.target.panel_width * WORD_BYTES
    offsets_bytes = range(0, width_bytes, v.lanes * WORD_BYTES)
    panel_format, panels = weight_format(v.target, "float32"), [Rows(panel_ptr, width_bytes)]

    def emit_rows(height: int) -> None:
        for row in range(height):
            for offset_bytes in range(0, width_bytes, LINE_BYTES):
                v.prefetch(next_rows.row(row), offset_bytes, writes=True)
        start = [v.load(start_ptr, offset) for offset in offsets_bytes]
        sums = emit_tile(v, panel_format, a, panels, steps, [start] * height)
        is_sum = result.adds != 0
        for row, row_sums in enumerate(sums):
            out_ptr, addend_ptr = (
                ptr + result.row_bytes * row for ptr in (result.ptr, result.addend_ptr)
            )
            for offset, total in zip(offsets_bytes, row_sums, strict=True):
                with_addend = v.load(addend_ptr, offset) + total
                v.store(v.where(is_sum, with_addend, total), out_ptr, offset)

    for height in range(1, TILE_ROWS + 1):
        with v.when(rows == height):
            emit_rows(height)
