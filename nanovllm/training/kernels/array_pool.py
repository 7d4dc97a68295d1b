"""Arrays whose memory is used again, so that a step after the first allocates none.

The operating system clears each new page on its first write, which takes longer than most
elementwise operations. Here the memory of an array returns to the pool when the last reference to
the array and its views ends, and the next array of about that size takes it. The pool owns all
memory until its own end, whatever interrupts it.
"""

import math
import sys
from bisect import bisect_left, insort
from typing import Any

import numpy as np

from nanovllm.model.kernels.build.layout import LINE_BYTES
from nanovllm.model.kernels.build.packing import aligned_zeros, round_up

_FLOAT32 = np.dtype(np.float32)
_MAX_WASTE = 1.5  # memory may be this factor larger than the array that takes it


class ArrayPool:
    """Makes arrays aligned to a cache line, and keeps the memory of those no longer used.

    Attributes:
        allocated_bytes: memory of the pool and its arrays.
        num_arrays: number of arrays in use.
    """

    def __init__(self) -> None:
        """Begin without memory."""
        self._sizes: list[tuple[int, int]] = []  # bytes and address of unused memory, ascending
        self._memory: dict[int, np.ndarray] = {}  # all memory, by address; none is ever removed
        self.allocated_bytes = self.num_arrays = 0

    def empty(self, *shape: int, dtype: np.dtype[Any] = _FLOAT32) -> np.ndarray:
        """Return an array with arbitrary contents."""
        size_bytes = round_up(max(math.prod(shape), 1) * dtype.itemsize, LINE_BYTES)
        index = bisect_left(self._sizes, (size_bytes, 0))
        if index < len(self._sizes) and self._sizes[index][0] <= _MAX_WASTE * size_bytes:
            size_bytes, address = self._sizes.pop(index)
        else:
            memory = aligned_zeros(size_bytes // _FLOAT32.itemsize)
            address = memory.ctypes.data  # takes longer than the rest of this function
            self._memory[address] = memory
            self.allocated_bytes += size_bytes
        self.num_arrays += 1
        return np.asarray(Lease(self, address, size_bytes, shape, dtype))

    def give_back(self, address: int, size_bytes: int) -> None:
        """Keep memory at an address, of an array no longer used, for a later array."""
        self.num_arrays -= 1
        insort(self._sizes, (size_bytes, address))


class Lease:
    """The base of an array, which lives as long as the array or a view of it.

    Attributes:
        address: of the array whose `base` is the lease. A view of that array has another base.
    """

    def __init__(
        self,
        pool: ArrayPool,
        address: int,
        size_bytes: int,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
    ) -> None:
        self._pool, self.address, self._size_bytes = pool, address, size_bytes
        self.__array_interface__ = {
            "version": 3,
            "shape": shape,
            "typestr": dtype.str,
            "data": (address, False),
        }

    def __del__(self) -> None:
        if not sys.is_finalizing():  # then modules that the pool uses may be gone
            self._pool.give_back(self.address, self._size_bytes)
