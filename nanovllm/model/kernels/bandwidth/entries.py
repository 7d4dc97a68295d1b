"""The compiled function that reads memory as fast as it can."""

import functools
import operator
from collections.abc import Sequence
from typing import Any

from numba import types

from nanovllm.model.kernels.bandwidth import STREAMS, VECTORS
from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget, Spec
from nanovllm.model.kernels.simd.kernel import kernel
from nanovllm.model.kernels.simd.memory import load_int, store_int
from nanovllm.model.kernels.simd.value import I64, Value
from nanovllm.model.kernels.simd.vector import Vectors

_START, _STREAM_BYTES, _PASSES, _TOTAL = range(4)


def make_entries(spec: Spec) -> dict[str, Any]:
    """Return the functions of library.BANDWIDTH, not yet compiled."""
    return {"read": make_read(spec.target)}


def make_read(target: KernelTarget) -> Any:
    """Return read(arguments_ptr, _), which adds up int32 numbers.

    The arguments are int64: the address of STREAMS neighbouring streams, which are read side
    by side, the bytes of a stream, how often to read them, and the sum, which it writes.
    """

    def add_up(v: Vectors, start: Value, stream_bytes: Value) -> Value:
        vector_bytes = v.lanes * WORD_BYTES

        def step(i: Value, sums: list[Value]) -> Sequence[Value]:
            updated = []
            for number, total in enumerate(sums):
                stream, vector = divmod(number, VECTORS)
                stream_ptr = start + i + stream_bytes * stream
                updated.append(total + v.load_words(stream_ptr + vector * vector_bytes))
            return updated

        zeros = [v.integers(0)] * STREAMS * VECTORS
        sums = v.loop(stream_bytes, VECTORS * vector_bytes, zeros, step)
        total = functools.reduce(operator.add, sums)
        return functools.reduce(
            operator.add, [total.lane(lane).sext(I64) for lane in range(v.lanes)]
        )

    read_once = kernel(target, add_up, types.int64)

    @compiled
    def read(arguments_ptr: int, _: int) -> None:
        start, stream_bytes = (
            load_int(arguments_ptr, _START),
            load_int(arguments_ptr, _STREAM_BYTES),
        )
        total = 0
        for _pass in range(load_int(arguments_ptr, _PASSES)):
            total += read_once(start, stream_bytes)
        store_int(arguments_ptr, _TOTAL, total)

    return read
