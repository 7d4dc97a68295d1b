"""A few threads that enter one compiled function together.

The thread that calls `run` is number 0. Each of the others has entered compiled code once (helpers.py) and stays there, where it needs
neither the interpreter nor its lock: a busy Python thread cannot delay a step.

When a function fails, or a helper is no longer there, `run` raises after all threads have come out, and the next run has new helpers. So has
the next run in a forked process, which inherits the memory but not the threads.
"""

import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any

from nanovllm.model.kernels.layout import ARRIVED, JOB
from nanovllm.model.kernels.library import Library
from nanovllm.model.kernels.packing import aligned_zeros
from nanovllm.model.kernels.processors import usable_processors

_SPINS = (50_000, 50_000)
"""Looks before a thread sleeps, each some 20 ns: 20 us at a barrier, since who comes later than that has no processor; 1 ms between two
runs, since the next step usually comes before, and waking a thread takes 30 us, on an idle virtual machine 400."""
_SPINS_CROWDED = (50, 50)  # with more threads than processors somebody needs this one


class ThreadPool:
    """`threads` threads, the one that calls among them; for one caller at a time."""

    def __init__(self, threads: int, library: Library) -> None:
        """Start the other threads; raises RuntimeError where the operating system has no more."""
        self.threads = threads
        self._library = library
        self._memory = aligned_zeros(JOB.itemsize // 4)
        self._address = self._memory.ctypes.data
        self._job = self._memory.view(JOB)[0]
        self._pid = 0
        self._dismiss: weakref.finalize[Any, ThreadPool] | None = None
        self._start()

    @property
    def arrived(self) -> int:
        """Address of the word at which the barriers of a run count."""
        return self._address + ARRIVED

    def run(self, function: int, argument: int, threads: int) -> None:
        """Call the C function at an address as function(argument, thread), on this thread alone (`threads` is 1) or on all of them.

        Raises:
            RuntimeError: a call returned something other than 0, or a helper thread has ended.
        """
        job = self._job
        if self._pid != os.getpid() or job["abort"]:
            self._start()
        job["function"], job["argument"], job["arrived"], job["finished"] = function, argument, 0, 0
        self._library.functions["run_job"](self._address, threads - 1)
        if job["abort"]:
            self.close()
            raise RuntimeError(
                "a thread of the compiled kernels has failed: what this step computed is lost, and the next one has new threads"
            )

    def close(self) -> None:
        """End the other threads; the next run would start them again."""
        if self._dismiss is not None:
            self._dismiss()
        self._pid = 0

    def _start(self) -> None:
        self.close()
        self._memory[:] = 0
        self._library.functions["prepare_job"](self._address, 0)
        self._job["helpers"] = self.threads - 1
        self._job["spins"], self._job["idle_spins"] = (
            _SPINS if self.threads <= usable_processors() else _SPINS_CROWDED
        )
        helpers: list[threading.Thread] = []
        self._pid = os.getpid()
        self._dismiss = weakref.finalize(
            self, _dismiss, self._library, self._memory, helpers, self._pid
        )
        for number in range(1, self.threads):
            arguments = (self._library, self._memory, number)
            helper = threading.Thread(
                target=_help, args=arguments, name=f"nanovllm-kernels-{number}", daemon=True
            )
            try:
                helper.start()
            except RuntimeError as error:
                self.close()
                raise RuntimeError(
                    f"num_threads is {self.threads}, but no more than {number} threads can be had; lower it"
                ) from error
            helpers.append(helper)


def _help(library: Library, memory: Any, number: int) -> None:
    """What a helper thread does all its life. It knows the pool's memory only, so that a pool which nobody needs can go."""
    try:
        library.functions["help_job"](memory.ctypes.data, number)
    finally:
        _abort(library, memory)  # nobody may wait for this thread any more


def _abort(library: Library, memory: Any) -> None:
    memory.view(JOB)["abort"] = 1
    library.functions["wake_helpers"](memory.ctypes.data, 0)


def _dismiss(library: Library, memory: Any, helpers: Sequence[threading.Thread], pid: int) -> None:
    """Send helpers home and wait until they have left; in a forked process there are none."""
    if pid != os.getpid():
        return
    _abort(library, memory)
    for helper in helpers:
        if helper is not threading.current_thread():
            helper.join()
