"""A phase: one operation of a run, shared by several threads.

An operation divides its work into items. A thread takes the next item until none is left, so a fast
thread takes more of them. The barrier at the end opens when all items are computed, because the
next operation reads what this one wrote. Which thread computes an item changes no bit of it.
"""

from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import PHASE_BYTES
from nanovllm.model.kernels.threads.barrier import barrier

ABORTED = 0
"""Instead of the next phase's address: the run has failed, or has ended without this thread."""
_ITEMS_PER_THREAD = 4  # cheap to hand out, and short enough that no thread waits long for another


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
