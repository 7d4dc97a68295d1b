"""Linear layers: f(x @ weight + bias), and the gradients of x, weight and bias.

linear           pack weight
                 z = x @ weight + bias, slope = f'(z), out = f(z) or residual + z
linear_backward  grad_z = grad_out * slope, packed, with the sums of each block of its rows;
                 pack weight^T
                 grad_weight += x^T @ grad_z; grad_x = grad_z @ weight^T; grad_bias += sums
"""

from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.elements import Elements, for_elements
from nanovllm.model.kernels.simd.kernel import kernel
from nanovllm.model.kernels.simd.value import Value
from nanovllm.model.kernels.simd.vector import Vectors
from nanovllm.training.kernels.matmul.matmul import Matmul, matmul_work, plain_matmul
from nanovllm.training.kernels.matmul.pack import Panels, make_sum_and_pack, pack_work
from nanovllm.training.kernels.phases import Work, make_entry, split
from nanovllm.training.kernels.records import GRADIENT_ROWS


def make_linear(target: KernelTarget) -> Any:
    """Return the entry of NumpyOperations.linear."""

    @compiled
    def weight(record: Any) -> Panels:
        return Panels(
            source_ptr=record.weight_ptr,
            is_transposed=False,
            steps=record.d_in,
            columns=record.d_out,
            panels_ptr=record.panels_ptr,
        )

    @compiled
    def outputs(record: Any) -> Matmul:
        return Matmul(
            rows=record.rows,
            a_ptr=record.x_ptr,
            is_transposed=False,
            b=weight(record),
            out_ptr=record.out_ptr,
            slope_ptr=record.slope_ptr if record.slope_ptr != 0 else record.out_ptr,
            kind=record.kind,
            bias_ptr=record.bias_ptr,
            addend_ptr=record.residual_ptr,
        )

    return make_entry("linear", [pack_work(target, weight)], [matmul_work(target, outputs)])


def make_linear_backward(target: KernelTarget) -> Any:
    """Return the entry of NumpyOperations.linear_backward."""

    @compiled
    def transposed_weight(record: Any) -> Panels:
        return Panels(
            source_ptr=record.weight_ptr,
            is_transposed=True,
            steps=record.d_out,
            columns=record.d_in,
            panels_ptr=record.weight_panels_ptr,
        )

    @compiled
    def output_gradient(record: Any) -> Panels:
        return Panels(
            source_ptr=record.grad_out_ptr,
            is_transposed=False,
            steps=record.rows,
            columns=record.d_out,
            panels_ptr=record.grad_panels_ptr,
        )

    @compiled
    def weight_gradient(record: Any) -> Matmul:
        return plain_matmul(
            rows=record.d_in,
            a_ptr=record.x_ptr,
            is_transposed=True,
            b=output_gradient(record),
            out_ptr=record.grad_weight_ptr,
            addend_ptr=record.grad_weight_ptr,
        )

    @compiled
    def input_gradient(record: Any) -> Matmul:
        return plain_matmul(
            rows=record.rows,
            a_ptr=record.grad_out_ptr,
            is_transposed=False,
            b=transposed_weight(record),
            out_ptr=record.grad_x_ptr,
            addend_ptr=0,
        )

    return make_entry(
        "linear_backward",
        [_gradient_work(target), pack_work(target, transposed_weight)],
        [
            matmul_work(target, weight_gradient),
            matmul_work(target, input_gradient),
            _bias_work(target),
        ],
    )


def _gradient_work(target: KernelTarget) -> Work:
    """Return the work that multiplies grad_out by the slopes, sums its columns, and packs it."""
    width = target.panel_width
    sum_and_pack = make_sum_and_pack(target)

    @compiled
    def compute(record: Any, thread: int, block: int) -> None:
        first = block * GRADIENT_ROWS
        columns = (record.d_out + width - 1) // width * width
        offset_bytes = first * record.d_out * WORD_BYTES
        sum_and_pack(
            record.grad_out_ptr + offset_bytes,
            record.slope_ptr + offset_bytes if record.slope_ptr != 0 else 0,
            min(GRADIENT_ROWS, record.rows - first), record.d_out,
            record.grad_panels_ptr + first * width * WORD_BYTES, record.rows * width * WORD_BYTES,
            record.bias_sums_ptr + block * columns * WORD_BYTES,
        )  # fmt: skip

    return Work(split("rows", GRADIENT_ROWS), compute)


def _bias_work(target: KernelTarget) -> Work:
    """Return the work, of one item, that adds the sums of all blocks of rows to grad_bias."""
    width = target.panel_width
    add_sums = kernel(target, _add_sums)

    @compiled
    def count(record: Any) -> int:
        return 1

    @compiled
    def compute(record: Any, thread: int, item: int) -> None:
        blocks = (record.rows + GRADIENT_ROWS - 1) // GRADIENT_ROWS
        block_bytes = (record.d_out + width - 1) // width * width * WORD_BYTES
        add_sums(record.bias_sums_ptr, blocks, block_bytes, record.d_out, record.grad_bias_ptr)

    return Work(count, compute)


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
