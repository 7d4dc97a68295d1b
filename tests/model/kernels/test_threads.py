"""Barriers and counters under several threads at once."""

import threading
from typing import Any

import numpy as np
import pytest

from nanovllm.model.kernels import system, threads
from nanovllm.model.kernels.compiler import compiled
from nanovllm.model.kernels.layout import (
    ABORT,
    ARRIVED,
    ASLEEP,
    CONDITION,
    GENERATION,
    JOB,
    LINE_BYTES,
    LOCK,
)
from nanovllm.model.kernels.packing import aligned_zeros


@compiled
def prepare(job: int) -> None:
    system.prepare_lock(job)


@compiled
def take_turns(job: int, numbers: Any, thread: int, count: int, rounds: int) -> int:
    """Every thread writes its number of the round, then reads what all have written; returns how many it found wrong."""
    wrong = 0
    for turn in range(rounds):
        numbers[thread] = turn
        threads.barrier(job + ARRIVED, (2 * turn + 1) * count)
        for other in range(count):
            wrong += numbers[other] != turn
        threads.barrier(job + ARRIVED, (2 * turn + 2) * count)
    return wrong


@compiled
def wait_for_generation(job: int, generation: int, spins: int) -> None:
    threads.wait_for(job, job + GENERATION, generation, spins)


@compiled
def begin_generation(job: int, generation: int) -> None:
    threads.count(job, job + GENERATION, generation)


@compiled
def give_up(job: int) -> None:
    threads.atomic_add(job + ABORT, 1)
    threads.wake(job)


class Job:
    """Memory of a job; `spins` says how long waiting threads look before they sleep."""

    def __init__(self, *, spins: int) -> None:
        self._memory = aligned_zeros(JOB.itemsize // 4)
        self.words = self._memory.view(JOB)[0]
        self.address = self._memory.ctypes.data
        self.words["spins"] = spins
        prepare(self.address)


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
def test_nobody_passes_a_barrier_before_all_have_come(spins: int, count: int) -> None:
    job, numbers, wrong = Job(spins=spins), np.full(count, -1, dtype=np.int64), []
    rounds = 300

    def share(number: int) -> None:
        wrong.append(take_turns(job.address, numbers, number, count, rounds))

    join(in_threads(count, share))
    assert wrong == [0] * count
    assert job.words["arrived"] == 2 * rounds * count
    assert job.words["asleep"] == 0


@pytest.mark.parametrize("spins", [0, 100])
def test_who_waits_is_woken_by_what_it_waits_for(spins: int) -> None:
    job, woken = Job(spins=0), []

    def wait(generation: int, _number: int) -> None:
        wait_for_generation(job.address, generation, spins)
        woken.append((generation, int(job.words["generation"])))

    for generation in range(1, 100):
        waiting = in_threads(2, wait, generation)
        assert len(woken) == 2 * (generation - 1), "nobody goes on before its generation has begun"
        begin_generation(job.address, generation)
        join(waiting)
    assert woken == [(generation, generation) for generation in range(1, 100) for _ in range(2)]
    assert job.words["asleep"] == 0


def test_nobody_waits_in_a_job_that_has_failed() -> None:
    job = Job(spins=0)
    waiting = in_threads(3, lambda _: wait_for_generation(job.address, 1, 0))
    while job.words["asleep"] < 3:
        pass
    give_up(job.address)
    join(waiting)
    wait_for_generation(job.address, 10, 5)
    assert threads.has_failed(job.address + ARRIVED)
    assert job.words["asleep"] == 0


def test_words_that_change_in_a_run_share_no_cache_line() -> None:
    assert Job(spins=0).address % LINE_BYTES == 0
    lines = [
        offset // LINE_BYTES for offset in (GENERATION, ARRIVED, ABORT, ASLEEP, LOCK, CONDITION)
    ]
    assert len(set(lines)) == len(lines)
    assert JOB.itemsize >= CONDITION + 4 * LINE_BYTES
