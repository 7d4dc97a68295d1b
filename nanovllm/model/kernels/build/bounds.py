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
from typing import Any

import numpy as np
from llvmlite import ir
from numpy.lib.array_utils import byte_bounds

from nanovllm.model.kernels.build.layout import INT_BYTES
from nanovllm.model.kernels.build.packing import aligned_zeros
from nanovllm.model.kernels.build.target import KernelTarget

PAGE_BYTES = 4096
"""Larger than any access."""
_MAX_REGIONS = 1 << 14
_INTEGER = ir.IntType(64)
_REGIONS, _FAULTS, _ADDRESS, _BYTES, _SUBSTITUTE = range(5)
_HEADER_BYTES = 64
_LIST_OFFSET = _HEADER_BYTES + 2 * PAGE_BYTES  # bytes before the regions
_NAME = "nanovllm_checked"


class _Table:
    """The table of this process, used by one run at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        table_bytes = _LIST_OFFSET + 2 * INT_BYTES * _MAX_REGIONS
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
        first = _LIST_OFFSET // INT_BYTES
        self.integers[:first] = 0
        self.integers[first : first + regions.size] = regions.reshape(-1)
        self.integers[_REGIONS] = len(regions)


@cache
def _table() -> _Table:
    return _Table()


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
    table = _table()
    named = [(name, array) for name, array in arrays if array.size]
    regions = np.array([byte_bounds(array) for _, array in named], dtype=np.int64).reshape(-1, 2)
    with table.lock:
        table.allow(regions)
        yield
        _, faults, address, size, substitute = table.integers[: _SUBSTITUTE + 1].tolist()
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


def checked(builder: Any, address: Any, size: int, *, writes: bool) -> Any:
    """Emit a check of `size` bytes at an address; return the address, or that of a substitute."""
    table = _table()
    function = builder.module.globals.get(_NAME) or _emit(builder.module, table)
    return builder.call(
        function, [address, _INTEGER(size), _INTEGER(table.sink if writes else table.zeros)]
    )


def size_of(kind: Any) -> int:
    """Return the bytes of an LLVM scalar or vector type."""
    if isinstance(kind, ir.VectorType):
        return int(kind.count) * size_of(kind.element)
    if isinstance(kind, ir.IntType):
        return int(kind.width) // 8
    return {ir.FloatType(): 4, ir.DoubleType(): 8}[kind]


def _emit(module: Any, table: _Table) -> Any:
    """Emit checked(address, size, substitute), a linear search of the regions.

    Every module has a copy, and linking merges them.
    """
    function = ir.Function(module, ir.FunctionType(_INTEGER, [_INTEGER] * 3), _NAME)
    function.linkage = "linkonce_odr"
    function.attributes.add("noinline")
    address, size, substitute = function.args
    entry, head, compare, advance, inside, outside, done = (
        function.append_basic_block() for _ in range(7)
    )
    builder = ir.IRBuilder(entry)

    def pointer(address: Any) -> Any:
        return builder.inttoptr(address, ir.PointerType(_INTEGER))

    def field(index: int) -> Any:
        return pointer(_INTEGER(table.address + index * INT_BYTES))

    list_start = _INTEGER(table.address + _LIST_OFFSET)
    regions = builder.load(field(_REGIONS))
    list_end = builder.add(builder.mul(regions, _INTEGER(2 * INT_BYTES)), list_start)
    builder.branch(head)

    builder.position_at_end(head)
    region = builder.phi(_INTEGER)
    region.add_incoming(list_start, entry)
    builder.cbranch(builder.icmp_unsigned("<", region, list_end), compare, outside)

    builder.position_at_end(compare)
    start = builder.load(pointer(region))
    end = builder.load(pointer(builder.add(region, _INTEGER(INT_BYTES))))
    begins_inside = builder.and_(
        builder.icmp_unsigned(">=", address, start), builder.icmp_unsigned("<=", address, end)
    )
    fits = builder.icmp_unsigned(">=", builder.sub(end, address), size)
    builder.cbranch(builder.and_(begins_inside, fits), inside, advance)

    builder.position_at_end(advance)
    region.add_incoming(builder.add(region, _INTEGER(2 * INT_BYTES)), advance)
    builder.branch(head)

    builder.position_at_end(inside)
    builder.ret(address)

    builder.position_at_end(outside)
    faults_before = builder.atomic_rmw("add", field(_FAULTS), _INTEGER(1), "seq_cst")
    with builder.if_then(builder.icmp_unsigned("==", faults_before, _INTEGER(0))):
        for index, value in ((_ADDRESS, address), (_BYTES, size), (_SUBSTITUTE, substitute)):
            builder.store(value, field(index))
    builder.branch(done)

    builder.position_at_end(done)
    builder.ret(substitute)
    return function
