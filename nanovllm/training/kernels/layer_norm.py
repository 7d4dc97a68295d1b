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
from nanovllm.model.kernels.simd.move import record_at
from nanovllm.model.kernels.simd.value import F32, I32, Value
from nanovllm.model.kernels.simd.vector import Vectors
from nanovllm.model.kernels.threads.barrier import take_item
from nanovllm.model.kernels.threads.phase import ABORTED, end_phase
from nanovllm.training.kernels.records import ITEM_ROWS, RECORDS, STRIP

_forward_record_at = record_at(RECORDS["layer_norm"])
_backward_record_at = record_at(RECORDS["layer_norm_backward"])


def make_layer_norm(target: KernelTarget) -> Any:
    """Return the entry layer_norm(record_ptr, thread); see NumpyOperations.layer_norm."""
    normalize = kernel(target, _normalize)

    @compiled
    def layer_norm(record_ptr: int, thread: int) -> None:
        record = _forward_record_at(record_ptr)
        first = take_item(record.phases_ptr) * ITEM_ROWS
        while first < record.rows:
            for row in range(first, min(first + ITEM_ROWS, record.rows)):
                offset_bytes = row * record.d_model * WORD_BYTES
                normalize(
                    record.x_ptr + offset_bytes, record.gain_ptr, record.bias_ptr,
                    record.out_ptr + offset_bytes, record.mean_ptr + row * WORD_BYTES,
                    record.inverse_ptr + row * WORD_BYTES, record.d_model, record.epsilon_bits,
                )  # fmt: skip
            first = take_item(record.phases_ptr) * ITEM_ROWS

    return layer_norm


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
    """Return the entry layer_norm_backward(record_ptr, thread); `onto_ptr` may be 0.

    `partial` is [items, 2, d_model]: each item's gradients of gain and bias.
    """
    differentiate = kernel(target, _make_differentiate(has_onto=False))
    differentiate_onto = kernel(target, _make_differentiate(has_onto=True))
    clear, add = _make_clear(target), kernel(target, _add)

    @compiled
    def layer_norm_backward(record_ptr: int, thread: int) -> None:
        record = _backward_record_at(record_ptr)
        row_bytes = record.d_model * WORD_BYTES
        items, done = (record.rows + ITEM_ROWS - 1) // ITEM_ROWS, 0
        item = take_item(record.phases_ptr)
        while item < items:
            sums_ptr = record.partial_ptr + item * 2 * row_bytes
            clear(sums_ptr, 2 * record.d_model)
            for row in range(item * ITEM_ROWS, min((item + 1) * ITEM_ROWS, record.rows)):
                offset_bytes = row * row_bytes
                if record.onto_ptr == 0:
                    differentiate(
                        record.grad_out_ptr + offset_bytes, record.x_ptr + offset_bytes,
                        record.gain_ptr, record.mean_ptr + row * WORD_BYTES,
                        record.inverse_ptr + row * WORD_BYTES, 0, record.grad_x_ptr + offset_bytes,
                        sums_ptr, sums_ptr + row_bytes, record.d_model,
                    )  # fmt: skip
                else:
                    differentiate_onto(
                        record.grad_out_ptr + offset_bytes, record.x_ptr + offset_bytes,
                        record.gain_ptr, record.mean_ptr + row * WORD_BYTES,
                        record.inverse_ptr + row * WORD_BYTES, record.onto_ptr + offset_bytes,
                        record.grad_x_ptr + offset_bytes, sums_ptr, sums_ptr + row_bytes,
                        record.d_model,
                    )  # fmt: skip
            done += 1
            item = take_item(record.phases_ptr)
        phase_ptr = end_phase(record, thread, record.phases_ptr, done, items)
        if phase_ptr == ABORTED:
            return
        first = take_item(phase_ptr) * STRIP
        while first < record.d_model:
            count, offset_bytes = min(STRIP, record.d_model - first), first * WORD_BYTES
            for item in range(items):
                sums_ptr = record.partial_ptr + item * 2 * row_bytes + offset_bytes
                add(sums_ptr, record.grad_gain_ptr + offset_bytes, count)
                add(sums_ptr + row_bytes, record.grad_bias_ptr + offset_bytes, count)
            first = take_item(phase_ptr) * STRIP

    return layer_norm_backward


def _make_differentiate(*, has_onto: bool) -> Any:
    def emit(
        v: Vectors, grad_ptr: Value, x_ptr: Value, gain_ptr: Value, mean_ptr: Value,
        inverse_ptr: Value, onto_ptr: Value, out_ptr: Value, grad_gain_ptr: Value,
        grad_bias_ptr: Value, d_model: Value,
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
            grad: Value, x: Value, gain: Value, grad_gain: Value, grad_bias: Value, *onto: Value
        ) -> list[Value]:
            n = normalized(x)
            centred = grad * gain - mean_g
            grad_x = inverse * (centred - n * mean_gn)
            grad_x = onto[0] + grad_x if onto else grad_x
            return [grad_x, v.fma(grad, n, grad_gain), grad_bias + grad]

        inputs = [grad_ptr, x_ptr, gain_ptr, grad_gain_ptr, grad_bias_ptr]
        inputs += [onto_ptr] if has_onto else []
        map_elements(v, d_model, inputs, (out_ptr, grad_gain_ptr, grad_bias_ptr), differentiate)

    return emit


def _make_clear(target: KernelTarget) -> Any:
    """Return clear(out_ptr, count): `count` float32 zeros."""

    def clear(v: Vectors, out_ptr: Value, count: Value) -> None:
        map_elements(v, count, (), (out_ptr,), lambda: [v.constant(0.0)])

    return kernel(target, clear)


def _add(v: Vectors, source_ptr: Value, out_ptr: Value, count: Value) -> None:
    """Emit out += source."""
    map_elements(v, count, (source_ptr, out_ptr), (out_ptr,), lambda a, b: [a + b])
