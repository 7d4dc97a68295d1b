"""Linear layers: f(x @ weight + bias), and the gradients of x, weight and bias.

Both operations are phases (threads/phase.py): first the operands are packed, then the threads share
the items of the matmuls.

    linear           pack weight
                     z = x @ weight + bias, slope = f'(z), out = f(z) or residual + z
    linear_backward  grad_z = grad_out * slope, packed, with the sums of each block of its rows;
                     pack weight^T
                     grad_weight += x^T @ grad_z; grad_x = grad_z @ weight^T; grad_bias += sums
"""

from functools import cache
from typing import Any

from nanovllm.model.kernels.build.compiler import compiled, outlined
from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.elements import Elements, for_elements
from nanovllm.model.kernels.simd.kernel import kernel
from nanovllm.model.kernels.simd.move import record_at
from nanovllm.model.kernels.simd.value import Value
from nanovllm.model.kernels.simd.vector import Vectors
from nanovllm.model.kernels.threads.barrier import take_item
from nanovllm.model.kernels.threads.phase import ABORTED, end_phase
from nanovllm.training.kernels.matmul.matmul import make_matmul
from nanovllm.training.kernels.matmul.pack import make_pack_panel, make_sum_and_pack
from nanovllm.training.kernels.records import GRADIENT_ROWS, LINEAR, RECORDS, SCRATCH_FLOATS

_linear_record_at = record_at(RECORDS["linear"])
_backward_record_at = record_at(RECORDS["linear_backward"])
_SCRATCH_BYTES = SCRATCH_FLOATS * WORD_BYTES


@cache
def make_pack_phase(target: KernelTarget) -> Any:
    """Return pack_phase, which packs a matrix into panels and ends its phase.

    record, thread     of the operation
    phase              address of the phase
    source_ptr         rows of float32
    row_bytes          bytes from one row to the next
    transposed         whether to pack the transpose: the rows are columns of B
    steps, columns     size of B
    panels_ptr         result

    It returns the address of the next phase, or ABORTED.
    """
    width = target.panel_width
    pack_panel = make_pack_panel(target)

    @compiled
    def pack_phase(
        record: Any, thread: int, phase: int, source_ptr: int, row_bytes: int, transposed: int,
        steps: int, columns: int, panels_ptr: int,
    ) -> int:  # fmt: skip
        panels = (columns + width - 1) // width
        done = 0
        panel = take_item(phase)
        while panel < panels:
            pack_panel(
                source_ptr, row_bytes, transposed, steps, columns, panel,
                panels_ptr + panel * steps * width * WORD_BYTES,
            )  # fmt: skip
            done += 1
            panel = take_item(phase)
        return int(end_phase(record, thread, phase, done, panels))

    return pack_phase


def make_linear(target: KernelTarget) -> Any:
    """Return the entry linear(record_ptr, thread); see NumpyOperations.linear.

    The memory of the slope also holds the sums of z. Without a slope, it is that of `out`.
    """
    pack_phase = make_pack_phase(target)
    count_items, multiply = make_matmul(target)

    @compiled
    def linear(record_ptr: int, thread: int) -> None:
        record = _linear_record_at(record_ptr)
        rows, d_in, d_out = record.rows, record.d_in, record.d_out
        phase = pack_phase(
            record, thread, record.phases_ptr, record.weight_ptr, d_out * WORD_BYTES, 0,
            d_in, d_out, record.panels_ptr,
        )  # fmt: skip
        if phase == ABORTED:
            return
        items = count_items(rows, d_out, record.threads, False)
        item = take_item(phase)
        while item < items:
            multiply(
                record.threads, item, rows, d_out, d_in,
                record.x_ptr, d_in * WORD_BYTES, WORD_BYTES, record.panels_ptr,
                record.slope_ptr, record.out_ptr,
                record.bias_ptr, record.kind, record.residual_ptr,
                record.scratch_ptr + thread * _SCRATCH_BYTES,
            )  # fmt: skip
            item = take_item(phase)

    return linear


