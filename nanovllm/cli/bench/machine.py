"""What this machine can do at most: bytes read from memory a second, and multiply-adds a second in each type.

No kernel can be faster than the slower of the two, which is the roofline model (Williams, Waterman and Patterson 2009,
https://doi.org/10.1145/1498765.1498785): a step that reads B bytes and computes F operations takes at least max(B / bandwidth, F / peak).

    bandwidth   each thread walks down its own part of an array that no cache holds, in STREAMS places at once:
                a processor fetches ahead in each of them, and one alone does not keep a core's outstanding reads busy
    peak        multiply-adds of registers alone, on as many independent sums as hide the time that one of them takes

Memory that is shared with other machines drifts within minutes, so a bandwidth is read beside the run that it is compared with.
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
from nanovllm.model.kernels.build.target import PER_WORD, KernelTarget, host_target
from nanovllm.model.kernels.simd.vector import I32, I64, Value, Vectors, kernel

STREAMS = 4
SMALLEST_READ_BYTES = 256 << 20
LARGEST_READ_BYTES = (
    1 << 30
)  # caches of servers reach gigabytes, but a process seldom has more than a share of them

_CACHES_FOLD = 10  # read so many times what the caches hold
_UNKNOWN_CACHE_BYTES = 32 << 20
_READ_PASSES = 4  # of the array in one reading, so that waking the threads does not count
_READINGS = 4
_PEAK_S = 0.03
_VECTORS_A_STREAM = 2

KINDS = tuple(PER_WORD)


class MemoryReader:
    """An array much larger than the caches, and the threads that read it."""

    def __init__(
        self, threads: int, *, size_bytes: int | None = None, streams: int = STREAMS
    ) -> None:
        """Take the memory and compile.

        Args:
            threads: as many as the run has that the reading is compared with.
            size_bytes: ten times what the caches hold unless given, at least 256 MB.
            streams: places at which each thread reads at once.
        """
        step_bytes = threads * streams * _VECTORS_A_STREAM * ALIGNMENT
        self._streams = streams
        self._thread_bytes = (size_bytes or read_bytes()) // step_bytes * step_bytes // threads
        self._array = np.ones(
            (threads * self._thread_bytes + ALIGNMENT) // 4, dtype=np.int32
        )  # not zeros, which all share one page of memory
        self._read = make_read(host_target(), streams)
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)
        self._run(1)

    def bytes_per_s(self, readings: int = _READINGS) -> float:
        """Bytes a second, the best of a few readings of some 50 milliseconds each."""
        best_s = min(self._run(_READ_PASSES) for _ in range(readings))
        return _READ_PASSES * self._threads * self._thread_bytes / best_s

    def close(self) -> None:
        """End the threads."""
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
    """Bytes a second that `threads` threads read from memory together."""
    reader = MemoryReader(threads)
    try:
        return reader.bytes_per_s()
    finally:
        reader.close()


def measure_peak(kind: str, threads: int, *, target: KernelTarget | None = None) -> float | None:
    """Multiplications and additions a second of `threads` threads in a type, None where the processor has no instruction for it.

    Args:
        kind: "float32" for multiply-adds, "bfloat16" or "int8" for dot products that are added to a float32 or an int32.
        target: the processor; by default this machine.
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


def has_instruction(kind: str, target: KernelTarget) -> bool:
    """Whether a processor multiplies and adds words of a type in one instruction."""
    return {"float32": True, "bfloat16": target.bfloat16_dot, "int8": target.int8_dot}[kind]


def read_bytes() -> int:
    """How much to read so that next to nothing of it comes from a cache."""
    return min(max(_CACHES_FOLD * cache_bytes(), SMALLEST_READ_BYTES), LARGEST_READ_BYTES)


def cache_bytes() -> int:
    """Size of the largest cache that a core of this machine reads through, where Linux tells; elsewhere a usual one."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text(encoding="ascii").strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) << 10)
    return max(sizes, default=_UNKNOWN_CACHE_BYTES)


def make_read(target: KernelTarget, streams: int) -> Callable[[int, int, int], int]:
    """read(start, stream_bytes, passes): read `streams` neighbouring stretches of memory side by side; the sum of their 32-bit integers."""

    def add_up(v: Vectors, start: Value, stream_bytes: Value) -> Value:
        vector_bytes = v.lanes * F32_BYTES

        def step(i: Value, sums: list[Value]) -> Sequence[Value]:
            renewed = []
            for number, total in enumerate(sums):
                stream, place = divmod(number, _VECTORS_A_STREAM)
                at = v.address(start, i, v.times(stream_bytes, stream), place * vector_bytes)
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


def make_peak(kind: str, target: KernelTarget) -> Callable[[int, int], None]:
    """spin(state, count): `count` rounds of one multiply-add for each of several sums; `state` has the factor's vector, then the sums'."""

    def spin_once(v: Vectors, state: Value, count: Value) -> None:
        vector_bytes = v.lanes * F32_BYTES
        multiply_add = {"float32": v.fma, "bfloat16": v.dot_bfloat16, "int8": v.dot_int8}[kind]
        factor = v.load(state) if kind == "float32" else v.load_words(state)
        places = range(vector_bytes, (_chains(target) + 1) * vector_bytes, vector_bytes)
        sums = [
            v.load_words(state, place) if kind == "int8" else v.load(state, place)
            for place in places
        ]
        sums = v.loop(
            count, 1, sums, lambda _, sums: [multiply_add(factor, factor, total) for total in sums]
        )
        for total, place in zip(sums, places, strict=True):
            v.store(total, state, place)

    spin_kernel = kernel(target, spin_once)

    @compiled
    def spin(state: int, count: int) -> None:
        spin_kernel(state, count)

    return spin


def _chains(target: KernelTarget) -> int:
    """Independent sums: two units of four cycles need eight; the 16 registers of AVX hold 12, the 32 of AVX-512 and NEON 16."""
    return 12 if target.lanes == 8 else 16
