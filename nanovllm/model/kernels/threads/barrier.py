"""Work counters and barriers of threads that run one compiled function, and waiting for a run.

A run is a sequence of phases. A phase has a counter of items handed out and a counter of items
computed. A thread takes items until none are left. The barrier at the end of a phase opens when all
*items* are computed, not when all threads have arrived. So a descheduled thread delays the others
only while it holds an item; a thread that comes late finds no items left and catches up.

Thread 0 is the caller's and takes part in every run. The others, the helpers, are *active* while
they may access the run's memory: from entering a run (worker.py) until its end, except while they
wait at a barrier. Thread 0 ends a run by closing its generation and waiting for active helpers. A
helper that waited at a barrier then finds the generation closed and leaves.

A barrier takes 50 ns when the threads arrive together. A waiting thread first spins, because the
others usually arrive soon, and then sleeps in the operating system, which leaves the core to a
thread with work. Yielding with sched_yield instead would cost a time slice a poll beside a busy
process.

No wake-up is lost: a thread counts itself as a sleeper before it checks its condition for the last
time, and the others change the condition before they check for sleepers. The same protocol (Dekker)
decides between a helper that becomes active and thread 0 that closes the generation.

A thread that fails sets the job's field `abort`; from then on no thread waits.
"""

from nanovllm.model.kernels.build.compiler import compiled, outlined
from nanovllm.model.kernels.build.layout import (
    ABORT,
    ACTIVE,
    ASLEEP,
    CLOCK,
    CONDITION,
    DONE,
    ENTERED,
    GENERATION,
    IDLE,
    IDLE_CONDITION,
    NEXT,
    RUN_THREADS,
    SPINS,
    STALLED_NS,
    THREAD_BYTES,
    THREADS,
)
from nanovllm.model.kernels.threads import os_wait
from nanovllm.model.kernels.threads.atomics import atomic_add, atomic_load, atomic_store, relax


@compiled
def spin(job: int, count: int) -> None:
    """Poll `count` times; Python times this to convert seconds to polls."""
    for _ in range(count):
        if atomic_load(job + ABORT) != 0:
            return
        relax()


@compiled
def wake(job: int) -> None:
    """Wake all sleeping threads."""
    os_wait.lock(job)
    os_wait.wake(job, CONDITION)
    os_wait.wake(job, IDLE_CONDITION)
    os_wait.unlock(job)


@compiled
def wake_sleepers(job: int) -> None:
    """Wake the threads that sleep in a run, if any; idle helpers sleep on."""
    if atomic_load(job + ASLEEP) > 0:
        os_wait.lock(job)
        os_wait.wake(job, CONDITION)
        os_wait.unlock(job)


@compiled
def open_run(job: int) -> None:
    """Open a generation and wake helpers that are idle or sleep at a barrier of an earlier run."""
    atomic_add(job + GENERATION, 1)
    if atomic_load(job + IDLE) > 0 or atomic_load(job + ASLEEP) > 0:
        wake(job)


@compiled
def take_item(phase: int) -> int:
    """Take the next item of a phase; past the last item when none is left."""
    return atomic_add(phase + NEXT, 1)


@outlined
def barrier(job: int, phase: int, thread: int, count: int, total: int) -> bool:
    """Add `count` computed items to a phase and wait until all `total` items are computed.

    Returns:
        Whether to continue: False when the run has failed, or has ended without this helper.
    """
    if count > 0 and atomic_add(phase + DONE, count) + count == total:
        wake_sleepers(job)
    if atomic_load(phase + DONE) < total:
        if thread == 0:
            stalled_ns = _wait_for_items(job, phase, 0, total, 0)
            if stalled_ns > 0:
                atomic_add(job + STALLED_NS, stalled_ns)
        else:
            return _wait_inactive(job, phase, thread, total)
    return atomic_load(job + ABORT) == 0


@compiled
def activate(job: int, thread: int, generation: int) -> bool:
    """Make a helper active in a run; return False, and leave it inactive, if the run is closed."""
    line = job + THREADS + thread * THREAD_BYTES
    atomic_store(line + ENTERED, generation)
    atomic_store(line + ACTIVE, 1)
    if atomic_load(job + GENERATION) == generation:
        return True
    deactivate(job, thread)
    return False


