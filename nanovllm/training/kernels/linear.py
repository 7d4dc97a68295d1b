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
from nanovllm.model.kernels.simd.kernel import Record, kernel
from nanovllm.model.kernels.simd.value import Value
from nanovllm.model.kernels.simd.vector import Vectors
from nanovllm.training.kernels.matmul.matmul import Matmul, matmul_work, plain_matmul
from nanovllm.training.kernels.matmul.pack import make_sum_and_pack, pack_work, panels_of
from nanovllm.training.kernels.phases import Work, make_entry, split
from nanovllm.training.kernels.records import GRADIENT_ROWS, STRIP

_WEIGHT = panels_of("weight_ptr", steps="d_in", columns="d_out", panels="panels_ptr")
_TRANSPOSED_WEIGHT = panels_of(
    "weight_ptr", steps="d_out", columns="d_in", panels="weight_panels_ptr", is_transposed=True
)
_GRADIENT = panels_of("grad_out_ptr", steps="rows", columns="d_out", panels="grad_panels_ptr")


def make_linear(target: KernelTarget) -> Any:
    """Return the entry of NumpyOperations.linear."""

    @compiled
    def outputs(record: Any) -> Matmul:
        return Matmul(
            rows=record.rows,
            a_ptr=record.x_ptr,
            is_transposed=False,
            b=_WEIGHT(record),
            out_ptr=record.out_ptr,
            slope_ptr=record.slope_ptr if record.slope_ptr != 0 else record.out_ptr,
            kind=record.kind,
            bias_ptr=record.bias_ptr,
            addend_ptr=record.residual_ptr,
        )

    return make_entry("linear", [pack_work(target, _WEIGHT)], [matmul_work(target, outputs)])


def make_linear_backward(target: KernelTarget) -> Any:
    """Return the entry of NumpyOperations.linear_backward."""
    weight_gradient = plain_matmul(
        "x_ptr", _GRADIENT, "grad_weight_ptr", rows="d_in", is_transposed=True, accumulates=True
    )
    input_gradient = plain_matmul("grad_out_ptr", _TRANSPOSED_WEIGHT, "grad_x_ptr", rows="rows")
    return make_entry(
        "linear_backward",
        [_gradient_work(target), pack_work(target, _TRANSPOSED_WEIGHT)],
        [
            matmul_work(target, weight_gradient),
            matmul_work(target, input_gradient),
            Work(split("d_out", STRIP), kernel(target, _add_sums)),
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


def _add_sums(v: Vectors, record: Record, _thread: Value, strip: Value) -> None:
    """Emit grad_bias += the sums of all blocks of rows in order, in a strip of columns."""
    width = v.target.panel_width
    first = strip * STRIP
    count = v.minimum(record.d_out - first, STRIP)
    blocks = (record.rows + GRADIENT_ROWS - 1) // GRADIENT_ROWS
    block_bytes = (record.d_out + width - 1) // width * (width * WORD_BYTES)
    sums_ptr = v.element(record.bias_sums_ptr, first)
    out_ptr = v.element(record.grad_bias_ptr, first)

    def add_columns(columns: Elements) -> None:
        def add_block(block: Value, total: Value) -> Value:
            return total + columns.load(sums_ptr + block * block_bytes)

        total = v.fold(blocks, 1, v.constant(0.0), add_block)
        columns.store(columns.load(out_ptr) + total, out_ptr)

    for_elements(v, count, add_columns)
