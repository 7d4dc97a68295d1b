"""Copies of a head's rows to panels, which the tiles of attention read."""

from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.kernel import kernel
from nanovllm.model.kernels.simd.move import make_copy, make_scatter
from nanovllm.training.kernels.attention.layout import panel_width
from nanovllm.training.kernels.transpose import transpose_block


@compiled
def count_heads(record: Any) -> int:
    """Return the items of attention: the heads of all sequences."""
    return record.batch * record.heads


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
    block = kernel(target, transpose_block)
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
