"""The end of a matmul's tile: from the sums z of a piece to C, and to an activation f of z.

    linear             C = [addend +] z
    an activation f    C = f'(z), out = f(z)    where z has the addend too

The backward pass needs f'(z) and not z. Both functions share an exp, which LLVM computes once. If C
and out are one array, f(z) remains.
"""

from typing import Any

from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.activation import ACTIVATIONS
from nanovllm.model.kernels.simd.elements import Elements
from nanovllm.model.kernels.simd.kernel import kernel
from nanovllm.model.kernels.simd.value import Value
from nanovllm.model.kernels.simd.vector import Vectors
from nanovllm.training.kernels.records import IDENTITY, KINDS


def make_epilogue(target: KernelTarget) -> Any:
    """Return epilogue, of one tile.

    kind              kind of the activation (records.KINDS)
    adds, addend_ptr  whether to add an addend, which is read anyway
    sums_ptr          result of the tile [rows, width]
    rows, columns     numbers of rows, and of columns that are not padding
    c_ptr             C from the tile's first element
    out_ptr           f(z) from the tile's first element, unused for `linear`
    row_bytes         bytes from one row of the addend, of C and of f(z) to the next
    """
    width = target.panel_width

    def finish_tile(
        v: Vectors, kind: Value, adds: Value, addend_ptr: Value, sums_ptr: Value, rows: Value,
        columns: Value, c_ptr: Value, out_ptr: Value, row_bytes: Value,
    ) -> None:  # fmt: skip
        is_sum = adds != 0

        def finish_row(number: int, row: Value, *, is_whole: bool) -> None:
            row_sums_ptr = v.element(sums_ptr, row * width)
            offset_bytes = row * row_bytes
            row_addend_ptr, row_c_ptr, row_out_ptr = (
                base_ptr + offset_bytes for base_ptr in (addend_ptr, c_ptr, out_ptr)
            )

            def finish(elements: Elements) -> None:
                total, addend = elements.load(row_sums_ptr), elements.load(row_addend_ptr)
                value = v.where(is_sum, addend + total, total)
                if number == IDENTITY:
                    elements.store(value, row_c_ptr)
                else:
                    activated, slope = ACTIVATIONS[KINDS[number]](v, value)
                    elements.store(slope, row_c_ptr)
                    elements.store(activated, row_out_ptr)

            if is_whole:
                for vector in range(target.panel_vectors):
                    finish(Elements(v, v.scalar(vector * v.lanes), is_single=False))
            else:
                with v.range(columns) as i:
                    finish(Elements(v, i, is_single=True))

        def finish_rows(number: int, *, is_whole: bool) -> None:
            with v.range(rows) as row:
                finish_row(number, row, is_whole=is_whole)

        has_whole_vectors = columns == width
        for number in range(len(KINDS)):
            with v.when(kind == number), v.when_else(has_whole_vectors) as (whole, part):
                with whole:
                    finish_rows(number, is_whole=True)
                with part:
                    finish_rows(number, is_whole=False)

    return kernel(target, finish_tile)
