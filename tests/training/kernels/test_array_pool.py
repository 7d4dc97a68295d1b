"""Memory returns to the pool with the last reference, and only then."""

import weakref

import numpy as np
import pytest

from nanovllm.model.kernels.build import packing
from nanovllm.training.kernels import array_pool
from nanovllm.training.kernels.array_pool import ArrayPool


def test_memory_is_used_again_after_the_last_reference() -> None:
    pool = ArrayPool()
    array = pool.empty(10, 20)
    assert array.shape == (10, 20)
    assert array.dtype == np.float32
    address = array.ctypes.data
    assert address % 64 == 0
    view = array[3:].T
    del array
    other = pool.empty(10, 20)
    assert other.ctypes.data != address
    del view
    assert pool.empty(190).ctypes.data == address
    assert pool.allocated_bytes == 2 * 832


def test_memory_is_not_given_to_much_smaller_arrays() -> None:
    pool = ArrayPool()
    large = pool.empty(1000)
    address = large.ctypes.data
    del large
    assert pool.empty(100).ctypes.data != address
    assert pool.empty(900).ctypes.data == address


def test_the_pool_keeps_memory_whose_array_was_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after Ctrl-C at any moment: replayed passes may still write to it."""
    pool, allocated = ArrayPool(), []

    def aligned_zeros(count: int) -> np.ndarray:
        memory = packing.aligned_zeros(count)
        allocated.append(weakref.ref(memory))
        return memory

    monkeypatch.setattr(array_pool, "aligned_zeros", aligned_zeros)
    pool.empty(1000)
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(array_pool, "Lease", interrupt)
            with pytest.raises(KeyboardInterrupt):
                pool.empty(1000)
    assert len(allocated) == 2
    assert all(memory() is not None for memory in allocated)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt
