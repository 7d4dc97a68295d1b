"""Copies of a head's rows to panels, which the tiles of attention read."""

from typing import Any

from llvmlite import ir

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.move import make_copy, make_scatter
from nanovllm.model.kernels.simd.vector import I32, I64, Value, Vectors, kernel
from nanovllm.training.kernels.attention.layout import panel_width


def make_copy_panels(target: KernelTarget) -> Any:
    """Return copy_panels: panels of `width` columns of some rows.

    in_ptr, in_stride_bytes  rows of a head
    rows, head_dim           their shape
    out_ptr                  receives [panels, rows, width]; columns after head_dim stay as they are
    """
    width = panel_width(target)
    copy = make_copy(target)

    @compiled
    def copy_panels(
        in_ptr: int, in_stride_bytes: int, rows: int, head_dim: int, out_ptr: int
    ) -> None:
        for first in range(0, head_dim, width):
            columns = min(width, head_dim - first)
            for row in range(rows):
                copy(in_ptr + row * in_stride_bytes + first * WORD_BYTES, out_ptr, columns)
                out_ptr += width * WORD_BYTES

    return copy_panels


def make_transpose_panels(target: KernelTarget) -> Any:
    """Return transpose_panels: panels of `width` rows each, transposed.

    in_ptr, in_stride_bytes  rows of a head
    rows, head_dim           their shape
    out_ptr                  receives [panels, head_dim, width]; columns after the last row stay
                             as they are
    """
    width = panel_width(target)
    block = kernel(target, _transpose_block)
    scatter = make_scatter(target)
    lanes = target.lanes

    @compiled
    def transpose_panels(
        in_ptr: int, in_stride_bytes: int, rows: int, head_dim: int, out_ptr: int
    ) -> None:
        whole_dims = head_dim // lanes * lanes
        for first in range(0, rows, lanes):
            panel_ptr = out_ptr + (first // width * head_dim * width + first % width) * WORD_BYTES
            count = min(lanes, rows - first)
            first_dim = 0
            if count == lanes:
                block(in_ptr, in_stride_bytes, whole_dims, panel_ptr, width * WORD_BYTES)
                first_dim = whole_dims
            for row in range(count):
                scatter(
                    in_ptr + row * in_stride_bytes + first_dim * WORD_BYTES,
                    panel_ptr + (first_dim * width + row) * WORD_BYTES,
                    width * WORD_BYTES,
                    head_dim - first_dim,
                )
            in_ptr += lanes * in_stride_bytes

    return transpose_panels


def _transpose_block(
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
