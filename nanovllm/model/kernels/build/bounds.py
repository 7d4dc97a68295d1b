"""NANOVLLM_CHECK=1: check every address that a kernel reads or writes against its run's arrays.

The idea is AddressSanitizer's (Serebryany et al. 2012,
https://www.usenix.org/conference/atc12/technical-sessions/presentation/serebryany), with a list of
the memory that is allowed instead of a map of the memory that is not. The list is a table, one in a
process:

    regions | faults | address | bytes | substitute   int64: number of regions and of faults, and
                                                      the first fault
    zeros                                             PAGE_BYTES, read instead of other memory
    sink                                              PAGE_BYTES, written instead of it
    start, end | start, end | ...                     regions: address of an array's first byte, and
                                                      of the first byte behind it

The table's address is compiled into the code, so the table stays until the process ends, and the
code is never saved. After a fault the run continues with zeros or the sink: nothing crashes, and
compiled code still neither raises nor allocates. Python reads the table when the run has ended.
Prefetches, which never fault, and counters that several threads change are not checked.

An access that leads out of one array and wholly into another is not detected. Two arrays of
`aligned_zeros` are at least a vector apart, so the first vector behind an array is always detected.
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
from numpy.lib.array_utils import byte_bounds

from nanovllm.model.kernels.build.layout import INT_BYTES
from nanovllm.model.kernels.build.packing import aligned_zeros
from nanovllm.model.kernels.build.target import KernelTarget

PAGE_BYTES = 4096
"""Larger than any access."""
_MAX_REGIONS = 1 << 14
REGIONS, FAULTS, ADDRESS, BYTES, SUBSTITUTE = range(5)
"""Fields of the table, in order."""
_HEADER_BYTES = 64
LIST_OFFSET = _HEADER_BYTES + 2 * PAGE_BYTES  # bytes before the regions


class Table:
    """The table of this process, used by one run at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        table_bytes = LIST_OFFSET + 2 * INT_BYTES * _MAX_REGIONS
        self.integers = aligned_zeros(table_bytes // 4).view(np.int64)
        self.address = self.integers.ctypes.data
        self.zeros = self.address + _HEADER_BYTES
        self.sink = self.zeros + PAGE_BYTES

    def allow(self, regions: np.ndarray) -> None:
        """Begin a run that may access the memory of `regions` only, each [start, end]."""
        if len(regions) > _MAX_REGIONS:
            raise ValueError(
                f"{len(regions)} arrays are more than the {_MAX_REGIONS} that NANOVLLM_CHECK=1 "
                "supports; use a smaller model"
            )
        first = LIST_OFFSET // INT_BYTES
        self.integers[:first] = 0
        self.integers[first : first + regions.size] = regions.reshape(-1)
        self.integers[REGIONS] = len(regions)


@cache
def shared_table() -> Table:
    """Return the table of this process."""
    return Table()


@contextmanager
def watch(
    target: KernelTarget, entry: str, arrays: Iterable[tuple[str, np.ndarray]]
) -> Iterator[None]:
    """Check the addresses of one run of a compiled function, where the target has checks.

    Args:
        target: what the function is compiled for.
        entry: its name, for the error.
        arrays: all memory that it may access, by name.

    Raises:
        RuntimeError: it accessed other memory; its results are worthless.
    """
    if not target.check:
        yield
        return
    table = shared_table()
    named = [(name, array) for name, array in arrays if array.size]
    regions = np.array([byte_bounds(array) for _, array in named], dtype=np.int64).reshape(-1, 2)
    with table.lock:
        table.allow(regions)
        yield
        _, faults, address, size, substitute = table.integers[: SUBSTITUTE + 1].tolist()
    if faults:
        access = "wrote" if substitute == table.sink else "read"
        location = _describe(address, [name for name, _ in named], regions)
        raise RuntimeError(
            f"{entry} {access} {size} bytes at address {address:#x}, {location}; "
            f"{faults} accesses of this run were out of bounds"
        )


def _describe(address: int, names: list[str], regions: np.ndarray) -> str:
    """Describe an address relative to the nearest region."""
    distances = np.maximum(np.maximum(regions[:, 0] - address, address - regions[:, 1]), 0)
    nearest = int(distances.argmin())
    start, end = regions[nearest].tolist()
    offset, size = address - start, end - start
    return f"{offset} bytes from the beginning of {names[nearest]}, which has {size} bytes"
