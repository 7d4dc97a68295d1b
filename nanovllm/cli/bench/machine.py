"""Measure this machine's limits: memory bandwidth, and peak FLOPS of each type.

In the roofline model (Williams, Waterman and Patterson 2009,
https://doi.org/10.1145/1498765.1498785) a step that reads B bytes and computes F operations takes
at least max(B / bandwidth, F / peak).

- bandwidth: each thread reads its part of an array much larger than the caches, as STREAMS parallel
  streams. The hardware prefetches each stream, and one alone does not use all outstanding reads of
  a core.
- peak: multiply-adds on registers only, with enough independent accumulators to hide their latency.

The bandwidth of a shared machine drifts within minutes, so measure it beside the run.
"""

import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numba import types

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import F32_BYTES
from nanovllm.model.kernels.build.packing import ALIGNMENT
from nanovllm.model.kernels.build.target import PER_WORD, Target, host_target
from nanovllm.model.kernels.simd.vector import I32, I64, Value, Vectors, kernel

STREAMS = 4
SMALLEST_READ_BYTES = 256 << 20
LARGEST_READ_BYTES = 1 << 30  # larger caches are shared with other processes

_CACHE_MULTIPLE = 10  # size of the array in caches
_UNKNOWN_CACHE_BYTES = 32 << 20
_READ_PASSES = 4  # over the array per measurement, to amortize waking the threads
_READINGS = 4
_PEAK_S = 0.03
_VECTORS_A_STREAM = 2

KINDS = tuple(PER_WORD)


class MemoryReader:
    """An array much larger than the caches, and threads to read it."""

    def __init__(
        self, threads: int, *, size_bytes: int | None = None, streams: int = STREAMS
    ) -> None:
        """Allocate the array and compile.

        Args:
            threads: number of threads.
            size_bytes: size of the array; by default ten times the caches, at least 256 MB.
            streams: parallel streams of each thread.
        """
        step_bytes = threads * streams * _VECTORS_A_STREAM * ALIGNMENT
        self._streams = streams
        self._thread_bytes = (size_bytes or read_bytes()) // step_bytes * step_bytes // threads
        # Ones: pages of zeros would share one page of memory.
        self._array = np.ones((threads * self._thread_bytes + ALIGNMENT) // 4, dtype=np.int32)
        self._read = make_read(host_target(), streams)
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)
        self._run(1)

    def bytes_per_s(self, readings: int = _READINGS) -> float:
        """Return bytes per second, the best of some measurements of about 50 ms."""
        best_s = min(self._run(_READ_PASSES) for _ in range(readings))
        return _READ_PASSES * self._threads * self._thread_bytes / best_s

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown()

    def _run(self, passes: int) -> float:
        start = self._array.ctypes.data + -self._array.ctypes.data % ALIGNMENT

        def part(number: int) -> None:
            self._read(
                start + number * self._thread_bytes, self._thread_bytes // self._streams, passes
            )

        started_s = time.perf_counter()
        list(self._pool.map(part, range(self._threads)))
        return time.perf_counter() - started_s


def measure_bandwidth(threads: int) -> float:
    """Return the memory bandwidth of `threads` threads in bytes per second."""
    reader = MemoryReader(threads)
    try:
        return reader.bytes_per_s()
    finally:
        reader.close()


def measure_peak(kind: str, threads: int, *, target: Target | None = None) -> float | None:
    """Return peak operations per second of `threads` threads; None without an instruction.

    Args:
        kind: "float32" for multiply-adds, "bfloat16" for dot products into float32, "int8" for dot
            products into int32.
        target: instruction set; by default this machine's.
    """
    target = target or host_target()
    if not has_instruction(kind, target):
        return None
    lanes, chains, spin = target.lanes, _chains(target), make_peak(kind, target)
    state = np.full((chains + 1) * lanes * threads, 1e-3, dtype=np.float32)
    with ThreadPoolExecutor(threads) as pool:

        def run(count: int) -> float:
            started_s = time.perf_counter()
            list(
                pool.map(
                    lambda number: spin(
                        state.ctypes.data + number * (chains + 1) * lanes * F32_BYTES, count
                    ),
                    range(threads),
                )
            )
            return time.perf_counter() - started_s

        run(1)
        count = 1000
        while run(count) < _PEAK_S:
            count *= 2
        best_s = min(run(count) for _ in range(_READINGS))
    return count * chains * lanes * 2 * PER_WORD[kind] * threads / best_s


