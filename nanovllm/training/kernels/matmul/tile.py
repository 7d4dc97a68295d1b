"""The innermost loop of a matmul: up to 6 rows of A times a panel of B, all sums in registers.

A tile is that of nanovllm/model/kernels/forward/tiles.py, for operands that may be transposed. A
step of it takes one element of each row of A, and a row of the panel:

    panel row | w0 w1 |   a few vectors
    A, row 0  | a0 |      broadcast to a vector
    ...
    A, row 5  | a5 |      sums[row][vector] += a[row] * w[vector]

Each sum is one chain of multiply-adds in the order of the steps, so its bits depend on neither the
height of the tile nor the thread.
"""

from typing import Any, NamedTuple

from nanovllm.model.kernels.build.layout import LINE_BYTES, WORD_BYTES
from nanovllm.model.kernels.simd.kernel import kernel_maker
from nanovllm.model.kernels.simd.rows import Rows
from nanovllm.model.kernels.simd.value import Value
from nanovllm.model.kernels.simd.vector import Vectors

TILE_ROWS = 6


class TileInput(NamedTuple):
    """Rows of A: the address, and the bytes from one row and from one step to the next."""

    ptr: Any
    row_bytes: Any
    step_bytes: Any


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

    def emit_tile(height: int) -> None:
        def row_pointers(base_ptr: Value, row_bytes: Value) -> list[Value]:
            return [base_ptr + row_bytes * row for row in range(height)]

        for c_row_ptr in row_pointers(next_rows.ptr, next_rows.stride_bytes):
            for offset_bytes in range(0, width_bytes, LINE_BYTES):
                v.prefetch(c_row_ptr, offset_bytes, writes=True)
        row_ptrs = row_pointers(a.ptr, a.row_bytes)
        offsets = range(0, width_bytes, v.lanes * WORD_BYTES)

        def step(k: Value, sums: list[Value]) -> list[Value]:
            b_ptr = panel_ptr + k * width_bytes
            b = [v.load(b_ptr, offset_bytes) for offset_bytes in offsets]
            a_bytes = k * a.step_bytes
            values = [v.splat(v.load_scalar(row_ptr + a_bytes)) for row_ptr in row_ptrs]
            products = [(x, y) for x in values for y in b]
            return [v.fma(x, y, total) for (x, y), total in zip(products, sums, strict=True)]

        start = [v.load(start_ptr, offset_bytes) for offset_bytes in offsets]
        sums = iter(v.loop(steps, 1, start * height, step))
        is_sum = result.adds != 0
        out_ptrs = row_pointers(result.ptr, result.row_bytes)
        addend_ptrs = row_pointers(result.addend_ptr, result.row_bytes)
        for out_row_ptr, addend_row_ptr in zip(out_ptrs, addend_ptrs, strict=True):
            for offset_bytes in offsets:
                total = next(sums)
                sum_with_addend = v.load(addend_row_ptr, offset_bytes) + total
                value = v.where(is_sum, sum_with_addend, total)
                v.store(value, out_row_ptr, offset_bytes)

    for height in range(1, TILE_ROWS + 1):
        with v.when(rows == height):
            emit_tile(height)
