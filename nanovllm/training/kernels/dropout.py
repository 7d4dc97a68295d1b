"""Dropout in vectors: the masks of nanovllm/training/network/dropout.py, bit for bit."""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.move import load_int
from nanovllm.model.kernels.simd.vector import I32, I64, Value, Vectors, kernel
from nanovllm.training.kernels.elementwise import float_argument
from nanovllm.training.kernels.phases import Work, make_entry, split
from nanovllm.training.kernels.records import ITEM_ELEMENTS
from nanovllm.training.network.dropout import LAST_SHIFT, SHIFTS_AND_MULTIPLIERS


def integer_argument(v: Vectors, integer: Value) -> Value:
    """Return the lower 32 bits of an argument in every lane."""
    return v.splat(v.builder.trunc(integer, I32))


def count_up(v: Vectors, first: Value, step: Value) -> Value:
    """Return the int32 first, first + step, first + 2 * step, ... of int64 arguments."""
    lanes = ir.Constant(v.i32s, [I32(lane) for lane in range(v.lanes)])
    steps = v.builder.mul(integer_argument(v, step), lanes)
    return v.builder.add(integer_argument(v, first), steps)


def is_kept(v: Vectors, index: Value, key: Sequence[Value], threshold: Value) -> Value:
    """Return a mask of the elements with these int32 indices that dropout keeps.

    Args:
        v: emits the code.
        index: numbers of the elements.
        key: lower and upper half of the site's key, in every lane.
        threshold: in every lane; elements whose hash is below it are dropped.
    """
    words = _mix(v, v.builder.xor(index, key[0]))
    words = _mix(v, v.builder.add(words, key[1]))
    return v.builder.icmp_unsigned(">=", words, threshold)


def _mix(v: Vectors, words: Value) -> Value:
    for shift, multiplier in SHIFTS_AND_MULTIPLIERS:
        shifted = v.builder.lshr(words, v.integers(shift))
        words = v.builder.mul(v.builder.xor(words, shifted), v.integers(multiplier))
    return v.builder.xor(words, v.builder.lshr(words, v.integers(LAST_SHIFT)))


def make_dropout(target: KernelTarget) -> Any:
    """Return the entry of NumpyOperations.dropout; `residual_ptr` may be 0."""
    drop = kernel(target, _make_emit(has_residual=False))
    add_dropped = kernel(target, _make_emit(has_residual=True))

    @compiled
    def compute(record: Any, thread: int, item: int) -> None:
        key = load_int(record.key_ptr, 0)
        first = item * ITEM_ELEMENTS
        offset_bytes = first * WORD_BYTES
        count = min(ITEM_ELEMENTS, record.count - first)
        x_ptr, out_ptr = record.x_ptr + offset_bytes, record.out_ptr + offset_bytes
        if record.residual_ptr == 0:
            drop(
                count, x_ptr, x_ptr, out_ptr, first,
                key, key >> 32, record.threshold, record.factor_bits,
            )  # fmt: skip
        else:
            add_dropped(
                count, record.residual_ptr + offset_bytes, x_ptr, out_ptr, first,
                key, key >> 32, record.threshold, record.factor_bits,
            )  # fmt: skip

    return make_entry("dropout", [Work(split("count", ITEM_ELEMENTS), compute)])


def _make_emit(*, has_residual: bool) -> Any:
    def emit(
        v: Vectors, count: Value, residual_ptr: Value, x_ptr: Value, out_ptr: Value, first: Value,
        key_low: Value, key_high: Value, threshold: Value, factor: Value,
    ) -> None:  # fmt: skip
        """Emit out = residual + where(kept, x * factor, 0)."""
        key = integer_argument(v, key_low), integer_argument(v, key_high)
        least, scale = integer_argument(v, threshold), float_argument(v, factor)

        whole = v.builder.and_(count, I64(-v.lanes))

        def compute(i: Value, load: Callable[[Value], Value]) -> Value:
            x = load(v.element(x_ptr, i))
            kept = is_kept(v, count_up(v, v.address(first, i), I64(1)), key, least)
            x = v.where(kept, v.multiply(x, scale), v.constant(0.0))
            return v.add(load(v.element(residual_ptr, i)), x) if has_residual else x

        def vector(i: Value, _: list[Value]) -> list[Value]:
            v.store(compute(i, v.load), v.element(out_ptr, i))
            return []

        def rest(i: Value, _: list[Value]) -> list[Value]:
            index = v.builder.add(whole, i)
            value = compute(index, lambda x_ptr: v.splat(v.load_scalar(x_ptr)))
            v.store(v.builder.extract_element(value, I32(0)), v.element(out_ptr, index))
            return []

        v.loop(whole, v.lanes, [], vector)
        v.loop(v.builder.sub(count, whole), 1, [], rest)

    return emit
