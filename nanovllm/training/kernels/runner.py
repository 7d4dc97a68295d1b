"""Calls of compiled operations: their records, the threads, and the memory of their results."""

import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from ctypes import addressof, c_char
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from nanovllm.model.kernels.build.bounds import watch
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.threads.pool import ThreadPool
from nanovllm.training.kernels.array_pool import ArrayPool, Lease
from nanovllm.training.kernels.library import load_operations
from nanovllm.training.kernels.records import DTYPES, MAX_PHASES, RECORDS
from nanovllm.training.kernels.work_memory import WorkArray, WorkMemory

_SHARED_WORK = 500_000
"""Arithmetic operations below which one thread is faster than several."""
_FLOAT32 = np.dtype(np.float32)

Argument = np.ndarray | WorkArray | float | None
_THREADS_FIELD = 2  # of a record: job_ptr, phases_ptr, threads


@dataclass(frozen=True, slots=True)
class _OperationCall:
    """A recorded call of an operation.

    Attributes:
        work: about how many arithmetic operations it has.
        entry: address of the compiled function.
        integers: its record.
        address: of the record.
        owners: arrays to whose memory the record refers, except that of the pool.
    """

    name: str
    work: int
    entry: int
    integers: np.ndarray
    address: int
    owners: tuple[np.ndarray, ...]


RecordedCall = Callable[[], float | None]
_T = TypeVar("_T", bound=float | None)


class OperationRunner:
    """Runs compiled operations on a pool of threads; for one caller at a time.

    Attributes:
        arrays: makes the arrays of results.
        work: the working memory of an operation.
        target: what the operations are compiled for.
    """

    def __init__(self, num_threads: int, target: KernelTarget) -> None:
        """Load or compile the operations, and start the threads."""
        self.arrays = ArrayPool()
        self.work = WorkMemory()
        self.target = target
        self._library = load_operations(target)
        self._pool = ThreadPool(num_threads, self._library, phases=MAX_PHASES)
        self._records = {name: _Record(dtype) for name, dtype in RECORDS.items()}
        self._phases_ptr = self._pool.phases
        self._calls: list[RecordedCall] | None = None

    @property
    def threads(self) -> int:
        """Threads that compute a large operation."""
        return self._pool.threads

    def run(self, name: str, work: int, **arguments: Argument) -> None:
        """Run an operation to its end.

        Args:
            name: name of the entry.
            work: about how many arithmetic operations it has.
            arguments: the fields of its record, without `_ptr` and `_bits`. None is address 0.

        Raises:
            TypeError: an array has another type than the operation reads, or is not C-contiguous.
        """
        pool, record = self._pool, self._records[name]
        threads = self._choose_threads(name, work)
        record.write(pool.job, self._phases_ptr, threads, arguments)
        entry = self._library.addresses[name]
        if self._calls is not None:
            integers = record.integers.copy()
            owners = _owners(arguments)
            address = integers.ctypes.data
            call = _OperationCall(name, work, entry, integers, address, owners)
            self._calls.append(partial(self._repeat, call))
        if not self.target.check:
            pool.run(entry, record.address, threads)
            return
        with watch(self.target, name, self._memory(record, arguments)):
            pool.run(entry, record.address, threads)

    def call(self, function: Callable[[], _T]) -> _T:
        """Call a function of Python that is part of a pass, between its operations."""
        if self._calls is not None:
            self._calls.append(function)
        return function()

    @contextmanager
    def recording(self, calls: list[RecordedCall]) -> Iterator[None]:
        """Append all calls within the context to `calls`; calling them repeats them."""
        self._calls = calls
        try:
            yield
        finally:
            self._calls = None

    def close(self) -> None:
        """End the helper threads."""
        self._pool.close()

    def _repeat(self, call: _OperationCall) -> None:
        threads = self._choose_threads(call.name, call.work)
        call.integers[_THREADS_FIELD] = threads
        self._pool.run(call.entry, call.address, threads)

    def _choose_threads(self, name: str, work: int) -> int:
        return self._pool.choose_threads(name, work) if work >= _SHARED_WORK else 1

    def _memory(
        self, record: "_Record", arguments: Mapping[str, Argument]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yield all memory that an operation may access."""
        yield "the record", record.integers
        for name, argument in arguments.items():
            if isinstance(argument, WorkArray):
                yield name, argument.array
            elif isinstance(argument, np.ndarray):
                yield name, argument


class _Record:
    """The record of an operation. It keeps no arrays, whose memory ends with their last use."""

    def __init__(self, dtype: np.dtype) -> None:
        _, _, _, *fields = dtype.names or ()
        self._fields: list[tuple[str, np.dtype | None]] = []  # by field; None is a number
        layout = "<3q"  # a float32 is in the lower half of its integer
        for field in fields:
            name, _, kind = field.rpartition("_")
            layout += "f4x" if kind == "bits" else "q"
            if kind == "ptr":
                self._fields.append((name, DTYPES.get(name, _FLOAT32)))
            else:
                self._fields.append((name if kind == "bits" else field, None))
        self._struct = struct.Struct(layout)
        self.integers = np.zeros(len(fields) + 3, dtype=np.int64)
        self.address = self.integers.ctypes.data

    def write(
        self, job_ptr: int, phases_ptr: int, threads: int, arguments: Mapping[str, Argument]
    ) -> None:
        values = [
            arguments[name] if dtype is None else _address(name, arguments[name], dtype)
            for name, dtype in self._fields
        ]
        self._struct.pack_into(self.integers.data, 0, job_ptr, phases_ptr, threads, *values)


def _owners(arguments: Mapping[str, Argument]) -> tuple[np.ndarray, ...]:
    """Return the arrays that keep the memory of arguments, except that of the pool."""
    owners = []
    for argument in arguments.values():
        if isinstance(argument, WorkArray):
            owners.append(argument.block)
        elif isinstance(argument, np.ndarray):
            base: object = argument
            while isinstance(base, np.ndarray):
                base = base.base
            if not isinstance(base, Lease):
                owners.append(argument)
    return tuple(owners)


def _address(name: str, array: Argument, dtype: np.dtype) -> int:
    """Return the address of an array that an operation can read."""
    if array is None:
        return 0
    if type(array) is WorkArray:
        return array.address
    assert isinstance(array, np.ndarray)
    base: object = array.base
    if type(base) is Lease and array.dtype is dtype:
        return base.address
    flags = array.flags
    if array.dtype is not dtype or not flags.c_contiguous:
        order = "C order" if flags.c_contiguous else "another order"
        raise TypeError(
            f"{name} is {array.dtype} in {order}; compiled operations take {dtype} in C order"
        )
    if flags.writeable and array.size:
        return addressof(c_char.from_buffer(array.data))  # several times as fast as array.ctypes
    return array.ctypes.data
