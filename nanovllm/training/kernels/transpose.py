"""Transposition of rows in squares of vectors."""

from nanovllm.model.kernels.simd.value import Value
from nanovllm.model.kernels.simd.vector import Vectors


def transpose_block(
    v: Vectors, in_ptr: Value, in_stride_bytes: Value, columns: Value, out_ptr: Value,
    out_stride_bytes: Value,
) -> None:  # fmt: skip
    """Emit out[columns, lanes] = in[lanes, columns]^T, a square of vectors at a time."""
    with v.range(columns, v.lanes) as column:
        rows = [v.load(v.element(in_ptr + in_stride_bytes * row, column)) for row in range(v.lanes)]
        square_ptr = out_ptr + column * out_stride_bytes
        for row, vector in enumerate(_transpose(v, rows)):
            v.store(vector, square_ptr + out_stride_bytes * row)


def _transpose(v: Vectors, rows: list[Value]) -> list[Value]:
    """Transpose a square: each of log2(lanes) shuffles interleaves the two halves of the rows."""
    half = v.lanes // 2
    masks = [
        [start + lane // 2 + (lane % 2) * v.lanes for lane in range(v.lanes)] for start in (0, half)
    ]
    stages = v.lanes.bit_length() - 1
    for _ in range(stages):
        rows = [
            v.shuffle(rows[pair], rows[pair + half], mask) for pair in range(half) for mask in masks
        ]
    return rows
