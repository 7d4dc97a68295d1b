"""Operating-system calls of compiled code: sleeping until woken, and a monotonic clock.

POSIX has locks and conditions in the pthread library, Windows has slim reader-writer locks and
condition variables. Neither kind has to be freed.
"""

import sys
import time
from typing import Any

from numba import types

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import CONDITION, IDLE_CONDITION, LOCK
from nanovllm.model.kernels.threads.atomics import atomic_load

_IS_WINDOWS = sys.platform == "win32"
_FOREVER = -1


def _function(name: str, *arguments: Any) -> Any:
    return types.ExternalFunction(name, types.int32(*arguments))


_acquire, _release, _wake_all = (
    _function(name, types.intp)
    for name in (
        ("AcquireSRWLockExclusive", "ReleaseSRWLockExclusive", "WakeAllConditionVariable")
        if _IS_WINDOWS
        else ("pthread_mutex_lock", "pthread_mutex_unlock", "pthread_cond_broadcast")
    )
)


@compiled
def lock(job: int) -> None:
    """Take the job's lock."""
    _acquire(job + LOCK)


@compiled
def unlock(job: int) -> None:
    """Give the job's lock back."""
    _release(job + LOCK)


@compiled
def wake(job: int, condition: int) -> None:
    """Wake the threads that wait for a condition."""
    _wake_all(job + condition)


def _make_windows() -> tuple[Any, ...]:
    sleep_on = _function(
        "SleepConditionVariableSRW", types.intp, types.intp, types.int32, types.int32
    )
    read_counter = _function("QueryPerformanceCounter", types.intp)
    tick_ns = round(time.get_clock_info("perf_counter").resolution * 1e9)  # the same counter

    @compiled
    def prepare_lock(job: int) -> None:
        """Do nothing: a lock and conditions of zeros are ready for use."""

    @compiled
    def wait(job: int, condition: int) -> None:
        sleep_on(job + condition, job + LOCK, _FOREVER, 0)

    @compiled
    def now_ns(clock: int) -> int:
        """Return a monotonic clock's nanoseconds; the 16 bytes at `clock` are scratch."""
        read_counter(clock)
        return atomic_load(clock) * tick_ns

    return prepare_lock, wait, now_ns


def _make_posix() -> tuple[Any, ...]:
    read_clock = _function("clock_gettime", types.int32, types.intp)
    monotonic = time.CLOCK_MONOTONIC
    mutex_init, cond_init = (
        _function(f"pthread_{kind}_init", types.intp, types.intp) for kind in ("mutex", "cond")
    )
    cond_wait = _function("pthread_cond_wait", types.intp, types.intp)

    @compiled
    def prepare_lock(job: int) -> None:
        mutex_init(job + LOCK, 0)
        cond_init(job + CONDITION, 0)
        cond_init(job + IDLE_CONDITION, 0)

    @compiled
    def wait(job: int, condition: int) -> None:
        cond_wait(job + condition, job + LOCK)

    @compiled
    def now_ns(clock: int) -> int:
        """Return a monotonic clock's nanoseconds; the 16 bytes at `clock` are scratch."""
        read_clock(monotonic, clock)
        return atomic_load(clock) * 1_000_000_000 + atomic_load(clock + 8)

    return prepare_lock, wait, now_ns


prepare_lock, wait, now_ns = _make_windows() if _IS_WINDOWS else _make_posix()