@compiled
def deactivate(job: int, thread: int) -> None:
    """Make a helper inactive, and wake thread 0 if it has closed the run and may wait for it."""
    line = job + THREADS + thread * THREAD_BYTES
    atomic_store(line + ACTIVE, 0)
    if atomic_load(job + GENERATION) != atomic_load(line + ENTERED):
        wake_sleepers(job)


@compiled
def wait_for_helpers(job: int, threads: int) -> None:
    """Wait until no helper of a closed run is active, or the run has failed."""
    for thread in range(1, threads):
        active = job + THREADS + thread * THREAD_BYTES + ACTIVE
        for _ in range(atomic_load(job + SPINS)):
            if atomic_load(active) == 0 or atomic_load(job + ABORT) != 0:
                break
            relax()
        if atomic_load(active) != 0:
            clock = job + THREADS + CLOCK
            asleep_ns = os_wait.now_ns(clock)
            os_wait.lock(job)
            atomic_add(job + ASLEEP, 1)
            while atomic_load(active) != 0 and atomic_load(job + ABORT) == 0:
                os_wait.wait(job, CONDITION)
            atomic_add(job + ASLEEP, -1)
            os_wait.unlock(job)
            atomic_add(job + STALLED_NS, os_wait.now_ns(clock) - asleep_ns)


@compiled
def wait_for_run(job: int, thread: int, generation: int, spins: int) -> int:
    """Wait for a run after `generation` that includes this helper, or for `abort`.

    Returns:
        The job's generation.
    """
    for _ in range(spins):
        if _is_due(job, thread, generation):
            return atomic_load(job + GENERATION)
        relax()
    os_wait.lock(job)
    atomic_add(job + IDLE, 1)
    while not _is_due(job, thread, generation):
        os_wait.wait(job, IDLE_CONDITION)
    atomic_add(job + IDLE, -1)
    os_wait.unlock(job)
    return atomic_load(job + GENERATION)


@compiled
def _is_due(job: int, thread: int, generation: int) -> bool:
    now = atomic_load(job + GENERATION)
    is_open = now > generation and now % 2 == 1
    return (is_open and thread < atomic_load(job + RUN_THREADS)) or atomic_load(job + ABORT) != 0


@compiled
def _wait_inactive(job: int, phase: int, thread: int, total: int) -> bool:
    """Wait at a barrier as an inactive helper; return whether its run is open and sound."""
    generation = atomic_load(job + THREADS + thread * THREAD_BYTES + ENTERED)
    deactivate(job, thread)
    stalled_ns = _wait_for_items(job, phase, thread, total, generation)
    if not activate(job, thread, generation):
        return False
    if stalled_ns > 0:
        atomic_add(job + STALLED_NS, stalled_ns)
    return atomic_load(job + ABORT) == 0


@compiled
def _wait_for_items(job: int, phase: int, thread: int, total: int, generation: int) -> int:
    """Wait until all items of a phase are computed, the run has failed, or `generation` is closed.

    Thread 0, which closes generations, passes 0.

    Returns:
        Nanoseconds that the thread has slept.
    """
    for _ in range(atomic_load(job + SPINS)):
        if not _must_wait(job, phase, total, generation):
            return 0
        relax()
    clock = job + THREADS + thread * THREAD_BYTES + CLOCK
    asleep_ns = os_wait.now_ns(clock)
    os_wait.lock(job)
    atomic_add(job + ASLEEP, 1)
    while _must_wait(job, phase, total, generation):
        os_wait.wait(job, CONDITION)
    atomic_add(job + ASLEEP, -1)
    os_wait.unlock(job)
    return os_wait.now_ns(clock) - asleep_ns


@compiled
def _must_wait(job: int, phase: int, total: int, generation: int) -> bool:
    if atomic_load(phase + DONE) >= total or atomic_load(job + ABORT) != 0:
        return False
    return generation == 0 or atomic_load(job + GENERATION) == generation
