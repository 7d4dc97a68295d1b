"""A pass as a plan: its operations in order, and a place in one block of memory for every array.

A pass is traced once for each shape of a batch: the tape calls its operations, and none of them
runs. From then on, passes run the operations of the plan, without the Python of the tape, as a
graph of CUDA operations does (https://developer.nvidia.com/blog/cuda-graphs/). The threads go
through many operations in one run, without returning to Python in between.

An array lives from the first operation that has it as an argument to the last one. Arrays whose
lives do not overlap may share memory. One pass runs at a time, so all plans share one block.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nanovllm.model.kernels.build.layout import LINE_BYTES, WORD_BYTES
from nanovllm.model.kernels.build.packing import aligned_zeros, round_up
from nanovllm.model.kernels.record import KernelMemory
from nanovllm.training.kernels.records import (
    CALLS_PER_RUN,
    DTYPES,
    OPERATIONS,
    RECORDS,
    RUN_CALLS,
)

RUN_WORK = 4_000_000_000
"""Arithmetic operations after which a run ends: some 10 ms."""


@dataclass(frozen=True, slots=True)
class OperationCall:
    """A call of a compiled operation.

    Attributes:
        work: about how many arithmetic operations it has.
        memory: its record, and the arrays to which the record refers.
    """

    name: str
    work: int
    memory: KernelMemory


class Run:
    """Calls that the threads go through together, without returning to Python.

    Attributes:
        calls: in their order, at most CALLS_PER_RUN.
        work: of all calls.
        memory: record of the entry.
    """

    def __init__(self, calls: Sequence[OperationCall]) -> None:
        """List the calls for the entry."""
        self.calls, self.work = calls, sum(call.work for call in calls)
        rows = [(OPERATIONS.index(call.name), call.memory.address) for call in calls]
        self.memory = KernelMemory(RECORDS[RUN_CALLS], DTYPES)
        self.memory.bind(calls=np.array(rows, dtype=np.int64))
        first = calls[0].memory
        self.memory.set(
            count=len(calls), **{name: first[name] for name in ("job", "phases", "threads")}
        )


def runs_of(calls: Sequence[OperationCall]) -> list[Run]:
    """Divide the calls of a pass into runs.

    A run of more than RUN_WORK ends, because the number of threads is chosen anew for each run.
    """
    runs: list[Run] = []
    waiting: list[OperationCall] = []
    for call in calls:
        waiting.append(call)
        if len(waiting) == CALLS_PER_RUN or sum(each.work for each in waiting) >= RUN_WORK:
            runs.append(Run(waiting))
            waiting = []
    return [*runs, Run(waiting)] if waiting else runs


class Block:
    """The memory of all plans.

    Attributes:
        address: of its first byte.
    """

    def __init__(self) -> None:
        """Begin without memory."""
        self._memory = aligned_zeros(0)
        self.address = 0

    @property
    def size_bytes(self) -> int:
        """Bytes of the block."""
        return self._memory.nbytes

    def reserve(self, size_bytes: int) -> None:
        """Make the block at least this large; its contents are lost, and its address may change."""
        if size_bytes > self._memory.nbytes:
            self._memory = aligned_zeros(0)  # never two blocks
            self._memory = aligned_zeros(size_bytes // WORD_BYTES)
            self.address = self._memory.ctypes.data


@dataclass(slots=True)
class Trace:
    """What a traced pass has called, in order.

    Attributes:
        arrays: those that the operations have made.
        checks: of the inputs, before the first operation.
        results: the loss, after the last operation.
    """

    arrays: list[np.ndarray] = field(default_factory=list)
    calls: list[OperationCall] = field(default_factory=list)
    checks: list[Callable[[], None]] = field(default_factory=list)
    results: list[Callable[[], float]] = field(default_factory=list)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """Return an array that nothing writes to: it has addresses, but no pages of memory."""
        array = np.empty(shape, dtype=dtype)
        self.arrays.append(array)
        return array


class Plan:
    """The operations of a traced pass on arrays with places in a block."""

    def __init__(self, trace: Trace, inputs: Sequence[np.ndarray], block: Block) -> None:
        """Give every array its place; `inputs` receive those of each pass."""
        self._inputs, self._block, self._block_address = inputs, block, 0
        self._checks, self._results = trace.checks, trace.results
        self._runs = runs_of(trace.calls)
        arrays = sorted(trace.arrays, key=lambda array: int(array.ctypes.data))
        starts = [int(array.ctypes.data) for array in arrays]
        sizes = [round_up(array.nbytes, LINE_BYTES) + LINE_BYTES for array in arrays]
        first, last = [len(trace.calls)] * len(arrays), [-1] * len(arrays)
        uses: list[tuple[KernelMemory, str, int, int]] = []
        for number, call in enumerate(trace.calls):
            for name in call.memory.arrays:
                index = bisect_right(starts, call.memory[name]) - 1
                offset = call.memory[name] - starts[index]
                if index >= 0 and offset < arrays[index].nbytes:
                    first[index], last[index] = min(first[index], number), number
                    uses.append((call.memory, name, index, offset))
        places, self._size_bytes = place(np.array(sizes), np.array(first), np.array(last))
        self._pointers = [
            (memory, name, int(places[index]) + offset) for memory, name, index, offset in uses
        ]

    def run(self, launch: Callable[[Run], None], inputs: Sequence[np.ndarray]) -> float:
        """Run the pass on other inputs and return its loss."""
        for array, values in zip(self._inputs, inputs, strict=True):
            array[...] = values
        for check in self._checks:
            check()
        self._block.reserve(self._size_bytes)
        if self._block_address != self._block.address:
            self._block_address = self._block.address
            for memory, name, offset in self._pointers:
                memory.point(name, self._block_address + offset)
        for run in self._runs:
            launch(run)
        return sum(result() for result in self._results)


def place(sizes: np.ndarray, first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the offset of each array in a block, and the size of the block.

    The largest array comes first, and each gets the lowest offset at which it overlaps with none
    that lives at the same time: "greedy by size" of Pisarchyk and Lee 2020 (arXiv:2001.03288).

    Args:
        sizes: of the arrays [arrays].
        first, last: the first and the last moment at which each array lives [arrays].
    """
    offsets = np.full_like(sizes, -1)
    for array in np.argsort(-sizes, kind="stable"):
        is_beside = (offsets >= 0) & (first <= last[array]) & (last >= first[array])
        beside = np.flatnonzero(is_beside)
        beside = beside[np.argsort(offsets[beside], kind="stable")]
        gap_starts = np.append(0, np.maximum.accumulate(offsets[beside] + sizes[beside]))
        gap_ends = np.append(offsets[beside], np.iinfo(np.int64).max)
        offsets[array] = gap_starts[np.argmax(gap_ends - gap_starts >= sizes[array])]
    return offsets, int((offsets + sizes).max(initial=0))
