"""Barriers and counters under several threads at once."""

import threading
import time
from typing import Any

import numpy as np
import pytest

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import (
    ABORT,
    ASLEEP,
    CONDITION,
    DONE,
    GENERATION,
    IDLE,
    IDLE_CONDITION,
    JOB,
    LINE_BYTES,
    LOCK,
    NEXT,
    PHASE_BYTES,
    THREAD_BYTES,
    THREADS,
)
from nanovllm.model.kernels.build.packing import aligned_zeros
from nanovllm.model.kernels.threads import atomics, barrier, os_wait


@compiled
def prepare(job: int) -> None:
    os_wait.prepare_lock(job)


@compiled
def take_turns(job: int, numbers: Any, thread: int, items: int, rounds: int) -> int:
    """Write the number of the round into each item of a phase; return how many were wrong."""
    wrong = 0
    phase = job + THREADS + 8 * THREAD_BYTES
    for turn in range(rounds):
        done = 0
        item = barrier.take_item(phase)
        while item < items:
            wrong += numbers[item] != turn - 1
            numbers[item] = turn
            done += 1
            item = barrier.take_item(phase)
        if not barrier.barrier(job, phase, thread, done, items):
            return -1
        phase += PHASE_BYTES
    return wrong


@compiled
def wait_for_run(job: int, generation: int, spins: int) -> int:
    return barrier.wait_for_run(job, 1, generation, spins)


@compiled
def open_generation(job: int) -> None:
    barrier.open_run(job)


@compiled
def activate(job: int, thread: int, generation: int) -> bool:
    return barrier.activate(job, thread, generation)


@compiled
def deactivate(job: int, thread: int) -> None:
    barrier.deactivate(job, thread)


@compiled
def wait_for_helpers(job: int, count: int) -> None:
    barrier.wait_for_helpers(job, count)


@compiled
def wait_at_barrier(job: int, phase: int, thread: int, count: int, total: int) -> bool:
    return barrier.barrier(job, phase, thread, count, total)


@compiled
def give_up(job: int) -> None:
    atomics.atomic_add(job + ABORT, 1)
    barrier.wake(job)


