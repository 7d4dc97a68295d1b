"""Numbers on which compiled code and the Python that calls it agree; known without Numba.

A job is the memory through which a step's threads speak to each other, the words that change in a run on cache lines of their own:

    | generation | finished | arrived | abort | asleep | function argument ... | lock ... | condition ... |
"""

import numpy as np

F32_BYTES = 4
LINE_BYTES = 64
"""What stands a cache line apart can be changed by several threads without making them wait for each other."""
_PRIMITIVE_BYTES = 4 * LINE_BYTES  # more than a lock or a condition of any operating system

_LINES = ("generation", "finished", "arrived", "abort", "asleep", "function")
_JOB_OFFSETS = {name: line * LINE_BYTES for line, name in enumerate(_LINES)}
_JOB_OFFSETS |= {
    name: _JOB_OFFSETS["function"] + 8 * place
    for place, name in enumerate(("argument", "helpers", "spins", "idle_spins"), start=1)
}
LOCK = len(_LINES) * LINE_BYTES
CONDITION = LOCK + _PRIMITIVE_BYTES

JOB = np.dtype(
    {
        "names": list(_JOB_OFFSETS),
        "formats": [np.int64] * len(_JOB_OFFSETS),
        "offsets": list(_JOB_OFFSETS.values()),
        "itemsize": CONDITION + _PRIMITIVE_BYTES,
    }
)
"""Words of a job.

generation  number of the run; helpers wait for the next           function, argument  what a run calls: function(argument, thread)
finished    helpers that are done with the run                     helpers             how many there are
arrived     arrivals at the barriers of the run                    spins               looks at a barrier before a thread sleeps
abort       not 0 when the run has failed: nobody waits any more   idle_spins          looks between two runs before a helper sleeps
asleep      threads that sleep
"""
GENERATION, FINISHED, ARRIVED, ABORT, ASLEEP, FUNCTION, ARGUMENT, HELPERS, SPINS, IDLE_SPINS = (
    _JOB_OFFSETS.values()
)
