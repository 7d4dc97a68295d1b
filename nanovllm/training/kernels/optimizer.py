"""AdamW in one pass over parameters, gradients and moments, and the sum of squares for clipping."""

from typing import Any

from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.elements import map_elements
from nanovllm.model.kernels.simd.kernel import Record, kernel
from nanovllm.model.kernels.simd.value import F64, Value
from nanovllm.model.kernels.simd.vector import Vectors
from nanovllm.training.kernels.phases import Work, item_elements, make_operation, split
from nanovllm.training.kernels.records import ITEM_ELEMENTS

_SUM_BYTES = 8


def make_adamw(target: KernelTarget) -> Any:
    """Return the entry of NumpyOperations.adamw."""
    return make_operation("adamw", [Work(split("count", ITEM_ELEMENTS), kernel(target, _update))])


def _update(v: Vectors, record: Record, _thread: Value, item: Value) -> None:
    """Emit the update of an item's elements."""
    first, count = item_elements(v, record, item)
    scale, rate = v.splat(record.gradient_scale), v.splat(record.learning_rate)
    m_rate, v_rate = v.splat(record.first_rate), v.splat(record.second_rate)
    m_factor, v_factor = v.splat(record.first_correction), v.splat(record.second_correction)
    kept, floor = v.splat(record.decay), v.splat(record.epsilon)

    def compute(p: Value, g: Value, m: Value, s: Value) -> list[Value]:
        g = g * scale
        m = v.fma(m_rate, g - m, m)
        s = v.fma(v_rate, g * g - s, s)
        root = v.sqrt(s * v_factor) + floor
        change = rate * (m * m_factor) / root
        return [p * kept - change, v.constant(0.0), m, s]

    moments = (record.first_moment_ptr, record.second_moment_ptr)
    arrays = (record.parameters_ptr, record.gradients_ptr, *moments)
    places = [v.element(array_ptr, first) for array_ptr in arrays]
    map_elements(v, count, places, places, compute)


def make_sum_of_squares(target: KernelTarget) -> Any:
    """Return the entry sum_of_squares, which writes a float64 for each ITEM_ELEMENTS.

    So neither the number of threads nor their order changes a bit of the sum of these.
    """
    work = Work(split("count", ITEM_ELEMENTS), kernel(target, _sum_squares))
    return make_operation("sum_of_squares", [work])


def _sum_squares(v: Vectors, record: Record, _thread: Value, item: Value) -> None:
    """Emit the sum of the squares of an item's elements, in float64."""
    first, count = item_elements(v, record, item)
    values_ptr = v.element(record.values_ptr, first)
    whole = count & -v.lanes

    def add_vector(i: Value, total: Value) -> Value:
        wide = v.load(v.element(values_ptr, i)).to_double()
        return total + wide * wide

    def add_rest(i: Value, total: Value) -> Value:
        wide = v.load_scalar(v.element(values_ptr, whole + i)).to_double()
        return total + wide * wide

    total = v.sum(v.fold(whole, v.lanes, v.constant(0.0, F64), add_vector))
    total = v.fold(count - whole, 1, total, add_rest)
    v.store(total, record.partial_sums_ptr + item * _SUM_BYTES)
