"""Memory layouts that compiled code and its Python callers agree on; needs no Numba.

A job is the memory through which the threads of a run communicate. Fields that several threads
change lie on cache lines of their own:

    | generation | abort | asleep | idle | stalled_ns |
    | function argument threads spins idle_spins times |
    | lock ... | condition ... | idle condition ... |
    | thread 0: active entered clock | thread 1: ... |
    | phase 0: next | phase 0: done | phase 1: next | ...
"""

import numpy as np

WORD_BYTES = 4
"""A 32-bit word: a float32, an int32, or narrower numbers packed together."""
INT_BYTES = 8
"""An int64."""
LINE_BYTES = 64
"""A cache line, and the widest vector. Fields a line apart are free of false sharing."""
_PRIMITIVE_BYTES = 4 * LINE_BYTES  # more than a lock or a condition of any operating system

_LINES = ("generation", "abort", "asleep", "idle", "stalled_ns", "function")
_JOB_OFFSETS = {name: line * LINE_BYTES for line, name in enumerate(_LINES)}
_JOB_OFFSETS |= {
    name: _JOB_OFFSETS["function"] + INT_BYTES * index
    for index, name in enumerate(("argument", "threads", "spins", "idle_spins", "times"), start=1)
}
LOCK = len(_LINES) * LINE_BYTES
CONDITION = LOCK + _PRIMITIVE_BYTES
IDLE_CONDITION = CONDITION + _PRIMITIVE_BYTES
THREADS = IDLE_CONDITION + _PRIMITIVE_BYTES
"""Byte offset of the threads' lines, THREAD_BYTES each."""

JOB = np.dtype(
    {
        "names": list(_JOB_OFFSETS),
        "formats": [np.int64] * len(_JOB_OFFSETS),
        "offsets": list(_JOB_OFFSETS.values()),
        "itemsize": THREADS,
    }
)
"""Fields of a job, int64.

generation   odd while a run is open to helpers, even between runs
abort        not 0 once the run has failed: no thread waits any more
asleep       threads that sleep in a run: at a barrier, or until helpers are inactive
idle         helpers that sleep between two runs
stalled_ns   nanoseconds that threads have slept at barriers, summed over threads
function     address of the function that a run calls, as function(argument, thread)
threads      number of threads that may enter the run
spins        polls at a barrier before a thread sleeps
idle_spins   polls between two runs before a helper sleeps
times        address of int64 [phases][threads][MOMENTS], which receive the nanoseconds at which a
             thread began a phase, ended its last item, and passed the barrier; or 0
"""
MOMENTS = 3
(
    GENERATION, ABORT, ASLEEP, IDLE, STALLED_NS, FUNCTION, ARGUMENT, RUN_THREADS, SPINS, IDLE_SPINS,
    TIMES,
) = _JOB_OFFSETS.values()  # fmt: skip

THREAD_BYTES = LINE_BYTES
ACTIVE, ENTERED, CLOCK = 0, 8, 16
"""Byte offsets in a thread's line: whether it may access the run's memory, the generation that it
has entered, and 16 bytes for a clock reading."""

PHASE_BYTES = 2 * LINE_BYTES
NEXT, DONE = 0, LINE_BYTES
"""Byte offsets in a phase: the next item to hand out, and the number of computed items."""
