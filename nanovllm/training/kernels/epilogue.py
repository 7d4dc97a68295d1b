"""The end of a matmul's tile: from the sums of a piece to C, and to f(C) of a linear layer.

    STORE              C = sums               or C += sums
    an activation f    C = [C +] sums + bias     out = f(C)

f is stored beside C because the backward pass needs both. Without an activation, `linear`, only C
is stored.
"""

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

    def finish_rows(
        v: Vectors, kind: Value, adds: Value, sums_ptr: Value, rows: Value, columns: Value,
        bias_ptr: Value, c_ptr: Value, out_ptr: Value, row_bytes: Value,
    ) -> None:  # fmt: skip
        is_sum = v.builder.icmp_signed("!=", adds, I64(0))

        def add(total: Value, c: Value) -> Value:
            return v.builder.select(is_sum, v.add(c, total), total)

        def emit_rows(number: int, count: int | None) -> None:
            """Emit one kind for whole vectors, or for `columns` single elements (None)."""

            def element(row: Value, i: Value, *, is_vector: bool) -> None:
                here_ptr = v.address(c_ptr, v.builder.mul(row, row_bytes))
                result_ptr = v.element(here_ptr, i)
                load = v.load if is_vector else v.load_scalar
                index = v.builder.add(v.times(row, width), i)
                value = add(load(v.element(sums_ptr, index)), load(result_ptr))
                if number != STORE:
                    value = v.add(value, load(v.element(bias_ptr, i)))
                v.store(value, result_ptr)
                if number not in {STORE, LINEAR}:
                    vector = value if is_vector else v.splat(value)
                    result = ACTIVATIONS[KINDS[number]](v, vector)
                    if not is_vector:
                        result = v.builder.extract_element(result, I32(0))
                    out_row_ptr = v.address(out_ptr, v.builder.mul(row, row_bytes))
                    v.store(result, v.element(out_row_ptr, i))

            def one_row(row: Value, _: list[Value]) -> list[Value]:
                if count is not None:
                    for vector in range(count):
                        element(row, I64(vector * v.lanes), is_vector=True)
                else:

                    def one(i: Value, _: list[Value]) -> list[Value]:
                        element(row, i, is_vector=False)
                        return []

                    v.loop(columns, 1, [], one)
                return []

            v.loop(rows, 1, [], one_row)

        is_whole = v.builder.icmp_signed("==", columns, I64(width))
        for number in range(len(KINDS)):
            with v.when_equal(kind, number), v.builder.if_else(is_whole) as (whole, part):
                with whole:
                    emit_rows(number, target.panel_vectors)
                with part:
                    emit_rows(number, None)

    return kernel(target, finish_rows)
