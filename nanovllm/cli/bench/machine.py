"""Limits of a machine: memory bandwidth, and peak multiply-adds a second of each type.

No kernel can be faster than the slower of the two. This is the roofline model (Williams, Waterman
and Patterson 2009, https://doi.org/10.1145/1498765.1498785): a step that reads B bytes and computes
F operations takes at least max(B / bandwidth, F / peak).

    bandwidth   each thread reads its part of an array larger than all caches, in STREAMS
                streams at once: one stream alone does not keep a core's outstanding reads busy
    peak        multiply-adds on registers, in as many independent chains as hide their latency
                (kernels/build/peak.py)

Bandwidth that is shared with other machines drifts within minutes, so it is measured beside the run
that it is compared with.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from nanovllm.model.kernels.bandwidth import STREAMS, VECTORS
from nanovllm.model.kernels.build.amx import measure_tiles
from nanovllm.model.kernels.build.layout import LINE_BYTES
from nanovllm.model.kernels.build.peak import measure_instruction
from nanovllm.model.kernels.build.target import PER_WORD, KernelTarget, host_spec
from nanovllm.model.kernels.library import BANDWIDTH, load_library

MIN_READ_BYTES = 256 << 20
MAX_READ_BYTES = 1 << 30
"""Enough even where caches reach gigabytes: a process seldom has more than a share of them."""

_CACHE_MULTIPLE = 10  # bytes to read, as a multiple of the cache
_UNKNOWN_CACHE_BYTES = 32 << 20
_READ_PASSES = 4  # over the array in one reading, so that waking the threads does not count
_READINGS = 4

KINDS = tuple(PER_WORD)


class MemoryReader:
    """An array much larger than the caches, and threads to read it."""

    def __init__(self, threads: int, *, size_bytes: int | None = None) -> None:
        """Allocate the array, and load the kernels or compile them.

        Args:
            threads: threads that read, as many as the run that the bandwidth is compared with.
            size_bytes: bytes of the array; by default ten times the cache, at least 256 MiB.
        """
        step_bytes = threads * STREAMS * VECTORS * LINE_BYTES
        self._thread_bytes = (size_bytes or read_bytes()) // step_bytes * step_bytes // threads
        array_bytes = threads * self._thread_bytes + LINE_BYTES
        self._array = np.ones(array_bytes // 4, dtype=np.int32)  # zeros would all share one page
        self._read = load_library(host_spec(), BANDWIDTH).functions["read"]
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)
        self._run(1)

    def bytes_per_s(self, readings: int = _READINGS) -> float:
        """Return bytes read a second, the best of several readings of 50 ms each."""
        best_s = min(self._run(_READ_PASSES) for _ in range(readings))
        return _READ_PASSES * self._threads * self._thread_bytes / best_s

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown()

    def _run(self, passes: int) -> float:
        start = self._array.ctypes.data + -self._array.ctypes.data % LINE_BYTES

        def read_part(thread: int) -> None:
            part = start + thread * self._thread_bytes
            arguments = np.array([part, self._thread_bytes // STREAMS, passes, 0])
            self._read(arguments.ctypes.data, 0)

        started_s = time.perf_counter()
        list(self._pool.map(read_part, range(self._threads)))
        return time.perf_counter() - started_s


def measure_bandwidth(threads: int) -> float:
    """Return the bytes a second that `threads` threads together read from memory."""
    reader = MemoryReader(threads)
    try:
        return reader.bytes_per_s()
    finally:
        reader.close()


def measure_peak(kind: str, threads: int, *, target: KernelTarget | None = None) -> float | None:
    """Return multiplications and additions a second of the instruction that kernels use for a type.

    It is None where they use several for int8.

    Args:
        kind: type of the weights, "float32", "bfloat16" or "int8".
        threads: threads that compute.
        target: what the code is compiled for; by default this CPU.
    """
    target = target or host_spec(kind).target
    if target.uses_tiles(kind) and not target.emulates_tiles:
        return measure_tiles(kind, threads)
    if kind == "int8" and not target.int8_dot:
        return None
    return measure_instruction(peak_type(kind, target=target), target.lanes, threads)


def peak_type(kind: str, *, target: KernelTarget | None = None) -> str:
    """Return the type whose multiply-adds are the peak of a type of weights.

    It is float32 for bfloat16 weights where kernels widen them, because the CPU has no dot products
    of bfloat16 or slower ones.
    """
    return (target or host_spec(kind).target).input_type(kind)


def read_bytes() -> int:
    """Return how many bytes to read so that hardly any come from a cache."""
    return min(max(_CACHE_MULTIPLE * cache_bytes(), MIN_READ_BYTES), MAX_READ_BYTES)


def cache_bytes() -> int:
    """Return the size of the largest cache of a core, from Linux; a usual size elsewhere."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text(encoding="ascii").strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) << 10)
    return max(sizes, default=_UNKNOWN_CACHE_BYTES)
