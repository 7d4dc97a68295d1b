"""Layer normalization and its gradients, a row at a time.

The gradients of gain and bias are sums over all rows. Each item of ITEM_ROWS rows sums its own in
working memory, in the pass that computes grad_x. A second phase adds these sums in the order of the
items, a strip of columns at a time. So no bit depends on which thread computed what.
"""

from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.vector import F32, I32, Value, Vectors, kernel
from nanovllm.training.kernels.elementwise import make_add, map_elements, sum_elements
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
    count = v.builder.sitofp(d_model, F32)
    mean_scalar = v.divide(sum_elements(v, d_model, (x_ptr,), 1, lambda x: [x])[0], count)
    mean = v.splat(mean_scalar)

    def square(x: Value) -> list[Value]:
        centred = v.subtract(x, mean)
        return [v.multiply(centred, centred)]

    variance = v.divide(sum_elements(v, d_model, (x_ptr,), 1, square)[0], count)
    epsilon = v.builder.bitcast(v.builder.trunc(epsilon_bits, I32), F32)
    inverse_scalar = v.divide(F32(1.0), v.sqrt(v.add(variance, epsilon)))
    inverse = v.splat(inverse_scalar)

    def normalize(x: Value, gain: Value, bias: Value) -> list[Value]:
        return [v.fma(v.multiply(v.subtract(x, mean), inverse), gain, bias)]

    map_elements(v, d_model, (x_ptr, gain_ptr, bias_ptr), (out_ptr,), normalize)
    v.store(mean_scalar, mean_ptr)
    v.store(inverse_scalar, inverse_ptr)


def make_layer_norm_backward(target: KernelTarget) -> Any:
    """Return the entry of NumpyOperations.layer_norm_backward; `onto_ptr` may be 0.

    `partial` is [items, 2, d_model]: each item's gradients of gain and bias.
    """
    differentiate = kernel(target, _make_differentiate(has_onto=False))
    differentiate_onto = kernel(target, _make_differentiate(has_onto=True))
    clear, add = _make_clear(target), make_add(target)
    count_items = split("rows", ITEM_ROWS)

    @compiled
    def differentiate_rows(record: Any, thread: int, item: int) -> None:
        row_bytes = record.d_model * WORD_BYTES
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

    @compiled
    def add_sums(record: Any, thread: int, strip: int) -> None:
        first, row_bytes = strip * STRIP, record.d_model * WORD_BYTES
        count, offset_bytes = min(STRIP, record.d_model - first), first * WORD_BYTES
        gain_ptr, bias_ptr = (
            record.grad_gain_ptr + offset_bytes,
            record.grad_bias_ptr + offset_bytes,
        )
        for item in range(count_items(record)):
            sums_ptr = record.partial_ptr + item * 2 * row_bytes + offset_bytes
            add(sums_ptr, gain_ptr, gain_ptr, count)
            add(sums_ptr + row_bytes, bias_ptr, bias_ptr, count)

    return make_entry(
        "layer_norm_backward",
        [Work(count_items, differentiate_rows)],
        [Work(split("d_model", STRIP), add_sums)],
    )


def _make_differentiate(*, has_onto: bool) -> Any:
    def emit(
        v: Vectors, grad_ptr: Value, x_ptr: Value, gain_ptr: Value, mean_ptr: Value,
        inverse_ptr: Value, onto_ptr: Value, out_ptr: Value, grad_gain_ptr: Value,
        grad_bias_ptr: Value, d_model: Value,
    ) -> None:  # fmt: skip
        """Emit grad_x of one row, and add the row to the gradients of gain and bias."""
        mean, inverse = (v.splat(v.load_scalar(base_ptr)) for base_ptr in (mean_ptr, inverse_ptr))
        count = v.builder.sitofp(d_model, F32)

        def normalized(x: Value) -> Value:
            return v.multiply(v.subtract(x, mean), inverse)

        def products(grad: Value, x: Value, gain: Value) -> list[Value]:
            g = v.multiply(grad, gain)
            return [g, v.multiply(g, normalized(x))]

        sums = sum_elements(v, d_model, (grad_ptr, x_ptr, gain_ptr), 2, products)
        mean_g, mean_gn = (v.splat(v.divide(total, count)) for total in sums)

        def differentiate(
            grad: Value, x: Value, gain: Value, grad_gain: Value, grad_bias: Value, *onto: Value
        ) -> list[Value]:
            n = normalized(x)
            centred = v.subtract(v.multiply(grad, gain), mean_g)
            grad_x = v.multiply(inverse, v.subtract(centred, v.multiply(n, mean_gn)))
            grad_x = v.add(onto[0], grad_x) if onto else grad_x
            return [grad_x, v.fma(grad, n, grad_gain), v.add(grad_bias, grad)]

        inputs = [grad_ptr, x_ptr, gain_ptr, grad_gain_ptr, grad_bias_ptr]
        inputs += [onto_ptr] if has_onto else []
        map_elements(v, d_model, inputs, (out_ptr, grad_gain_ptr, grad_bias_ptr), differentiate)

    return emit


def _make_clear(target: KernelTarget) -> Any:
    """Return clear(out_ptr, count): `count` float32 zeros."""

    def clear(v: Vectors, out_ptr: Value, count: Value) -> None:
        map_elements(v, count, (), (out_ptr,), lambda: [v.constant(0.0)])

    return kernel(target, clear)
