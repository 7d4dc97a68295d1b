"""The matmuls of attention, in tiles of up to 6 rows: those of simd/tile.py, also along the
diagonal.

A panel is two vectors wide. It has a row for each step, one after another in memory:

    out[rows, WIDTH] (+)= inputs[rows, steps] @ panel[steps, WIDTH]
"""

from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.formats import weight_format
from nanovllm.model.kernels.simd.kernel import kernel
from nanovllm.model.kernels.simd.rows import Rows, rows_at, rows_from
from nanovllm.model.kernels.simd.tile import HEAD, SQUARE, TAIL, TileInput, emit_tile
from nanovllm.model.kernels.simd.value import Value
from nanovllm.model.kernels.simd.vector import Vectors
from nanovllm.training.kernels.attention.layout import panel_width

_HEIGHTS = (6, 4, 2, 1)


def make_matmul(
    target: KernelTarget, shape: str = SQUARE, *, transposed: bool = False, accumulate: bool = False
) -> Any:
    """Return matmul: out[rows, WIDTH] (+)= inputs[rows, steps] @ panel, in tiles of some rows.

    inputs     Rows of [rows, steps], or of [steps, rows] where `transposed`; for HEAD from the
               first row's first step
    rows       number of rows
    panel_ptr  the panel's row of the first step
    steps      SQUARE: of all rows; HEAD: of the first row, and one less for each following row;
               TAIL: of the first row without its last, and one more for each following row
    out        Rows of the result, to which the product is added where `accumulate`
    """
    step_bytes = panel_width(target) * WORD_BYTES
    panel_format = weight_format(target, "float32")

    def emit_rows(
        v: Vectors, rows: int, inputs: Rows, panel_ptr: Value, steps: Value, out: Rows
    ) -> None:
        offsets_bytes = range(0, step_bytes, v.lanes * WORD_BYTES)
        strides = (inputs.stride_bytes, WORD_BYTES)
        tile_inputs = TileInput(inputs.ptr, *(reversed(strides) if transposed else strides))
        out_ptrs = [out.row(row) for row in range(rows)]
        start = [
            [v.load(out_ptr, offset) if accumulate else v.constant(0.0) for offset in offsets_bytes]
            for out_ptr in out_ptrs
        ]
        panels = [Rows(panel_ptr, step_bytes)]
        sums = emit_tile(v, panel_format, tile_inputs, panels, steps, start, shape=shape)
        for out_ptr, row_sums in zip(out_ptrs, sums, strict=True):
            for offset, total in zip(offsets_bytes, row_sums, strict=True):
                v.store(total, out_ptr, offset)

    def emit_tiles(
        v: Vectors, height: Value, inputs: Rows, panel_ptr: Value, steps: Value, out: Rows
    ) -> None:
        for rows in _HEIGHTS:
            with v.when(height == rows):
                emit_rows(v, rows, inputs, panel_ptr, steps, out)

    tile = kernel(target, emit_tiles)
    is_head, is_tail = shape == HEAD, shape == TAIL

    @compiled
    def matmul(inputs: Any, rows: int, panel_ptr: int, steps: int, out: Any) -> None:
        while rows > 0:
            height = 6 if rows >= 6 else 4 if rows >= 4 else 2 if rows >= 2 else 1
            common = steps - height if is_head else steps
            tile(height, inputs, panel_ptr, common, out)
            if transposed:
                inputs = rows_at(inputs.ptr + height * WORD_BYTES, inputs.stride_bytes)
            else:
                inputs = rows_from(inputs, height)
            out = rows_from(out, height)
            rows -= height
            if is_tail:
                steps += height
            if is_head:
                steps -= height
                inputs = rows_at(inputs.ptr + height * WORD_BYTES, inputs.stride_bytes)
                panel_ptr += height * step_bytes

    return matmul
