"""Numbers on which compiled code and the Python that calls it agree; known without Numba.

A job is the memory through which a step's threads speak to each other, every word of it on a cache line of its own:

    | generation | finished | arrived | abort | asleep | function argument closing | lock ... | condition ... |
"""

import numpy as np

F32_BYTES = 4
LINE_BYTES = 64
"""What stands a cache line apart can be changed by several threads without making them wait for each other."""
_PRIMITIVE_BYTES = 4 * LINE_BYTES  # more than a lock or a condition of any operating system

_JOB_OFFSETS = {
    "generation": 0,
    "finished": LINE_BYTES,
    "arrived": 2 * LINE_BYTES,
    "abort": 3 * LINE_BYTES,
    "asleep": 4 * LINE_BYTES,
    "function": 5 * LINE_BYTES,
    "argument": 5 * LINE_BYTES + 8,
    "closing": 5 * LINE_BYTES + 16,
}
LOCK = 6 * LINE_BYTES
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

generation  number of the run; helpers wait for it to change       function, argument  what the run calls: function(argument, thread)
finished    helpers that are done with the run                     closing             1 when the helpers are to leave
arrived     arrivals at the barriers of the run                    asleep              helpers that wait on the condition
abort       not 0 when the run has failed: nobody waits any more
"""
GENERATION, FINISHED, ARRIVED, ABORT, ASLEEP, FUNCTION, ARGUMENT, CLOSING = _JOB_OFFSETS.values()
