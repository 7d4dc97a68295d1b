"""NANOVLLM_CHECK=1: every address that a kernel reads or writes is looked up first, among the arrays that its run was given.

The idea is AddressSanitizer's (Serebryany and others 2012, https://www.usenix.org/conference/atc12/technical-sessions/presentation/serebryany),
with a list of the memory that is allowed in place of a map of the memory that is not. The list is a table, one in a process:

    regions | faults | address | bytes | instead       integers of 64 bits: how many regions; how many faults, and the first of them
    zeros                                              PAGE_BYTES, read in place of what is out of bounds
    sink                                               PAGE_BYTES, written in place of it
    start, end | start, end | ...                      the regions: addresses of an array's first byte and of the first behind it

The table's address is part of the code, so the table stays until the process ends, and the code is never kept in a file. After a fault the
run goes on with zeros or the sink: nothing crashes, and compiled code still neither raises nor allocates. Python looks at the table when
the run has ended. Prefetches, which never fault, and counters that several threads change are not looked up.

What is not seen is an access that leads out of one array and wholly into another. Between two arrays of `aligned_zeros` there is at least
the width of a vector, so that the first vector behind an array is always seen.
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numpy.lib.array_utils import byte_bounds

from nanovllm.model.kernels.build.packing import aligned_zeros
from nanovllm.model.kernels.build.target import KernelTarget

PAGE_BYTES = 4096
"""More than any one access."""
_MOST_REGIONS = 1 << 14
_INTEGER, _INT_BYTES = ir.IntType(64), 8
_REGIONS, _FAULTS, _ADDRESS, _BYTES, _INSTEAD = range(5)
_HEADER_BYTES = 64
_LIST_BYTES = _HEADER_BYTES + 2 * PAGE_BYTES  # where the regions begin
_NAME = "nanovllm_checked"


class _Table:
    """The table of this process, for one run at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.integers = aligned_zeros((_LIST_BYTES + 2 * _INT_BYTES * _MOST_REGIONS) // 4).view(
            np.int64
        )
        self.address = self.integers.ctypes.data
        self.zeros = self.address + _HEADER_BYTES
        self.sink = self.zeros + PAGE_BYTES

    def allow(self, regions: np.ndarray) -> None:
        """Begin a run that may touch these [start, end], and nothing else."""
        if len(regions) > _MOST_REGIONS:
            raise ValueError(
                f"{len(regions)} arrays are more than the {_MOST_REGIONS} that NANOVLLM_CHECK=1 can look after; use a smaller model"
            )
        first = _LIST_BYTES // _INT_BYTES
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
    """Around one run of a compiled function `entry`: where the target checks, it may touch these named arrays and nothing else.

    Raises:
        RuntimeError: it did; what the run computed is worth nothing.
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
        _, faults, address, size, instead = (
            int(number) for number in table.integers[: _INSTEAD + 1]
        )
    if faults:
        access = "wrote" if instead == table.sink else "read"
        where = _describe(address, [name for name, _ in named], regions)
        raise RuntimeError(
            f"{entry} {access} {size} bytes at address {address:#x}, {where}; {faults} accesses of this run were out of bounds"
        )


def _describe(address: int, names: list[str], regions: np.ndarray) -> str:
    """Where an address is, seen from the nearest region."""
    distances = np.maximum(np.maximum(regions[:, 0] - address, address - regions[:, 1]), 0)
    nearest = int(distances.argmin())
    start, end = regions[nearest].tolist()
    return f"{address - start} bytes from the beginning of {names[nearest]}, which has {end - start} bytes"


def checked(builder: Any, address: Any, size: int, *, writes: bool) -> Any:
    """Emit a look-up of `size` bytes at an address; the address, or that of the page which is used in its place."""
    table = _table()
    function = builder.module.globals.get(_NAME) or _emit(builder.module, table)
    return builder.call(
        function, [address, _INTEGER(size), _INTEGER(table.sink if writes else table.zeros)]
    )


def size_of(kind: Any) -> int:
    """Bytes of an LLVM number or vector."""
    if isinstance(kind, ir.VectorType):
        return int(kind.count) * size_of(kind.element)
    return (
        int(kind.width) // 8
        if isinstance(kind, ir.IntType)
        else {ir.FloatType(): 4, ir.DoubleType(): 8}[kind]
    )


def _emit(module: Any, table: _Table) -> Any:
    """checked(address, size, instead): walk down the regions; the same function in every module, and one when they are linked."""
    function = ir.Function(module, ir.FunctionType(_INTEGER, [_INTEGER] * 3), _NAME)
    function.linkage = "linkonce_odr"
    function.attributes.add("noinline")
    address, size, instead = function.args
    entry, head, look, following, found, missing, first = (
        function.append_basic_block() for _ in range(7)
    )

    def pointer(builder: Any, at: Any) -> Any:
        return builder.inttoptr(at, ir.PointerType(_INTEGER))

    def word(number: int) -> Any:
        return _INTEGER(table.address + number * _INT_BYTES)

    builder = ir.IRBuilder(entry)
    regions = builder.load(pointer(builder, word(_REGIONS)))
    end_of_list = builder.add(
        builder.mul(regions, _INTEGER(2 * _INT_BYTES)), _INTEGER(table.address + _LIST_BYTES)
    )
    builder.branch(head)

    builder.position_at_end(head)
    at = builder.phi(_INTEGER)
    at.add_incoming(_INTEGER(table.address + _LIST_BYTES), entry)
    builder.cbranch(builder.icmp_unsigned("<", at, end_of_list), look, missing)

    builder.position_at_end(look)
    start, end = (
        builder.load(pointer(builder, at)),
        builder.load(pointer(builder, builder.add(at, _INTEGER(_INT_BYTES)))),
    )
    begins_inside = builder.and_(
        builder.icmp_unsigned(">=", address, start), builder.icmp_unsigned("<=", address, end)
    )
    fits = builder.icmp_unsigned(">=", builder.sub(end, address), size)
    builder.cbranch(builder.and_(begins_inside, fits), found, following)

    builder.position_at_end(following)
    at.add_incoming(builder.add(at, _INTEGER(2 * _INT_BYTES)), following)
    builder.branch(head)

    builder.position_at_end(found)
    builder.ret(address)

    builder.position_at_end(missing)
    before = builder.atomic_rmw("add", pointer(builder, word(_FAULTS)), _INTEGER(1), "seq_cst")
    with builder.if_then(builder.icmp_unsigned("==", before, _INTEGER(0))):
        for number, value in ((_ADDRESS, address), (_BYTES, size), (_INSTEAD, instead)):
            builder.store(value, pointer(builder, word(number)))
    builder.branch(first)

    builder.position_at_end(first)
    builder.ret(instead)
    return function
