"""Layer normalization and its gradients, a row at a time.

The gradients of gain and bias are sums over all rows. Each item of ITEM_ROWS rows sums its own in
working memory, in the pass that computes grad_x. A second phase adds these sums in the order of the
items, a strip of columns at a time. So no bit depends on which thread computed what.
"""

from typing import Any

from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.elements import map_elements, sum_elements
from nanovllm.model.kernels.simd.kernel import Record, kernel
from nanovllm.model.kernels.simd.value import Value
from nanovllm.model.kernels.simd.vector import Vectors
from nanovllm.training.kernels.phases import Work, item_rows, make_operation, split
from nanovllm.training.kernels.records import ITEM_ROWS, STRIP


def make_layer_norm(target: KernelTarget) -> Any:
    """Return the entry of NumpyOperations.layer_norm."""
    return make_operation(
        "layer_norm", [Work(split("rows", ITEM_ROWS), kernel(target, _normalize))]
    )


def _normalize(v: Vectors, record: Record, _thread: Value, item: Value) -> None:
    """Emit layer normalization of an item's rows."""
    with item_rows(v, record, item, ITEM_ROWS) as row:
        _normalize_row(v, record, row)


def _normalize_row(v: Vectors, record: Record, row: Value) -> None:
    """Emit out = gain * (x - mean) * inverse + bias of one row."""
    d_model = record.d_model
    first = row * d_model
    x_ptr, out_ptr = v.element(record.x_ptr, first), v.element(record.out_ptr, first)
    count = d_model.to_float()
    mean_scalar = sum_elements(v, d_model, (x_ptr,), 1, lambda x: [x])[0] / count
    mean = v.splat(mean_scalar)

    def square(x: Value) -> list[Value]:
        centred = x - mean
        return [centred * centred]

    variance = sum_elements(v, d_model, (x_ptr,), 1, square)[0] / count
    inverse_scalar = 1.0 / v.sqrt(variance + record.epsilon)
    inverse = v.splat(inverse_scalar)

    def normalize(x: Value, gain: Value, bias: Value) -> list[Value]:
        return [v.fma((x - mean) * inverse, gain, bias)]

    inputs = (x_ptr, record.gain_ptr, record.bias_ptr)
    map_elements(v, d_model, inputs, (out_ptr,), normalize)
    v.store(mean_scalar, v.element(record.mean_ptr, row))
    v.store(inverse_scalar, v.element(record.inverse_ptr, row))


def make_layer_norm_backward(target: KernelTarget) -> Any:
    """Return the entry of NumpyOperations.layer_norm_backward; `onto_ptr` may be 0.

    `partial` is [items, 2, d_model], rows padded to whole panels: each item's gradients of gain and
    bias.
    """
    differentiate, add_sums = kernel(target, _differentiate), kernel(target, _add_sums)
    return make_operation(
        "layer_norm_backward",
        [Work(split("rows", ITEM_ROWS), differentiate)],
        [Work(split("d_model", STRIP), add_sums)],
    )


def _partial_sums(v: Vectors, record: Record, item: Value) -> tuple[Value, Value]:
    """Return the addresses of an item's gradients of gain and of bias."""
    width = v.target.panel_width
    row_bytes = (record.d_model + width - 1) // width * (width * WORD_BYTES)
    gain_ptr = record.partial_ptr + item * 2 * row_bytes
    return gain_ptr, gain_ptr + row_bytes


def _add_sums(v: Vectors, record: Record, _thread: Value, strip: Value) -> None:
    """Emit the sums of all items' gradients of gain and bias, in a strip of columns."""
    first = strip * STRIP
    count = v.minimum(record.d_model - first, STRIP)
    totals = (record.grad_gain_ptr, record.grad_bias_ptr)
    with v.range((record.rows + ITEM_ROWS - 1) // ITEM_ROWS) as item:
        for sums_ptr, total_ptr in zip(_partial_sums(v, record, item), totals, strict=True):
            arrays = [v.element(total_ptr, first), v.element(sums_ptr, first)]
            map_elements(v, count, arrays, arrays[:1], lambda total, part: [total + part])


def _differentiate(v: Vectors, record: Record, _thread: Value, item: Value) -> None:
    """Emit grad_x of an item's rows, and the item's gradients of gain and bias."""
    sums = _partial_sums(v, record, item)
    with v.range(record.d_model, v.lanes) as i:
        for sums_ptr in sums:
            v.store(v.constant(0.0), v.element(sums_ptr, i))
    with item_rows(v, record, item, ITEM_ROWS) as row:
        _differentiate_row(v, record, row, *sums)


def _differentiate_row(
    v: Vectors, record: Record, row: Value, gain_sums_ptr: Value, bias_sums_ptr: Value
) -> None:
    """Emit grad_x of one row, and add the row to the gradients of gain and bias."""
    d_model = record.d_model
    grad_ptr, x_ptr, onto_ptr, out_ptr = (
        v.element(array_ptr, row * d_model)
        for array_ptr in (record.grad_out_ptr, record.x_ptr, record.onto_ptr, record.grad_x_ptr)
    )
    mean, inverse = (
        v.splat(v.load_scalar(v.element(array_ptr, row)))
        for array_ptr in (record.mean_ptr, record.inverse_ptr)
    )
    count = d_model.to_float()

    def normalized(x: Value) -> Value:
        return (x - mean) * inverse

    def products(grad: Value, x: Value, gain: Value) -> list[Value]:
        g = grad * gain
        return [g, g * normalized(x)]

    sums = sum_elements(v, d_model, (grad_ptr, x_ptr, record.gain_ptr), 2, products)
    mean_g, mean_gn = (v.splat(total / count) for total in sums)

    def differentiate(
        grad: Value, x: Value, gain: Value, gain_sum: Value, bias_sum: Value, *onto: Value
    ) -> list[Value]:
        n = normalized(x)
        centred = grad * gain - mean_g
        grad_x = inverse * (centred - n * mean_gn)
        grad_x = onto[0] + grad_x if onto else grad_x
        return [grad_x, v.fma(grad, n, gain_sum), bias_sum + grad]

    inputs = [grad_ptr, x_ptr, record.gain_ptr, gain_sums_ptr, bias_sums_ptr]
    outputs = [out_ptr, gain_sums_ptr, bias_sums_ptr]
    with v.when_else(record.onto_ptr != 0) as (adds, stores):
        with adds:
            map_elements(v, d_model, [*inputs, onto_ptr], outputs, differentiate)
        with stores:
            map_elements(v, d_model, inputs, outputs, differentiate)
