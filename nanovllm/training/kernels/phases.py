"""Operations: phases that the threads go through together, each with items to share.

A phase (threads/phase.py) ends when all its items are computed. Its items may be of several kinds
of work, one after another; those that others wait for come first.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any, NamedTuple

from nanovllm.model.kernels.build.compiler import compiled, outlined
from nanovllm.model.kernels.simd.kernel import Record
from nanovllm.model.kernels.simd.memory import load_int, record_at
from nanovllm.model.kernels.simd.value import Value
from nanovllm.model.kernels.simd.vector import Vectors
from nanovllm.model.kernels.threads.phase import ABORTED, make_phase
from nanovllm.training.kernels.records import (
    ITEM_ELEMENTS,
    MAX_PHASES,
    OPERATIONS,
    RECORDS,
    RUN_CALLS,
)


class Work(NamedTuple):
    """Two compiled functions of a kind of work.

    count(record)                  number of items
    compute(record, thread, item)  computes an item
    """

    count: Any
    compute: Any


def make_operation(name: str, *phases: Sequence[Work]) -> Any:
    """Return operation(record_ptr, thread, phase) -> next phase, as in threads/phase.py.

    name    name of the operation and of its record
    phases  kinds of work of each phase, up to MAX_PHASES
    """
    assert len(phases) <= MAX_PHASES
    record_of = record_at(RECORDS[name])
    run_phases = reduce(_chain, [make_phase(*reduce(_join, kinds)) for kinds in phases])

    def operation(record_ptr: int, thread: int, phase: int) -> int:
        return int(run_phases(record_of(record_ptr), thread, phase))

    operation.__name__ = f"run_{name}"  # `outlined` knows functions by their names
    return outlined(operation)


def make_run_calls(operations: Mapping[str, Any]) -> Any:
    """Return the entry run_calls(record_ptr, thread), which Python calls.

    The threads go through the calls together, as through the phases of one operation. A helper that
    finds the run closed reads no more of its memory, which may be gone.
    """
    record_of = record_at(RECORDS[RUN_CALLS])
    listed = [operations[name] for name in OPERATIONS]
    run_operation = reduce(_or_else, enumerate(listed[1:], start=1), listed[0])

    @compiled
    def run_calls(record_ptr: int, thread: int) -> None:
        record = record_of(record_ptr)
        phase = record.phases_ptr
        for call in range(record.count):
            if phase == ABORTED:
                return
            number = load_int(record.calls_ptr, 2 * call)
            phase = run_operation(number, load_int(record.calls_ptr, 2 * call + 1), thread, phase)

    return run_calls


def split(field: str, size: int) -> Any:
    """Return count(record) of items that are `size` elements or rows of a field each."""

    @compiled
    def count(record: Any) -> int:
        return (record[field] + size - 1) // size

    return count


def item_elements(v: Vectors, record: Record, item: Value) -> tuple[Value, Value]:
    """Emit the index of an item's first element, and the number of its elements.

    An item has ITEM_ELEMENTS of the record's field `count`.
    """
    first = item * ITEM_ELEMENTS
    return first, v.minimum(record.count - first, ITEM_ELEMENTS)


@contextmanager
def item_rows(v: Vectors, record: Record, item: Value, size: int) -> Iterator[Value]:
    """Emit a loop over an item's rows, of which there are `size` of the record's field `rows`."""
    first = item * size
    with v.range(v.minimum(record.rows - first, size)) as i:
        yield first + i


def _join(first: Work, second: Work) -> Work:
    """Return the work whose items are those of the first kind and then those of the second."""
    count_first, compute_first = first
    count_second, compute_second = second

    @compiled
    def count(record: Any) -> int:
        return count_first(record) + count_second(record)

    @compiled
    def compute(record: Any, thread: int, item: int) -> None:
        items = count_first(record)
        if item < items:
            compute_first(record, thread, item)
        else:
            compute_second(record, thread, item - items)

    return Work(count, compute)


def _or_else(others: Any, numbered: tuple[int, Any]) -> Any:
    """Return the function that runs the operation of a number, or else one of the others."""
    number, operation = numbered
    is_first = number == 1  # `others` is a single operation

    @compiled
    def run_last(wanted: int, record_ptr: int, thread: int, phase: int) -> int:
        if wanted == number:
            return int(operation(record_ptr, thread, phase))
        return int(others(record_ptr, thread, phase))

    @compiled
    def run(wanted: int, record_ptr: int, thread: int, phase: int) -> int:
        if wanted == number:
            return int(operation(record_ptr, thread, phase))
        return int(others(wanted, record_ptr, thread, phase))

    return run_last if is_first else run


def _chain(first: Any, second: Any) -> Any:
    """Return the operation of two phases."""

    @compiled
    def run(record: Any, thread: int, phase_ptr: int) -> int:
        return int(second(record, thread, first(record, thread, phase_ptr)))

    return run
