"""Dropout in vectors: the masks of nanovllm/training/network/dropout.py, bit for bit."""

from typing import Any

from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.elements import Elements, for_elements
from nanovllm.model.kernels.simd.kernel import Record, kernel
from nanovllm.model.kernels.simd.value import I64, Value
from nanovllm.model.kernels.simd.vector import Vectors
from nanovllm.training.kernels.phases import Work, item_elements, make_operation, split
from nanovllm.training.kernels.records import ITEM_ELEMENTS
from nanovllm.training.network.dropout import LAST_SHIFT, SHIFTS_AND_MULTIPLIERS


class Mask:
    """The mask of a use of dropout, whose arguments are in the record of its operation."""

    def __init__(self, v: Vectors, record: Record) -> None:
        """Take the key, the smallest hash of an element that is kept, and 1 / (1 - rate)."""
        self._v = v
        key = v.load_as(I64, record.key_ptr)
        self._key = v.integer_argument(key), v.integer_argument(key.lshr(32))
        self._threshold = v.integer_argument(record.threshold)
        self._factor = v.splat(record.factor)

    def apply(self, x: Value, first: Value, step: Value | int = 1) -> Value:
        """Return dropout(x) of the elements numbered first, first + step, first + 2 * step, ..."""
        return self._v.where(self._is_kept(first, step), x * self._factor, 0.0)

    def factors(self, first: Value, step: Value | int = 1) -> Value:
        """Return 0 or 1 / (1 - rate) for each of these elements."""
        return self._v.where(self._is_kept(first, step), self._factor, 0.0)

    def _is_kept(self, first: Value, step: Value | int) -> Value:
        v = self._v
        step = v.scalar(step) if isinstance(step, int) else step
        index = v.integer_argument(first) + v.integer_argument(step) * v.lane_numbers()
        words = _mix(_mix(index ^ self._key[0]) + self._key[1])
        return words.unsigned_at_least(self._threshold)


def _mix(words: Value) -> Value:
    for shift, multiplier in SHIFTS_AND_MULTIPLIERS:
        words = (words ^ words.lshr(shift)) * multiplier
    return words ^ words.lshr(LAST_SHIFT)


def make_dropout(target: KernelTarget) -> Any:
    """Return the entry of NumpyOperations.dropout; `residual_ptr` may be 0."""
    return make_operation("dropout", [Work(split("count", ITEM_ELEMENTS), kernel(target, _drop))])


def _drop(v: Vectors, record: Record, _thread: Value, item: Value) -> None:
    """Emit out = [residual +] where(kept, x * factor, 0) of an item's elements."""
    first, count = item_elements(v, record, item)
    x_ptr, out_ptr = v.element(record.x_ptr, first), v.element(record.out_ptr, first)
    residual_ptr = v.element(record.residual_ptr, first)
    mask = Mask(v, record)

    def drop(elements: Elements) -> Value:
        return mask.apply(elements.load(x_ptr), first + elements.index)

    def drop_and_add(elements: Elements) -> None:
        elements.store(elements.load(residual_ptr) + drop(elements), out_ptr)

    with v.when_else(record.residual_ptr != 0) as (adds, stores):
        with adds:
            for_elements(v, count, drop_and_add)
        with stores:
            for_elements(v, count, lambda elements: elements.store(drop(elements), out_ptr))
