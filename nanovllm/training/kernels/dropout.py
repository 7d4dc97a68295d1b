"""Dropout in vectors: the masks of nanovllm/training/network/dropout.py, bit for bit."""

from collections.abc import Sequence
from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.elements import Elements, for_elements
from nanovllm.model.kernels.simd.kernel import kernel
from nanovllm.model.kernels.simd.move import record_at
from nanovllm.model.kernels.simd.value import Value
from nanovllm.model.kernels.simd.vector import Vectors
from nanovllm.model.kernels.threads.barrier import take_item
from nanovllm.training.kernels.records import ITEM_ELEMENTS, RECORDS
from nanovllm.training.network.dropout import LAST_SHIFT, SHIFTS_AND_MULTIPLIERS

_record_at = record_at(RECORDS["add_dropout"])


def count_up(v: Vectors, first: Value, step: Value) -> Value:
    """Return the int32 first, first + step, first + 2 * step, ... of int64 arguments."""
    steps = v.integer_argument(step) * v.lane_numbers()
    return v.integer_argument(first) + steps


def is_kept(v: Vectors, index: Value, key: Sequence[Value], threshold: Value) -> Value:
    """Return a mask of the elements with these int32 indices that dropout keeps.

    Args:
        v: emits the code.
        index: numbers of the elements.
        key: lower and upper half of the site's key, in every lane.
        threshold: in every lane; elements whose hash is below it are dropped.
    """
    words = _mix(v, index ^ key[0])
    words = _mix(v, words + key[1])
    return words.unsigned_at_least(threshold)


def _mix(v: Vectors, words: Value) -> Value:
    for shift, multiplier in SHIFTS_AND_MULTIPLIERS:
        shifted = words.lshr(shift)
        words = (words ^ shifted) * multiplier
    return words ^ words.lshr(LAST_SHIFT)


def make_add_dropout(target: KernelTarget) -> Any:
    """Return the entry add_dropout(record_ptr, thread): out = residual + dropout(x).

    `residual_ptr` may be 0, for dropout alone.
    """
    drop = kernel(target, _make_emit(has_residual=False, drops=True))
    add_dropped = kernel(target, _make_emit(has_residual=True, drops=True))
    add = kernel(target, _make_emit(has_residual=True, drops=False))

    @compiled
    def add_dropout(record_ptr: int, thread: int) -> None:
        record = _record_at(record_ptr)
        first = take_item(record.phases_ptr) * ITEM_ELEMENTS
        while first < record.count:
            offset_bytes = first * WORD_BYTES
            count = min(ITEM_ELEMENTS, record.count - first)
            x_ptr, out_ptr = record.x_ptr + offset_bytes, record.out_ptr + offset_bytes
            residual_ptr = record.residual_ptr + offset_bytes
            if record.residual_ptr == 0:
                drop(
                    count, x_ptr, x_ptr, out_ptr, first,
                    record.key_low, record.key_high, record.threshold, record.factor_bits,
                )  # fmt: skip
            elif record.threshold > 0:
                add_dropped(
                    count, residual_ptr, x_ptr, out_ptr, first,
                    record.key_low, record.key_high, record.threshold, record.factor_bits,
                )  # fmt: skip
            else:
                add(
                    count, residual_ptr, x_ptr, out_ptr, first,
                    record.key_low, record.key_high, record.threshold, record.factor_bits,
                )  # fmt: skip
            first = take_item(record.phases_ptr) * ITEM_ELEMENTS

    return add_dropout


def _make_emit(*, has_residual: bool, drops: bool) -> Any:
    def emit(
        v: Vectors, count: Value, residual_ptr: Value, x_ptr: Value, out_ptr: Value, first: Value,
        key_low: Value, key_high: Value, threshold: Value, factor: Value,
    ) -> None:  # fmt: skip
        """Emit out = residual + where(kept, x * factor, 0)."""
        key = v.integer_argument(key_low), v.integer_argument(key_high)
        least, scale = v.integer_argument(threshold), v.float_argument(factor)

        def compute(elements: Elements) -> None:
            x = elements.load(x_ptr)
            if drops:
                kept = is_kept(v, count_up(v, first + elements.index, v.scalar(1)), key, least)
                x = v.where(kept, x * scale, 0.0)
            elements.store(elements.load(residual_ptr) + x if has_residual else x, out_ptr)

        for_elements(v, count, compute)

    return emit