class Job:
    """Memory of a job; waiting threads poll `spins` times before they sleep."""

    def __init__(self, *, spins: int, phases: int = 1) -> None:
        size = JOB.itemsize + 8 * THREAD_BYTES + phases * PHASE_BYTES
        self._memory = aligned_zeros(size // 4)
        self.words = self._memory[: JOB.itemsize // 4].view(JOB)[0]
        self.address = self._memory.ctypes.data
        self.words["spins"] = spins
        self.phase = self.address + JOB.itemsize + 8 * THREAD_BYTES
        self.words["threads"] = 8
        prepare(self.address)

    def done(self, phase: int) -> int:
        """Return the computed items of a phase."""
        offset = self.phase - self.address + phase * PHASE_BYTES + DONE
        return int(self._memory.view(np.int64)[offset // 8])


def in_threads(count: int, function: Any, *arguments: Any) -> list[threading.Thread]:
    started = [
        threading.Thread(target=function, args=(*arguments, number), daemon=True)
        for number in range(count)
    ]
    for thread in started:
        thread.start()
    return started


def join(started: list[threading.Thread]) -> None:
    for thread in started:
        thread.join(20)
        assert not thread.is_alive(), "it waits for ever"


@pytest.mark.parametrize("spins", [0, 3, 1000])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_no_thread_passes_a_barrier_before_all_items_are_computed(spins: int, count: int) -> None:
    rounds, items = 300, 7
    job, numbers = Job(spins=spins, phases=rounds), np.full(items, -1, dtype=np.int64)
    wrong = []

    def share(number: int) -> None:
        wrong.append(take_turns(job.address, numbers, number, items, rounds))

    join(in_threads(count, share))
    assert wrong == [0] * count
    assert [job.done(phase) for phase in range(rounds)] == [items] * rounds
    assert job.words["asleep"] == 0


@pytest.mark.parametrize("late", [1, 2])
def test_threads_that_come_late_find_everything_done_and_hold_up_nobody(late: int) -> None:
    rounds, items = 20, 7
    job, numbers = Job(spins=0, phases=rounds), np.full(items, -1, dtype=np.int64)
    assert take_turns(job.address, numbers, 0, items, rounds) == 0, "alone, without waiting"
    for number in range(1, 1 + late):
        assert take_turns(job.address, numbers, number, items, rounds) == 0
    assert (numbers == rounds - 1).all()
    assert [job.done(phase) for phase in range(rounds)] == [items] * rounds


@pytest.mark.parametrize("spins", [0, 100])
def test_helpers_are_woken_by_the_next_open_generation(spins: int) -> None:
    job, woken = Job(spins=0), []

    def wait(seen: int, _number: int) -> None:
        woken.append(wait_for_run(job.address, seen, spins))

    for run in range(50):
        waiting = in_threads(2, wait, 2 * run)
        assert len(woken) == 2 * run, "no helper goes on before the generation is open"
        open_generation(job.address)
        join(waiting)
        open_generation(job.address)  # which closes it
    assert woken == [2 * run + 1 for run in range(50) for _ in range(2)]
    assert job.words["asleep"] == 0


def test_a_helper_cannot_enter_a_run_that_is_closed() -> None:
    job = Job(spins=0)
    open_generation(job.address)
    assert activate(job.address, 1, 1)
    open_generation(job.address)
    assert not activate(job.address, 2, 1)
    waiting = in_threads(1, lambda _: wait_for_helpers(job.address, 3))
    waiting[0].join(0.05)
    assert waiting[0].is_alive(), "helper 1 is active"
    deactivate(job.address, 1)
    join(waiting)


def test_a_helper_that_waits_when_the_run_is_closed_is_not_waited_for_and_leaves() -> None:
    job = Job(spins=0)
    open_generation(job.address)
    assert activate(job.address, 1, 1)
    went_on: list[bool] = []

    def wait(_number: int) -> None:
        went_on.append(wait_at_barrier(job.address, job.phase, 1, 0, 5))

    waiting = in_threads(1, wait)
    while job.words["asleep"] < 1:
        pass
    open_generation(job.address)  # closes the run and wakes the helper
    wait_for_helpers(job.address, 2)
    join(waiting)
    assert went_on == [False]
    assert wait_at_barrier(job.address, job.phase, 0, 5, 5), "thread 0 has computed all"


def test_a_helper_that_a_run_leaves_out_sleeps_on() -> None:
    job, woken = Job(spins=0), []
    job.words["threads"] = 1
    waiting = in_threads(1, lambda _: woken.append(wait_for_run(job.address, 0, 0)))
    while job.words["idle"] < 1:
        pass
    open_generation(job.address)
    open_generation(job.address)  # which closes it
    waiting[0].join(0.05)
    assert (waiting[0].is_alive(), woken) == (True, [])
    job.words["threads"] = 2
    open_generation(job.address)
    join(waiting)
    assert woken == [3]


def test_idle_helpers_sleep_on_while_others_compute() -> None:
    job, woken = Job(spins=0, phases=50), []
    waiting = in_threads(1, lambda _: woken.append(wait_for_run(job.address, 0, 0)))
    while job.words["idle"] < 1:
        pass
    numbers = np.full(3, -1, dtype=np.int64)
    assert take_turns(job.address, numbers, 0, 3, 50) == 0
    assert (job.words["idle"], job.words["asleep"], woken) == (1, 0, [])
    open_generation(job.address)
    join(waiting)
    assert woken == [1]


def test_time_that_is_slept_at_a_barrier_is_counted() -> None:
    job = Job(spins=0)
    waiting = in_threads(1, lambda _: wait_at_barrier(job.address, job.phase, 0, 0, 1))
    while job.words["asleep"] < 1:
        pass
    time.sleep(0.02)
    wait_at_barrier(job.address, job.phase, 1, 1, 1)
    join(waiting)
    assert 15e6 < job.words["stalled_ns"] < 20e9


def test_no_thread_waits_in_a_job_that_has_failed() -> None:
    job = Job(spins=0)
    waiting = in_threads(3, lambda number: wait_at_barrier(job.address, job.phase, number, 0, 1))
    while job.words["asleep"] < 3:
        pass
    give_up(job.address)
    join(waiting)
    wait_for_run(job.address, 10, 5)
    assert not wait_at_barrier(job.address, job.phase, 0, 1, 1)
    assert job.words["asleep"] == 0


def test_words_that_change_in_a_run_share_no_cache_line() -> None:
    assert Job(spins=0).address % LINE_BYTES == 0
    offsets = (
        *(GENERATION, ABORT, ASLEEP, IDLE, LOCK, CONDITION, IDLE_CONDITION),
        *(THREADS, THREADS + THREAD_BYTES),
    )
    lines = [offset // LINE_BYTES for offset in offsets]
    assert len(set(lines)) == len(lines)
    assert NEXT // LINE_BYTES != DONE // LINE_BYTES
    assert PHASE_BYTES % LINE_BYTES == THREAD_BYTES % LINE_BYTES == 0
    assert JOB.itemsize >= CONDITION + 4 * LINE_BYTES
