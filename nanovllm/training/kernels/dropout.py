"""Dropout in vectors: the masks of nanovllm/training/network/dropout.py, bit for bit."""

from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.elements import Elements, for_elements
from nanovllm.model.kernels.simd.kernel import kernel
from nanovllm.model.kernels.simd.move import load_int
from nanovllm.model.kernels.simd.value import Value
from nanovllm.model.kernels.simd.vector import Vectors
from nanovllm.training.kernels.phases import Work, make_entry, split
from nanovllm.training.kernels.records import ITEM_ELEMENTS
from nanovllm.training.network.dropout import LAST_SHIFT, SHIFTS_AND_MULTIPLIERS


class Mask:
    """The mask of a use of dropout, whose arguments are integers of the kernel."""

    def __init__(self, v: Vectors, key: Value, threshold: Value, factor_bits: Value) -> None:
        """Take the key, the smallest hash of an element that is kept, and 1 / (1 - rate)."""
        self._v = v
        self._key = v.integer_argument(key), v.integer_argument(key.lshr(32))
        self._threshold = v.integer_argument(threshold)
        self._factor = v.float_argument(factor_bits)

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
    drop = kernel(target, _drop)

    @compiled
    def compute(record: Any, thread: int, item: int) -> None:
        first = item * ITEM_ELEMENTS
        offset_bytes = first * WORD_BYTES
        drop(
            min(ITEM_ELEMENTS, record.count - first), record.x_ptr + offset_bytes,
            record.residual_ptr + offset_bytes if record.residual_ptr != 0 else 0,
            record.out_ptr + offset_bytes, first,
            load_int(record.key_ptr, 0), record.threshold, record.factor_bits,
        )  # fmt: skip

    return make_entry("dropout", [Work(split("count", ITEM_ELEMENTS), compute)])


def _drop(
    v: Vectors, count: Value, x_ptr: Value, residual_ptr: Value, out_ptr: Value, first: Value,
    key: Value, threshold: Value, factor_bits: Value,
) -> None:  # fmt: skip
    """Emit out = [residual +] where(kept, x * factor, 0)."""
    mask = Mask(v, key, threshold, factor_bits)

    def drop(elements: Elements) -> Value:
        return mask.apply(elements.load(x_ptr), first + elements.index)

    with v.when_else(residual_ptr != 0) as (adds, stores):
        with adds:
            for_elements(v, count, lambda it: it.store(it.load(residual_ptr) + drop(it), out_ptr))
        with stores:
            for_elements(v, count, lambda it: it.store(drop(it), out_ptr))
