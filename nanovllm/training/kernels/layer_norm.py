"""Layer normalization and its gradients, a row at a time.

The gradients of gain and bias are sums over all rows. Each item of ITEM_ROWS rows sums its own in
working memory, in the pass that computes grad_x. A second phase adds these sums in the order of the
items, a strip of columns at a time. So no bit depends on which thread computed what.
"""

from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.elements import map_elements, sum_elements
from nanovllm.model.kernels.simd.kernel import kernel
from nanovllm.model.kernels.simd.move import make_add, make_clear
from nanovllm.model.kernels.simd.value import F32, I32, Value
from nanovllm.model.kernels.simd.vector import Vectors
from nanovllm.training.kernels.phases import Work, make_entry, split
from nanovllm.training.kernels.records import ITEM_ROWS, STRIP


def make_layer_norm(target: KernelTarget) -> Any:
    """Return the entry of NumpyOperations.layer_norm."""
    normalize = kernel(target, _normalize)

    @compiled
    def compute(record: Any, thread: int, item: int) -> None:
        for row in range(item * ITEM_ROWS, min((item + 1) * ITEM_ROWS, record.rows)):
            offset_bytes = row * record.d_model * WORD_BYTES
            normalize(
                record.x_ptr + offset_bytes, record.gain_ptr, record.bias_ptr,
                record.out_ptr + offset_bytes, record.mean_ptr + row * WORD_BYTES,
                record.inverse_ptr + row * WORD_BYTES, record.d_model, record.epsilon_bits,
            )  # fmt: skip

    return make_entry("layer_norm", [Work(split("rows", ITEM_ROWS), compute)])


def _normalize(
    v: Vectors, x_ptr: Value, gain_ptr: Value, bias_ptr: Value, out_ptr: Value, mean_ptr: Value,
    inverse_ptr: Value, d_model: Value, epsilon_bits: Value,
) -> None:  # fmt: skip
    """Emit out = gain * (x - mean) * inverse + bias of one row."""
    count = d_model.to_float()
    mean_scalar = sum_elements(v, d_model, (x_ptr,), 1, lambda x: [x])[0] / count
    mean = v.splat(mean_scalar)

    def square(x: Value) -> list[Value]:
        centred = x - mean
        return [centred * centred]

    variance = sum_elements(v, d_model, (x_ptr,), 1, square)[0] / count
    inverse_scalar = 1.0 / v.sqrt(variance + epsilon_bits.trunc(I32).bitcast(F32))
    inverse = v.splat(inverse_scalar)

    def normalize(x: Value, gain: Value, bias: Value) -> list[Value]:
        return [v.fma((x - mean) * inverse, gain, bias)]

    map_elements(v, d_model, (x_ptr, gain_ptr, bias_ptr), (out_ptr,), normalize)
    v.store(mean_scalar, mean_ptr)
    v.store(inverse_scalar, inverse_ptr)


def make_layer_norm_backward(target: KernelTarget) -> Any:
    """Return the entry of NumpyOperations.layer_norm_backward; `onto_ptr` may be 0.

    `partial` is [items, 2, d_model], rows padded to whole panels: each item's gradients of gain and
    bias.
    """
    width = target.panel_width
    differentiate = kernel(target, _differentiate)
    clear, add = make_clear(target), make_add(target)
    count_items = split("rows", ITEM_ROWS)

    @compiled
    def sums_row_bytes(record: Any) -> int:
        return (record.d_model + width - 1) // width * width * WORD_BYTES

    @compiled
    def differentiate_rows(record: Any, thread: int, item: int) -> None:
        gain_sums_ptr = record.partial_ptr + item * 2 * sums_row_bytes(record)
        bias_sums_ptr = gain_sums_ptr + sums_row_bytes(record)
        clear(gain_sums_ptr, record.d_model)
        clear(bias_sums_ptr, record.d_model)
        for row in range(item * ITEM_ROWS, min((item + 1) * ITEM_ROWS, record.rows)):
            offset_bytes = row * record.d_model * WORD_BYTES
            differentiate(
                record.grad_out_ptr + offset_bytes, record.x_ptr + offset_bytes, record.gain_ptr,
                record.mean_ptr + row * WORD_BYTES, record.inverse_ptr + row * WORD_BYTES,
                record.onto_ptr + offset_bytes if record.onto_ptr != 0 else 0,
                record.grad_x_ptr + offset_bytes, gain_sums_ptr, bias_sums_ptr, record.d_model,
            )  # fmt: skip

    @compiled
    def add_sums(record: Any, thread: int, strip: int) -> None:
        first = strip * STRIP
        count, offset_bytes = min(STRIP, record.d_model - first), first * WORD_BYTES
        for item in range(count_items(record)):
            sums_ptr = record.partial_ptr + item * 2 * sums_row_bytes(record) + offset_bytes
            add(sums_ptr, record.grad_gain_ptr + offset_bytes, count)
            add(sums_ptr + sums_row_bytes(record), record.grad_bias_ptr + offset_bytes, count)

    return make_entry(
        "layer_norm_backward",
        [Work(count_items, differentiate_rows)],
        [Work(split("d_model", STRIP), add_sums)],
    )


def _differentiate(
    v: Vectors, grad_ptr: Value, x_ptr: Value, gain_ptr: Value, mean_ptr: Value,
    inverse_ptr: Value, onto_ptr: Value, out_ptr: Value, gain_sums_ptr: Value,
    bias_sums_ptr: Value, d_model: Value,
) -> None:  # fmt: skip
    """Emit grad_x of one row, and add the row to the gradients of gain and bias."""
    mean, inverse = (v.splat(v.load_scalar(base_ptr)) for base_ptr in (mean_ptr, inverse_ptr))
    count = d_model.to_float()

    def normalized(x: Value) -> Value:
        return (x - mean) * inverse

    def products(grad: Value, x: Value, gain: Value) -> list[Value]:
        g = grad * gain
        return [g, g * normalized(x)]

    sums = sum_elements(v, d_model, (grad_ptr, x_ptr, gain_ptr), 2, products)
    mean_g, mean_gn = (v.splat(total / count) for total in sums)

    def differentiate(
        grad: Value, x: Value, gain: Value, gain_sum: Value, bias_sum: Value, *onto: Value
    ) -> list[Value]:
        n = normalized(x)
        centred = grad * gain - mean_g
        grad_x = inverse * (centred - n * mean_gn)
        grad_x = onto[0] + grad_x if onto else grad_x
        return [grad_x, v.fma(grad, n, gain_sum), bias_sum + grad]

    inputs = [grad_ptr, x_ptr, gain_ptr, gain_sums_ptr, bias_sums_ptr]
    outputs = [out_ptr, gain_sums_ptr, bias_sums_ptr]
    with v.when_else(onto_ptr != 0) as (adds, stores):
        with adds:
            map_elements(v, d_model, [*inputs, onto_ptr], outputs, differentiate)
        with stores:
            map_elements(v, d_model, inputs, outputs, differentiate)
