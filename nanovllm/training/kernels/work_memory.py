"""Working memory of an operation: parts of one block, taken in order and given back together.

An operation needs several arrays until its end, such as packed matrices. Taking a part is an
addition, where an array of the pool (array_pool.py) takes some microseconds.
"""

from dataclasses import dataclass

import numpy as np

from nanovllm.model.kernels.build.layout import LINE_BYTES, WORD_BYTES
from nanovllm.model.kernels.build.packing import aligned_zeros, round_up

_LINE_FLOATS = LINE_BYTES // WORD_BYTES


@dataclass(frozen=True, slots=True)
class WorkArray:
    """A part of the working memory, of float32 with arbitrary contents.

    Attributes:
        address: of its first element, aligned to a cache line.
    """

    address: int
    block: np.ndarray
    first: int
    count: int

    @property
    def array(self) -> np.ndarray:
        """The part as an array."""
        return self.block[self.first : self.first + self.count]


class WorkMemory:
    """The working memory of one operation at a time."""

    def __init__(self) -> None:
        """Begin without memory."""
        self._block = aligned_zeros(0)
        self._address = 0
        self._taken = self._needed = 0

    @property
    def size_bytes(self) -> int:
        """Bytes of the block."""
        return self._block.nbytes

    def clear(self) -> None:
        """Give back all parts; an operation calls this before it takes its first one."""
        if self._needed > self._block.size:
            self._block = aligned_zeros(self._needed)
            self._address = self._block.ctypes.data
        self._taken = self._needed = 0

    def take(self, count: int) -> WorkArray:
        """Return a part of `count` elements.

        The first operation that needs more than the block has gets memory of its own; `clear` then
        makes the block large enough.
        """
        # A cache line lies between two parts, so that bounds.py sees an access beyond a part.
        size = round_up(count, _LINE_FLOATS) + _LINE_FLOATS
        first = self._taken
        self._needed += size
        if first + size > self._block.size:
            own = aligned_zeros(size)
            return WorkArray(own.ctypes.data, own, 0, count)
        self._taken += size
        return WorkArray(self._address + first * WORD_BYTES, self._block, first, count)
