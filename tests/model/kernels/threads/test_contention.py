"""The number of threads on a simulated machine follows the free cores, and trials cost little."""

import random
from collections.abc import Callable

import pytest

from nanovllm.model.kernels.threads.contention import ThreadCount

Model = Callable[[int], tuple[float, float]]
"""From a number of threads to seconds for a unit of work, and the share of time stalled."""


def idle(threads: int) -> tuple[float, float]:
    return 0.0020 / threads + 0.0004, 0.01


def busy(threads: int) -> tuple[float, float]:
    """Other programs use all cores but one: each further thread adds stalls."""
    return 0.0024 + 0.0012 * (threads - 1), 0.02 if threads == 1 else 0.3


def uneven(threads: int) -> tuple[float, float]:
    """Waits at barriers are long, but all threads are still fastest."""
    return 0.0020 / threads + 0.0004, 0.2


class Machine:
    """A simulated machine whose run times vary by a fifth."""

    def __init__(self, max_threads: int) -> None:
        self.count = ThreadCount(max_threads)
        self._max_threads = max_threads
        self.now_s = 100.0
        self._random = random.Random(7)

    def run(self, model: Model, seconds: float, *, kinds: int = 1) -> tuple[float, float]:
        """Run for some seconds; return the best number of threads' time, and the actual."""
        end_s, best_s, taken_s = self.now_s + seconds, 0.0, 0.0
        while self.now_s < end_s:
            work = 1 << self._random.randrange(kinds)
            threads = self.count.choose("forward", work)
            cost_s, stalled = model(threads)
            run_s = work * cost_s * self._random.uniform(0.8, 1.2)
            best_s += work * min(model(number)[0] for number in range(1, self._max_threads + 1))
            taken_s += run_s
            self.now_s += run_s + 0.0001
            self.count.record(threads, run_s, stalled * run_s * threads, self.now_s)
        return best_s, taken_s


@pytest.mark.parametrize("most", [2, 4, 16])
def test_all_threads_run_while_cores_are_free(most: int) -> None:
    machine = Machine(most)
    assert machine.count.threads == most
    machine.run(idle, 20)
    assert machine.count.threads == most


@pytest.mark.parametrize("most", [2, 4, 16])
@pytest.mark.parametrize("kinds", [1, 5])
def test_fewer_run_while_cores_are_taken_and_all_when_they_are_free_again(
    most: int, kinds: int
) -> None:
    machine = Machine(most)
    machine.run(idle, 5, kinds=kinds)
    machine.run(busy, 10, kinds=kinds)
    assert machine.count.threads == 1
    best_s, taken_s = machine.run(busy, 60, kinds=kinds)
    assert best_s / taken_s > 0.95, "trying more threads costs less than 5%"
    machine.run(idle, 20, kinds=kinds)
    assert machine.count.threads == most


def test_waits_that_fewer_threads_do_not_shorten_cost_little() -> None:
    machine = Machine(2)
    machine.run(uneven, 5)
    best_s, taken_s = machine.run(uneven, 60)
    assert best_s / taken_s > 0.95
    assert machine.count.threads == 2


def test_one_thread_has_no_choice_and_runs_of_no_work_change_nothing() -> None:
    machine = Machine(1)
    machine.run(busy, 2)
    assert machine.count.threads == 1
    count = ThreadCount(2)
    for _ in range(1000):
        count.record(1, 0.01, 0.01, 5.0)
    assert count.threads == 2


def test_the_first_run_of_a_kind_says_nothing() -> None:
    """It reads its memory for the first time, and its helpers may still be asleep."""
    count, now_s = ThreadCount(2), 100.0
    for kind in ("forward", "greedy"):
        for run_s, stalled_s in [(0.06, 0.06), *[(0.002, 0.0)] * 200]:
            assert count.choose(kind, 1000) == 2
            now_s += run_s
            count.record(2, run_s, stalled_s, now_s)


def test_a_run_of_another_kind_on_the_threads_of_a_trial_is_no_part_of_it() -> None:
    """As one whose phases are timed, by all threads whatever was chosen."""
    machine = Machine(2)
    machine.run(busy, 10)
    assert machine.count.threads == 1
    while machine.count.choose("forward", 1) != 2:
        machine.run(busy, 0.001)
    for _ in range(10):
        assert machine.count.choose("greedy", 1) == 1
        machine.count.record(2, 1e-6, 0.0, machine.now_s)
    assert machine.count.choose("forward", 1) == 2, "the trial goes on"


def test_a_run_that_took_no_time_by_the_clock_changes_nothing() -> None:
    count = ThreadCount(2)
    for _ in range(10):
        count.record(count.choose("forward", 1000), 0.0, 0.0, 5.0)
    assert count.threads == 2


def test_a_process_that_is_stopped_during_a_trial_tries_again_soon() -> None:
    """An hour in which nothing ran says nothing about the threads of the trial."""
    machine = Machine(2)
    machine.run(busy, 10)
    assert machine.count.threads == 1
    while machine.count.choose("forward", 1) != 2:
        machine.run(busy, 0.001)
    machine.now_s += 3600.0
    machine.count.record(2, 3600.0, 0.0, machine.now_s)
    machine.run(idle, 40)
    assert machine.count.threads == 2


def test_a_trial_ends_after_one_long_run_that_is_slower() -> None:
    machine = Machine(2)
    machine.run(busy, 10)
    while machine.count.choose("forward", 1) != 2:
        machine.run(busy, 0.001)
    machine.run(busy, 0.1)
    for _ in range(2):  # so that runs of this size are known, and three trials are not one
        while (threads := machine.count.choose("forward", 512)) == 1:
            machine.now_s += 1.0
            machine.count.record(threads, 1.0, 0.0, machine.now_s)
        machine.now_s += 2.0
        machine.count.record(threads, 2.0, 0.0, machine.now_s)
        assert machine.count.choose("forward", 512) == 1
