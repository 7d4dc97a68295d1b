"""Tests that the machine's benchmark does the work that it times and gives positive results."""

import numpy as np
import pytest

from nanovllm.cli.bench.machine import (
    KINDS,
    MAX_READ_BYTES,
    MIN_READ_BYTES,
    MemoryReader,
    cache_bytes,
    measure_peak,
    peak_type,
    read_bytes,
)
from nanovllm.model.kernels.bandwidth import STREAMS
from nanovllm.model.kernels.build.packing import aligned_zeros
from nanovllm.model.kernels.build.target import KernelTarget, Spec, host_target
from nanovllm.model.kernels.library import BANDWIDTH, load_library

HOST = host_target()
TARGETS = [
    KernelTarget(lanes=lanes, is_x86=HOST.is_x86) for lanes in (16, 8, 4) if lanes <= HOST.lanes
]


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_every_number_is_read(target: KernelTarget) -> None:
    memory = aligned_zeros(4 * 1024).view(np.int32)
    memory[:] = np.random.default_rng(0).integers(-1000, 1000, memory.shape, dtype=np.int32)
    arguments = np.array([memory.ctypes.data, memory.nbytes // STREAMS, 3, 0])
    load_library(Spec(target), BANDWIDTH).functions["read"](arguments.ctypes.data, 0)
    assert arguments[-1] == 3 * memory.sum()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_reading_takes_time(threads: int) -> None:
    reader = MemoryReader(threads, size_bytes=3_000_001)
    try:
        assert 1e6 < reader.bytes_per_s(readings=1) < 1e15
    finally:
        reader.close()


def test_more_is_read_than_the_caches_hold() -> None:
    assert MIN_READ_BYTES <= read_bytes() <= MAX_READ_BYTES
    assert cache_bytes() > 0


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_every_target_has_a_float32_peak(target: KernelTarget) -> None:
    peak = measure_peak("float32", 1, target=target)
    assert peak is not None
    assert 1e6 < peak < 1e15


def test_the_peak_of_a_type_is_that_of_the_instruction_that_its_kernels_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nanovllm.cli.bench.machine.measure_tiles", lambda kind, threads: 7.0)
    assert measure_peak("int8", 1, target=KernelTarget(lanes=16, int8_tiles=True)) == 7.0
    for target in (KernelTarget(lanes=4), KernelTarget(lanes=4, is_x86=True)):
        assert measure_peak("int8", 1, target=target) is None
    without_dot = KernelTarget(lanes=4)
    assert measure_peak("bfloat16", 1, target=without_dot) is not None
    assert peak_type("bfloat16", target=without_dot) == "float32"
    for kind in KINDS:
        assert (measure_peak(kind, 1) is None) == (kind == "int8" and not HOST.int8_dot)