def has_instruction(kind: str, target: Target) -> bool:
    """Return whether an instruction set has multiply-adds or dot products of a type."""
    return {"float32": True, "bfloat16": target.bfloat16_dot, "int8": target.int8_dot}[kind]


def read_bytes() -> int:
    """Return the array size at which the caches hold almost none of it."""
    return min(max(_CACHE_MULTIPLE * cache_bytes(), SMALLEST_READ_BYTES), LARGEST_READ_BYTES)


def cache_bytes() -> int:
    """Return the size of the last-level cache on Linux, elsewhere a typical one."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text(encoding="ascii").strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) << 10)
    return max(sizes, default=_UNKNOWN_CACHE_BYTES)


def make_read(target: Target, streams: int) -> Callable[[int, int, int], int]:
    """Compile read(start, stream_bytes, passes), which sums the int32 of adjacent streams.

    Args of the kernel:
        start: address of the first stream.
        stream_bytes: size of each of the `streams` streams.
        passes: repetitions.
    """

    def add_up(v: Vectors, start: Value, stream_bytes: Value) -> Value:
        vector_bytes = v.lanes * F32_BYTES

        def step(i: Value, sums: list[Value]) -> Sequence[Value]:
            renewed = []
            for number, total in enumerate(sums):
                stream, offset = divmod(number, _VECTORS_A_STREAM)
                at = v.address(start, i, v.times(stream_bytes, stream), offset * vector_bytes)
                renewed.append(v.builder.add(total, v.load_words(at)))
            return renewed

        sums = v.loop(
            stream_bytes,
            _VECTORS_A_STREAM * vector_bytes,
            [v.integers(0)] * streams * _VECTORS_A_STREAM,
            step,
        )
        total = functools.reduce(v.builder.add, sums)
        lane_sums = [
            v.builder.sext(v.builder.extract_element(total, I32(lane)), I64)
            for lane in range(v.lanes)
        ]
        return functools.reduce(v.builder.add, lane_sums)

    add_up_once = kernel(target, add_up, types.int64)

    @compiled
    def read(start: int, stream_bytes: int, passes: int) -> int:
        total = 0
        for _ in range(passes):
            total += add_up_once(start, stream_bytes)
        return total

    return read


def make_peak(kind: str, target: Target) -> Callable[[int, int], None]:
    """Compile spin(state, count): `count` rounds of a multiply-add into each accumulator.

    `state` is the address of the factor's vector, followed by the accumulators.
    """

    def spin_once(v: Vectors, state: Value, count: Value) -> None:
        vector_bytes = v.lanes * F32_BYTES
        multiply_add = {"float32": v.fma, "bfloat16": v.dot_bfloat16, "int8": v.dot_int8}[kind]
        factor = v.load(state) if kind == "float32" else v.load_words(state)
        offsets = range(vector_bytes, (_chains(target) + 1) * vector_bytes, vector_bytes)
        sums = [
            v.load_words(state, offset) if kind == "int8" else v.load(state, offset)
            for offset in offsets
        ]
        sums = v.loop(
            count, 1, sums, lambda _, sums: [multiply_add(factor, factor, total) for total in sums]
        )
        for total, offset in zip(sums, offsets, strict=True):
            v.store(total, state, offset)

    spin_kernel = kernel(target, spin_once)

    @compiled
    def spin(state: int, count: int) -> None:
        spin_kernel(state, count)

    return spin


def _chains(target: Target) -> int:
    """Return the number of independent accumulators.

    Two units with a latency of four cycles need eight. AVX has registers for 12, AVX-512 and NEON
    for 16.
    """
    return 12 if target.lanes == 8 else 16
