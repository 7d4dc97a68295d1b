"""The end of a matmul's tile: from the sums z of a piece to C, and to an activation f of z.

    linear             C = [addend +] z
    an activation f    C = f'(z), out = f(z)    where z has the addend too

The backward pass needs f'(z) and not z. Both functions share an exp, which LLVM computes once. If C
and out are one array, f(z) remains.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.forward.activation import ACTIVATIONS
from nanovllm.model.kernels.simd.vector import I32, I64, Value, Vectors, kernel
from nanovllm.training.kernels.activation_gradient import ACTIVATION_GRADIENTS
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
        is_sum = v.builder.icmp_signed("!=", adds, I64(0))

        def finish_row(number: int, row: Value, *, is_whole: bool) -> None:
            row_sums_ptr = v.element(sums_ptr, v.times(row, width))
            offset_bytes = v.builder.mul(row, row_bytes)
            row_addend_ptr, row_c_ptr, row_out_ptr = (
                v.address(base_ptr, offset_bytes) for base_ptr in (addend_ptr, c_ptr, out_ptr)
            )

            def finish(
                i: Value, load: Callable[[Value], Value], store: Callable[..., None]
            ) -> None:
                total, addend = (load(v.element(p, i)) for p in (row_sums_ptr, row_addend_ptr))
                value = v.builder.select(is_sum, v.add(addend, total), total)
                row_c_element = v.element(row_c_ptr, i)
                if number == IDENTITY:
                    store(value, row_c_element)
                else:
                    activated = ACTIVATIONS[KINDS[number]](v, value)
                    store(ACTIVATION_GRADIENTS[KINDS[number]](v, value), row_c_element)
                    store(activated, v.element(row_out_ptr, i))

            def finish_element(i: Value, _: list[Value]) -> list[Value]:
                finish(i, lambda base: v.splat(v.load_scalar(base)), partial(_store_first, v))
                return []

            if is_whole:
                for vector in range(target.panel_vectors):
                    finish(I64(vector * v.lanes), v.load, v.store)
            else:
                v.loop(columns, 1, [], finish_element)

        def finish_rows(number: int, *, is_whole: bool) -> None:
            def one_row(row: Value, _: list[Value]) -> list[Value]:
                finish_row(number, row, is_whole=is_whole)
                return []

            v.loop(rows, 1, [], one_row)

        has_whole_vectors = v.builder.icmp_signed("==", columns, I64(width))
        for number in range(len(KINDS)):
            with v.when_equal(kind, number), v.builder.if_else(has_whole_vectors) as (whole, part):
                with whole:
                    finish_rows(number, is_whole=True)
                with part:
                    finish_rows(number, is_whole=False)

    return kernel(target, finish_tile)


def _store_first(v: Vectors, vector: Value, base: Value) -> None:
    v.store(v.builder.extract_element(vector, I32(0)), base)
