"""A phase: one operation of a run, shared by several threads.

An operation divides its work into items. A thread takes the next item until none is left, so a fast
thread takes more of them. The barrier at the end opens when all items are computed, because the
next operation reads what this one wrote. Which thread computes an item changes no bit of it.

    operation(record, thread, phase, *arguments) -> next phase

A phase is the address of its counters. An operation that is called with ABORTED returns it at once,
so a list of operations needs no tests in between, as long as the run's memory outlives the helpers.
Nothing of a run that has ended without this thread may be read otherwise: it may be gone.
"""

from typing import Any

from nanovllm.model.kernels.build.compiler import compiled, outlined
from nanovllm.model.kernels.build.layout import (
    CLOCK,
    INT_BYTES,
    MOMENTS,
    PHASE_BYTES,
    THREAD_BYTES,
    THREADS,
    TIMES,
)
from nanovllm.model.kernels.threads import os_wait
from nanovllm.model.kernels.threads.atomics import atomic_load, atomic_store
from nanovllm.model.kernels.threads.barrier import barrier, take_item

ABORTED = 0
"""Instead of the next phase's address: the run has failed, or has ended without this thread."""
_ITEMS_PER_THREAD = 4  # cheap to hand out, and short enough that no thread waits long for another


def count_of(field: str) -> Any:
    """Return the compiled function (record, *arguments) -> the integer in a field."""

    @compiled
    def count(record: Any, *_arguments: Any) -> int:
        return record[field]

    return count


def make_phase(count_items: Any, compute: Any) -> Any:
    """Return an operation whose items the threads share.

    Args:
        count_items: compiled function (record, *arguments) -> number of items.
        compute: compiled function (record, thread, item, *arguments), which computes one item.
    """

    def operation(record: Any, thread: int, phase: int, *arguments: Any) -> int:
        if phase == ABORTED:
            return ABORTED
        note_time(record.job_ptr, record.phases_ptr, record.threads, thread, phase, 0)
        items = count_items(record, *arguments)
        done = 0
        item = take_item(phase)
        while item < items:
            compute(record, thread, item, *arguments)
            done += 1
            item = take_item(phase)
        note_time(record.job_ptr, record.phases_ptr, record.threads, thread, phase, 1)
        following = end_phase(record, thread, phase, done, items)
        if following != ABORTED:  # else the record may be gone
            note_time(record.job_ptr, record.phases_ptr, record.threads, thread, phase, 2)
        return following

    operation.__name__ = compute.__name__  # shown while it is compiled
    return compiled(operation)


def make_row_phase(count_rows: Any, compute_row: Any) -> Any:
    """Return an operation on rows, of which an item is a few.

    Args:
        count_rows: compiled function (record, *arguments) -> number of rows.
        compute_row: compiled function (record, thread, row, *arguments), which computes one row.
    """

    @compiled
    def count_items(record: Any, *arguments: Any) -> int:
        rows = count_rows(record, *arguments)
        size = rows_per_item(record, rows)
        return int((rows + size - 1) // size)

    def compute_rows(record: Any, thread: int, item: int, *arguments: Any) -> None:
        rows = count_rows(record, *arguments)
        size = rows_per_item(record, rows)
        for row in range(item * size, min(rows, (item + 1) * size)):
            compute_row(record, thread, row, *arguments)

    compute_rows.__name__ = compute_row.__name__
    return make_phase(count_items, compiled(compute_rows))


@outlined
def note_time(
    job: int, phases_ptr: int, threads: int, thread: int, phase: int, moment: int
) -> None:
    """Store the time at a moment of a phase, if the job asks for it (layout.py)."""
    times_ptr = atomic_load(job + TIMES)
    if times_ptr != 0:
        index = (phase - phases_ptr) // PHASE_BYTES * threads + thread
        now_ns = os_wait.now_ns(job + THREADS + thread * THREAD_BYTES + CLOCK)
        atomic_store(times_ptr + (index * MOMENTS + moment) * INT_BYTES, now_ns)


@compiled
def end_phase(record: Any, thread: int, phase_ptr: int, done: int, items: int) -> int:
    """Wait until all `items` are done, `done` of them by this thread.

    Return the address of the next phase, or ABORTED.
    """
    if barrier(record.job_ptr, phase_ptr, thread, done, items):
        return phase_ptr + PHASE_BYTES
    return ABORTED


@compiled
def rows_per_item(record: Any, rows: int) -> int:
    """Return the number of rows in an item of an operation on `rows` rows."""
    return max(1, rows // (_ITEMS_PER_THREAD * record.threads))
