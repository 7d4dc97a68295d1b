"""Transposition of rows in squares of vectors."""

from llvmlite import ir

from nanovllm.model.kernels.simd.vector import I32, I64, Value, Vectors


def transpose_block(
    v: Vectors, in_ptr: Value, in_stride_bytes: Value, columns: Value, out_ptr: Value,
    out_stride_bytes: Value,
) -> None:  # fmt: skip
    """Emit out[columns, lanes] = in[lanes, columns]^T, a square of vectors at a time."""

    def square(column: Value, _: list[Value]) -> list[Value]:
        rows = [
            v.load(v.element(v.address(in_ptr, v.builder.mul(in_stride_bytes, I64(row))), column))
            for row in range(v.lanes)
        ]
        square_ptr = v.address(out_ptr, v.builder.mul(column, out_stride_bytes))
        for row, vector in enumerate(_transpose(v, rows)):
            v.store(vector, v.address(square_ptr, v.builder.mul(out_stride_bytes, I64(row))))
        return []

    v.loop(columns, v.lanes, [], square)


def _transpose(v: Vectors, rows: list[Value]) -> list[Value]:
    """Transpose a square: each of log2(lanes) shuffles interleaves the two halves of the rows."""
    half = v.lanes // 2
    masks = [
        ir.Constant(
            v.i32s,
            [I32(start + lane // 2 + (lane % 2) * v.lanes) for lane in range(v.lanes)],
        )
        for start in (0, half)
    ]
    stages = v.lanes.bit_length() - 1
    for _ in range(stages):
        rows = [
            v.builder.shuffle_vector(rows[pair], rows[pair + half], mask)
            for pair in range(half)
            for mask in masks
        ]
    return rows
