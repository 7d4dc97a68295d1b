"""AdamW in one pass over parameters, gradients and moments, and the sum of squares for clipping."""

from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.elements import map_elements
from nanovllm.model.kernels.simd.kernel import kernel
from nanovllm.model.kernels.simd.value import F64, Value
from nanovllm.model.kernels.simd.vector import Vectors
from nanovllm.training.kernels.phases import Work, make_entry, split
from nanovllm.training.kernels.records import ITEM_ELEMENTS

_SUM_BYTES = 8


def make_adamw(target: KernelTarget) -> Any:
    """Return the entry of NumpyOperations.adamw."""
    update = kernel(target, _update)

    @compiled
    def compute(record: Any, thread: int, item: int) -> None:
        first = item * ITEM_ELEMENTS
        offset_bytes = first * WORD_BYTES
        update(
            min(ITEM_ELEMENTS, record.count - first),
            record.parameters_ptr + offset_bytes, record.gradients_ptr + offset_bytes,
            record.first_moment_ptr + offset_bytes, record.second_moment_ptr + offset_bytes,
            record.gradient_scale_bits, record.first_rate_bits, record.second_rate_bits,
            record.first_correction_bits, record.second_correction_bits,
            record.learning_rate_bits, record.decay_bits, record.epsilon_bits,
        )  # fmt: skip

    return make_entry("adamw", [Work(split("count", ITEM_ELEMENTS), compute)])


def _update(
    v: Vectors, count: Value, parameters_ptr: Value, gradients_ptr: Value, first_ptr: Value,
    second_ptr: Value, gradient_scale: Value, first_rate: Value, second_rate: Value,
    first_correction: Value, second_correction: Value, learning_rate: Value, decay: Value,
    epsilon: Value,
) -> None:  # fmt: skip
    """Emit the update of `count` elements; the factors are the bits of float32."""
    scale, m_rate, v_rate, m_factor, v_factor, rate, kept, floor = (
        v.float_argument(bits)
        for bits in (
            gradient_scale, first_rate, second_rate, first_correction, second_correction,
            learning_rate, decay, epsilon,
        )
    )  # fmt: skip

    def compute(p: Value, g: Value, m: Value, s: Value) -> list[Value]:
        g = g * scale
        m = v.fma(m_rate, g - m, m)
        s = v.fma(v_rate, g * g - s, s)
        root = v.sqrt(s * v_factor) + floor
        change = rate * (m * m_factor) / root
        return [p * kept - change, v.constant(0.0), m, s]

    arrays = (parameters_ptr, gradients_ptr, first_ptr, second_ptr)
    map_elements(v, count, arrays, arrays, compute)


def make_sum_of_squares(target: KernelTarget) -> Any:
    """Return the entry sum_of_squares, which writes a float64 for each ITEM_ELEMENTS.

    So neither the number of threads nor their order changes a bit of the sum of these.
    """
    sum_squares = kernel(target, _sum_squares)

    @compiled
    def compute(record: Any, thread: int, item: int) -> None:
        first = item * ITEM_ELEMENTS
        sum_squares(
            record.values_ptr + first * WORD_BYTES,
            min(ITEM_ELEMENTS, record.count - first),
            record.partial_sums_ptr + item * _SUM_BYTES,
        )

    return make_entry("sum_of_squares", [Work(split("count", ITEM_ELEMENTS), compute)])


def _sum_squares(v: Vectors, values_ptr: Value, count: Value, out_ptr: Value) -> None:
    """Emit out = the sum of the squares of `count` float32, in float64."""
    whole = count & -v.lanes

    def add_vector(i: Value, total: Value) -> Value:
        wide = v.load(v.element(values_ptr, i)).to_double()
        return total + wide * wide

    def add_rest(i: Value, total: Value) -> Value:
        wide = v.load_scalar(v.element(values_ptr, whole + i)).to_double()
        return total + wide * wide

    total = v.sum(v.fold(whole, v.lanes, v.constant(0.0, F64), add_vector))
    v.store(v.fold(count - whole, 1, total, add_rest), out_ptr)
