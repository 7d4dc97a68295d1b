"""A few threads that enter one compiled function together.

The thread that calls `run` is thread 0. The others, the helpers, enter compiled code once
(worker.py) and stay there, without the interpreter and its GIL, so a busy Python thread cannot
delay a step. A descheduled helper is waited for only while it holds an item of work (barrier.py).

When a function fails or a helper has ended, `run` raises after all threads have left the function,
and the next run starts new helpers. So does the next run in a forked process, which inherits the
memory but not the threads.
"""

import os
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from nanovllm.model.kernels.build.codegen import Library
from nanovllm.model.kernels.build.layout import JOB, PHASE_BYTES, THREAD_BYTES, THREADS
from nanovllm.model.kernels.build.packing import aligned_zeros
from nanovllm.model.kernels.threads.contention import ThreadCount
from nanovllm.model.machine import usable_cpus

_SPIN_S = 50e-6
"""Time that a thread polls at a barrier before it sleeps. It is longer than most items take, so
threads that have cores rarely sleep, and short enough to leave the core to a descheduled thread."""
_IDLE_SPIN_S = 1e-3
"""The same between two runs: the next run usually follows soon, and waking a thread takes 30 us, on
an idle virtual machine 400 us."""
_CROWDED_SPINS = 50  # with more threads than CPUs, another thread needs this one
_TIMED_SPINS = 2000
_MIN_POLL_S, _MAX_POLL_S = 1e-9, 250e-9
"""Possible times of a poll: the x86 instruction `pause` takes up to 140 cycles. A measurement
outside was interrupted, or its clock did not tick."""


class ThreadPool:
    """`threads` threads, including the caller's; for one caller at a time.

    Attributes:
        times: int64 [phases, threads, MOMENTS] that receives the times of each run (layout.py),
            for which all threads are chosen; None to measure nothing.
    """

    def __init__(self, threads: int, library: Library, *, phases: int = 1) -> None:
        """Start the helpers, for runs of up to `phases` phases.

        Raises:
            RuntimeError: the operating system starts no more threads.
        """
        self.threads = threads
        self.times: np.ndarray | None = None
        self._library = library
        lines_bytes = THREADS + threads * THREAD_BYTES
        self._memory = aligned_zeros((lines_bytes + phases * PHASE_BYTES) // 4)
        self._address = self._memory.ctypes.data
        self._job = self._memory[: THREADS // 4].view(JOB)[0]
        self._phases = self._memory[lines_bytes // 4 :].reshape(phases, PHASE_BYTES // 4)
        self._pid = 0
        self._dismiss: weakref.finalize[Any, ThreadPool] | None = None
        self._start()
        self._set_spins()

    @property
    def job(self) -> int:
        """Address of the job, for the barriers of compiled functions."""
        return self._address

    @property
    def phases(self) -> int:
        """Address of the first phase; `run` resets phases."""
        return self._phases.ctypes.data

    def choose_threads(self, kind: str, work: int) -> int:
        """Return the number of threads for the next run; see ThreadCount.choose."""
        threads = self._count.choose(kind, work)
        return threads if self.times is None else self.threads

    def run(self, function: int, argument: int, threads: int, phases: int | None = None) -> None:
        """Call function(argument, thread) on up to `threads` threads.

        Args:
            function: address of a C function that returns 0 for success.
            argument: its first argument; the second is the number of the thread.
            threads: number of threads that may call it.
            phases: how many phases it may go through; None for all that there are.

        Raises:
            RuntimeError: a call failed, or a helper thread has ended.
        """
        job = self._job
        if self._pid != os.getpid() or job["abort"]:
            self._start()
        self._phases[:phases] = 0
        job["function"], job["argument"], job["stalled_ns"] = function, argument, 0
        job["times"] = 0 if self.times is None else self.times.ctypes.data
        started_s = time.perf_counter()
        self._library.functions["run_job"](self._address, threads)
        if job["abort"]:
            self.close()
            raise RuntimeError(
                "a thread of the compiled kernels has failed: what this step computed is lost, "
                "and the next one has new threads"
            )
        ended_s = time.perf_counter()
        self._count.record(threads, ended_s - started_s, int(job["stalled_ns"]) * 1e-9, ended_s)

    def close(self) -> None:
        """End the helpers; the next run would start them again."""
        if self._dismiss is not None:
            self._dismiss()
        self._pid = 0

    def _set_spins(self) -> None:
        """Convert polling times to numbers of polls, by timing some polls."""
        if self.threads > usable_cpus():
            self._job["spins"] = self._job["idle_spins"] = _CROWDED_SPINS
            return
        spin = self._library.functions["spin"]
        times_s = []
        for _ in range(3):  # the shortest is the least interrupted
            started_s = time.perf_counter()
            spin(self._address, _TIMED_SPINS)
            times_s.append(time.perf_counter() - started_s)
        poll_s = min(max(min(times_s) / _TIMED_SPINS, _MIN_POLL_S), _MAX_POLL_S)
        self._job["spins"] = int(_SPIN_S / poll_s)
        self._job["idle_spins"] = int(_IDLE_SPIN_S / poll_s)

    def _start(self) -> None:
        self.close()
        spins = int(self._job["spins"]), int(self._job["idle_spins"])
        self._memory[:] = 0
        # A failed run was chosen for and never recorded.
        self._count = ThreadCount(self.threads)
        self._job["spins"], self._job["idle_spins"] = spins
        self._library.functions["prepare_job"](self._address, 0)
        helpers: list[threading.Thread] = []
        self._pid = os.getpid()
        self._dismiss = weakref.finalize(
            self, _dismiss, self._library, self._memory, helpers, self._pid
        )
        for number in range(1, self.threads):
            arguments = (self._library, self._memory, number)
            name = f"nanovllm-kernels-{number}"
            helper = threading.Thread(target=_help, args=arguments, name=name, daemon=True)
            try:
                helper.start()
            except RuntimeError as error:
                self.close()
                raise RuntimeError(
                    f"num_threads is {self.threads}, but no more than {number} threads can be "
                    "had; lower it"
                ) from error
            helpers.append(helper)


def _help(library: Library, memory: Any, number: int) -> None:
    """Run a helper thread; it holds no reference to the pool, so an unused pool is collected."""
    try:
        library.functions["help_job"](memory.ctypes.data, number)
    finally:
        _abort(library, memory)  # nobody may wait for this thread any more


def _abort(library: Library, memory: Any) -> None:
    memory[: THREADS // 4].view(JOB)["abort"] = 1
    library.functions["wake_helpers"](memory.ctypes.data, 0)


def _dismiss(library: Library, memory: Any, helpers: Sequence[threading.Thread], pid: int) -> None:
    """End the helpers and join them; in a forked process there are none."""
    if pid != os.getpid():
        return
    _abort(library, memory)
    for helper in helpers:
        if helper is not threading.current_thread():
            helper.join()
