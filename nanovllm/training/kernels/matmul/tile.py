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

from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import LINE_BYTES, WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.kernel import kernel
from nanovllm.model.kernels.simd.value import Value
from nanovllm.model.kernels.simd.vector import Vectors

TILE_ROWS = 6


def _make_tile(target: KernelTarget, rows: int) -> Any:
    """Return tile: out[rows, width] = [addend +] (start + A[rows, steps] @ panel[steps, width]).

    a_ptr, a_row_bytes, a_step_bytes  A, and bytes from one row, and one step, to the next
    panel_ptr                         panel of B [steps, width]
    steps                             number of steps
    start_ptr                         first values of the sums of each row [width]
    out_ptr, out_row_bytes            result, and bytes from one row to the next
    adds, addend_ptr, addend_row_bytes
                                      whether to add an addend [rows, width], which is read anyway
    c_ptr, c_row_bytes                rows that are written next, which are prefetched
    """
    width_bytes = target.panel_width * WORD_BYTES

    def tile(
        v: Vectors, a_ptr: Value, a_row_bytes: Value, a_step_bytes: Value, panel_ptr: Value,
        steps: Value, start_ptr: Value, out_ptr: Value, out_row_bytes: Value, adds: Value,
        addend_ptr: Value, addend_row_bytes: Value, c_ptr: Value, c_row_bytes: Value,
    ) -> None:  # fmt: skip
        def row_pointers(base_ptr: Value, row_bytes: Value) -> list[Value]:
            return [base_ptr + row_bytes * row for row in range(rows)]

        for c_row_ptr in row_pointers(c_ptr, c_row_bytes):
            for offset_bytes in range(0, width_bytes, LINE_BYTES):
                v.prefetch(c_row_ptr, offset_bytes, writes=True)
        row_ptrs = row_pointers(a_ptr, a_row_bytes)
        offsets = range(0, width_bytes, v.lanes * WORD_BYTES)

        def step(k: Value, sums: list[Value]) -> list[Value]:
            b_ptr = panel_ptr + k * width_bytes
            b = [v.load(b_ptr, offset_bytes) for offset_bytes in offsets]
            a_bytes = k * a_step_bytes
            a = [v.splat(v.load_scalar(row_ptr + a_bytes)) for row_ptr in row_ptrs]
            products = [(x, y) for x in a for y in b]
            return [v.fma(x, y, total) for (x, y), total in zip(products, sums, strict=True)]

        start = [v.load(start_ptr, offset_bytes) for offset_bytes in offsets]
        sums = iter(v.loop(steps, 1, start * rows, step))
        is_sum = adds != 0
        out_ptrs = row_pointers(out_ptr, out_row_bytes)
        addend_ptrs = row_pointers(addend_ptr, addend_row_bytes)
        for out_row_ptr, addend_row_ptr in zip(out_ptrs, addend_ptrs, strict=True):
            for offset_bytes in offsets:
                total = next(sums)
                sum_with_addend = v.load(addend_row_ptr, offset_bytes) + total
                value = v.where(is_sum, sum_with_addend, total)
                v.store(value, out_row_ptr, offset_bytes)

    return kernel(target, tile)


def make_tile(target: KernelTarget) -> Any:
    """Return tile, of `rows` <= 6 rows; its first argument is their number."""
    tile1, tile2, tile3, tile4, tile5, tile6 = (
        _make_tile(target, rows) for rows in range(1, TILE_ROWS + 1)
    )

    @compiled
    def tile(
        rows: int, a_ptr: int, a_row_bytes: int, a_step_bytes: int, panel_ptr: int, steps: int,
        start_ptr: int, out_ptr: int, out_row_bytes: int, adds: int, addend_ptr: int,
        addend_row_bytes: int, c_ptr: int, c_row_bytes: int,
    ) -> None:  # fmt: skip
        if rows == 6:
            tile6(
                a_ptr, a_row_bytes, a_step_bytes, panel_ptr, steps, start_ptr, out_ptr,
                out_row_bytes, adds, addend_ptr, addend_row_bytes, c_ptr, c_row_bytes,
            )  # fmt: skip
        elif rows == 5:
            tile5(
                a_ptr, a_row_bytes, a_step_bytes, panel_ptr, steps, start_ptr, out_ptr,
                out_row_bytes, adds, addend_ptr, addend_row_bytes, c_ptr, c_row_bytes,
            )  # fmt: skip
        elif rows == 4:
            tile4(
                a_ptr, a_row_bytes, a_step_bytes, panel_ptr, steps, start_ptr, out_ptr,
                out_row_bytes, adds, addend_ptr, addend_row_bytes, c_ptr, c_row_bytes,
            )  # fmt: skip
        elif rows == 3:
            tile3(
                a_ptr, a_row_bytes, a_step_bytes, panel_ptr, steps, start_ptr, out_ptr,
                out_row_bytes, adds, addend_ptr, addend_row_bytes, c_ptr, c_row_bytes,
            )  # fmt: skip
        elif rows == 2:
            tile2(
                a_ptr, a_row_bytes, a_step_bytes, panel_ptr, steps, start_ptr, out_ptr,
                out_row_bytes, adds, addend_ptr, addend_row_bytes, c_ptr, c_row_bytes,
            )  # fmt: skip
        else:
            tile1(
                a_ptr, a_row_bytes, a_step_bytes, panel_ptr, steps, start_ptr, out_ptr,
                out_row_bytes, adds, addend_ptr, addend_row_bytes, c_ptr, c_row_bytes,
            )  # fmt: skip

    return tile