def make_linear_backward(target: KernelTarget) -> Any:
    """Return the entry linear_backward(record_ptr, thread); see NumpyOperations.linear_backward."""
    width = target.panel_width
    pack_panel = make_pack_panel(target)
    sum_and_pack = make_sum_and_pack(target)
    add_sums = kernel(target, _add_sums)
    count_items, multiply = make_matmul(target)

    @compiled
    def linear_backward(record_ptr: int, thread: int) -> None:
        record = _backward_record_at(record_ptr)
        phase = record.phases_ptr
        blocks = (record.rows + GRADIENT_ROWS - 1) // GRADIENT_ROWS
        items = blocks + (record.d_in + width - 1) // width
        done = 0
        item = take_item(phase)
        while item < items:
            if item < blocks:
                prepare_gradient(record, item)
            else:
                panel = item - blocks
                pack_panel(
                    record.weight_ptr, record.d_out * WORD_BYTES, 1, record.d_out, record.d_in,
                    panel, record.weight_panels_ptr + panel * record.d_out * width * WORD_BYTES,
                )  # fmt: skip
            done += 1
            item = take_item(phase)
        phase = end_phase(record, thread, phase, done, items)
        if phase != ABORTED:
            multiply_all(record, phase, record.scratch_ptr + thread * _SCRATCH_BYTES)

    @outlined
    def prepare_gradient(record: Any, block: int) -> None:
        """Multiply a block of rows of grad_out by the slopes, sum the columns, and pack it."""
        first = block * GRADIENT_ROWS
        rows = min(GRADIENT_ROWS, record.rows - first)
        columns = (record.d_out + width - 1) // width * width
        offset_bytes = first * record.d_out * WORD_BYTES
        slope_ptr = record.slope_ptr + offset_bytes if record.slope_ptr != 0 else 0
        sum_and_pack(
            record.grad_out_ptr + offset_bytes, slope_ptr, rows, record.d_out,
            record.grad_panels_ptr + first * width * WORD_BYTES, record.rows * width * WORD_BYTES,
            record.bias_sums_ptr + block * columns * WORD_BYTES,
        )  # fmt: skip

    @compiled
    def multiply_all(record: Any, phase: int, scratch_ptr: int) -> None:
        rows, d_in, d_out = record.rows, record.d_in, record.d_out
        weight_items = count_items(d_in, d_out, record.threads, True)
        items = weight_items + count_items(rows, d_in, record.threads, False)
        columns = (d_out + width - 1) // width * width
        item = take_item(phase)
        while item <= items:
            if item < weight_items:
                multiply(
                    record.threads, item, d_in, d_out, rows,
                    record.x_ptr, WORD_BYTES, d_in * WORD_BYTES, record.grad_panels_ptr,
                    record.grad_weight_ptr, 0, 0, LINEAR, record.grad_weight_ptr, scratch_ptr,
                )  # fmt: skip
            elif item < items:
                multiply(
                    record.threads, item - weight_items, rows, d_in, d_out,
                    record.grad_out_ptr, d_out * WORD_BYTES, WORD_BYTES, record.weight_panels_ptr,
                    record.grad_x_ptr, 0, 0, LINEAR, 0, scratch_ptr,
                )  # fmt: skip
            else:
                add_sums(
                    record.bias_sums_ptr, (rows + GRADIENT_ROWS - 1) // GRADIENT_ROWS,
                    columns * WORD_BYTES, d_out, record.grad_bias_ptr,
                )  # fmt: skip
            item = take_item(phase)

    return linear_backward


def _add_sums(
    v: Vectors, sums_ptr: Value, blocks: Value, block_bytes: Value, count: Value, out_ptr: Value
) -> None:
    """Emit out += the sum over blocks of sums[block, count], added in the order of the blocks."""

    def add_columns(columns: Elements) -> None:
        total = v.fold(
            blocks,
            1,
            v.constant(0.0),
            lambda block, total: total + columns.load(sums_ptr + block * block_bytes),
        )
        columns.store(columns.load(out_ptr) + total, out_ptr)

    for_elements(v, count, add_columns)
