"""Tests that the machine's benchmark does the work that it times and gives positive results."""

import numpy as np
import pytest

from nanovllm.cli.bench.machine import (
    KINDS,
    MAX_READ_BYTES,
    MIN_READ_BYTES,
    MemoryReader,
    cache_bytes,
    has_instruction,
    make_peak,
    make_read,
    measure_peak,
    read_bytes,
)
from nanovllm.model.kernels.build.packing import aligned_zeros
from nanovllm.model.kernels.build.target import PER_WORD, KernelTarget, host_target

HOST = host_target()
TARGETS = [
    KernelTarget(lanes=lanes, is_x86=HOST.is_x86) for lanes in (16, 8, 4) if lanes <= HOST.lanes
]


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("streams", [1, 4])
def test_every_number_is_read(target: KernelTarget, streams: int) -> None:
    memory = aligned_zeros(4 * 1024).view(np.int32)
    memory[:] = np.random.default_rng(0).integers(-1000, 1000, memory.shape, dtype=np.int32)
    total = make_read(target, streams)(memory.ctypes.data, memory.nbytes // streams, 3)
    assert total == 3 * memory.sum()


@pytest.mark.parametrize("kind", KINDS)
def test_every_multiply_add_is_done(kind: str) -> None:
    lanes = HOST.lanes
    if not has_instruction(kind, HOST):
        pytest.skip(f"this CPU has no {kind} instruction")
    state = aligned_zeros(64 * lanes)
    sums = state[lanes:] if kind != "int8" else state[lanes:].view(np.int32)
    sums[:] = 1
    if kind == "float32":
        state[:lanes] = 3.0
    else:  # pairs of 3.0, or groups of four threes
        state[:lanes].view(np.uint32)[:] = 0x40404040 if kind == "bfloat16" else 0x03030303
    expected = 1 + 100 * 9 * PER_WORD[kind]
    make_peak(kind, HOST)(state.ctypes.data, 100)
    changed = sums[sums != 1]
    assert changed.size >= 8 * lanes
    np.testing.assert_allclose(changed, expected, rtol=1e-3)


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


def test_a_peak_without_an_instruction_is_none() -> None:
    assert measure_peak("int8", 1, target=KernelTarget(lanes=4)) is None
    for kind in KINDS:
        assert (measure_peak(kind, 1) is None) == (not has_instruction(kind, HOST))
