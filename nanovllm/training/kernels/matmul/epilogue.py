"""The end of a matmul's tile: from the sums of a piece to C, and to f(C) of a linear layer.

    STORE              C = sums               or C += sums
    an activation f    C = [C +] sums + bias     out = f(C)

f is stored beside C because the backward pass needs both. Without an activation, `linear`, only C
is stored.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.forward.activation import ACTIVATIONS
from nanovllm.model.kernels.simd.vector import I32, I64, Value, Vectors, kernel
from nanovllm.training.kernels.records import KINDS, LINEAR, STORE


def make_epilogue(target: KernelTarget) -> Any:
    """Return epilogue, of one tile.

    kind           STORE or the kind of an activation (records.KINDS)
    adds           whether C has a part of the sum already
    sums_ptr       result of the tile [rows, width]
    rows, columns  numbers of rows, and of columns that are not padding
    bias_ptr       bias of the first column, unused for STORE
    c_ptr          C from the tile's first element
    out_ptr        f(C) from the tile's first element, used for activations other than `linear`
    row_bytes      bytes from one row of C, and of f(C), to the next
    """
    width = target.panel_width

    def finish_tile(
        v: Vectors, kind: Value, adds: Value, sums_ptr: Value, rows: Value, columns: Value,
        bias_ptr: Value, c_ptr: Value, out_ptr: Value, row_bytes: Value,
    ) -> None:  # fmt: skip
        is_sum = v.builder.icmp_signed("!=", adds, I64(0))

        def finish_row(number: int, row: Value, *, is_whole: bool) -> None:
            row_sums_ptr = v.element(sums_ptr, v.times(row, width))
            offset_bytes = v.builder.mul(row, row_bytes)
            row_c_ptr, row_out_ptr = (
                v.address(c_ptr, offset_bytes),
                v.address(out_ptr, offset_bytes),
            )

            def finish(
                i: Value, load: Callable[[Value], Value], store: Callable[..., None]
            ) -> None:
                here_ptr, total = v.element(row_c_ptr, i), load(v.element(row_sums_ptr, i))
                value = v.builder.select(is_sum, v.add(load(here_ptr), total), total)
                if number != STORE:
                    value = v.add(value, load(v.element(bias_ptr, i)))
                store(value, here_ptr)
                if number not in {STORE, LINEAR}:
                    result = ACTIVATIONS[KINDS[number]](v, value)
                    store(result, v.element(row_out_ptr, i))

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
