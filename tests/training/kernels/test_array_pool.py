"""Memory returns to the pool with the last reference, and only then."""

import numpy as np

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
