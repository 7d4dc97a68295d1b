"""The pool's threads: all take part, none waits for ever, and none is busy when idle."""

import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from ctypes import PYFUNCTYPE, c_int32, c_int64, c_void_p, cast
from types import SimpleNamespace
from typing import Any

import pytest

from nanovllm.model.kernels.build.codegen import PROTOTYPE, Library, host_cpu
from nanovllm.model.kernels.build.compiler import ARGUMENTS, compiled, emit_object
from nanovllm.model.kernels.build.layout import DONE, PHASE_BYTES, THREAD_BYTES, THREADS
from nanovllm.model.kernels.threads import worker
from nanovllm.model.kernels.threads.barrier import barrier, spin, take_item
from nanovllm.model.kernels.threads.pool import ThreadPool

ENTRIES = ("prepare_job", "run_job", "help_job", "wake_helpers", "spin", "run_phases", "take")
PHASES = 100
ITEMS = 9


@compiled
def run_phases(job: int, thread: int) -> None:
    """A hundred phases of nine items."""
    phase = job + THREADS + 3 * THREAD_BYTES
    for _ in range(PHASES):
        done = 0
        while take_item(phase) < ITEMS:
            done += 1
        if not barrier(job, phase, thread, done, ITEMS):
            return
        phase += PHASE_BYTES


@compiled
def take(phase: int, _: int) -> None:
    """An item that is never computed."""
    take_item(phase)


@pytest.fixture(scope="module")
def library() -> Library:
    """The functions that the pool needs, without a model's."""
    entries: dict[str, Any] = {name: getattr(worker, name, run_phases) for name in ENTRIES}
    entries |= {"spin": spin, "take": take}
    for function in entries.values():
        function.compile(ARGUMENTS)
    return Library(emit_object(entries, host_cpu()), ENTRIES)


@pytest.fixture
def pool(library: Library) -> Iterator[ThreadPool]:
    pool = ThreadPool(3, library, phases=PHASES)
    yield pool
    pool.close()


def run(
    pool: ThreadPool, function: Callable[[int, int], int], *, threads: int, argument: int = 0
) -> None:
    """Run a Python function as if it were compiled."""
    callback = PROTOTYPE(function)
    pool.run(cast(callback, c_void_p).value or 0, argument, threads)


def items_done(pool: ThreadPool) -> list[int]:
    """Items that are computed of each phase of the last run."""
    counters = range(pool.phases + DONE, pool.phases + PHASES * PHASE_BYTES, PHASE_BYTES)
    return [c_int64.from_address(address).value for address in counters]


def record(seen: list[int]) -> Callable[[int, int], int]:
    def note(argument: int, thread: int) -> int:
        seen.append(thread + argument)
        return 0

    return note


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


OTHERS: set[threading.Thread] = set()
"""Threads of other tests' engines that the garbage collector has not ended yet."""


@pytest.fixture(autouse=True)
def note_other_threads() -> None:
    OTHERS.clear()
    OTHERS.update(threading.enumerate())


def count_kernel_threads() -> int:
    own = set(threading.enumerate()) - OTHERS
    return sum(thread.name.startswith("nanovllm-kernels") for thread in own)


def rendezvous(seen: list[int], threads: int) -> Callable[[int, int], int]:
    """A function that returns once so many threads are in it."""
    arrivals = threading.Barrier(threads, timeout=20)

    def arrive(argument: int, thread: int) -> int:
        seen.append(thread + argument)
        arrivals.wait()
        return 0

    return arrive


@pytest.mark.parametrize("threads", [1, 2, 3, 9])
def test_every_thread_is_called_once_in_a_run_that_waits_for_all(
    library: Library, threads: int
) -> None:
    pool = ThreadPool(threads, library)
    for _ in range(50):
        seen: list[int] = []
        run(pool, rendezvous(seen, threads), threads=threads, argument=100)
        assert sorted(seen) == list(range(100, 100 + threads))
    pool.close()


def test_no_thread_is_called_twice_in_a_run_or_after_it(pool: ThreadPool) -> None:
    for _ in range(200):
        seen: list[int] = []
        run(pool, record(seen), threads=3)
        called = list(seen)
        assert called.count(0) == 1
        assert len(set(called)) == len(called)
        assert seen == called


def test_a_helper_that_is_late_is_not_waited_for(library: Library) -> None:
    """Helpers that never see a run: thread 0 computes everything."""
    release = threading.Event()
    late = SimpleNamespace(
        functions={**library.functions, "help_job": lambda job, thread: release.wait(20) and 0},
        addresses=library.addresses,
    )
    pool = ThreadPool(3, late, phases=PHASES)  # type: ignore[arg-type]
    try:
        for _ in range(5):
            pool.run(library.addresses["run_phases"], pool.job, 3)
            assert items_done(pool) == [ITEMS] * PHASES
    finally:
        release.set()
        pool.close()


def test_a_run_on_fewer_threads_leaves_the_others_alone(pool: ThreadPool) -> None:
    for threads in (1, 3, 1, 2, 3):
        seen: list[int] = []
        run(pool, rendezvous(seen, threads), threads=threads)
        assert sorted(seen) == list(range(threads))


def test_helpers_that_have_gone_to_sleep_are_woken(pool: ThreadPool) -> None:
    for pause_s in (0.0, 0.05, 0.0, 0.05):
        time.sleep(pause_s)
        seen: list[int] = []
        run(pool, rendezvous(seen, 3), threads=3)
        assert len(seen) == 3


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_thread_that_fails_raises_where_the_step_was_called_and_the_pool_goes_on(
    pool: ThreadPool, failing: int
) -> None:
    arrive = rendezvous([], 3)
    with pytest.raises(RuntimeError, match="a thread of the compiled kernels has failed"):
        run(pool, lambda argument, thread: arrive(0, thread) - (thread == failing), threads=3)
    assert count_kernel_threads() == 0, "all have come out"
    seen: list[int] = []
    run(pool, rendezvous(seen, 3), threads=3)
    assert sorted(seen) == [0, 1, 2]


def test_a_barrier_lets_all_out_when_one_thread_fails(pool: ThreadPool, library: Library) -> None:
    """Two threads wait for an item that the third has taken; it fails instead of computing it."""
    take = library.functions["take"]
    taken = threading.Barrier(3, timeout=20)

    def share(argument: int, thread: int) -> int:
        if thread == 1:
            take(pool.phases, 0)
        taken.wait()
        if thread == 1:
            time.sleep(0.05)
            return 1
        return library.functions["run_phases"](pool.job, thread)

    with pytest.raises(RuntimeError, match="has failed"):
        run(pool, share, threads=3)


def test_a_helper_that_has_died_does_not_hang_the_step(library: Library) -> None:
    dying = SimpleNamespace(
        functions={**library.functions, "help_job": lambda job, thread: 0},
        addresses=library.addresses,
    )
    pool = ThreadPool(2, dying, phases=PHASES)  # type: ignore[arg-type]
    wait_until(lambda: count_kernel_threads() == 0)
    ended: list[str] = []

    def step() -> None:
        try:
            run(pool, lambda argument, thread: 0, threads=2)
            ended.append("")
        except RuntimeError as error:
            ended.append(str(error))

    engine = threading.Thread(target=step, daemon=True)
    engine.start()
    engine.join(20)
    assert len(ended) == 1, "the step waits for a thread that will never come"
    assert "has failed" in ended[0]


def test_a_pool_that_is_dropped_takes_its_threads_with_it(library: Library) -> None:
    before = count_kernel_threads()
    pools = [ThreadPool(4, library) for _ in range(3)]
    run(pools[0], lambda argument, thread: 0, threads=4)
    assert count_kernel_threads() == before + 9
    pools.clear()
    gc.collect()
    assert count_kernel_threads() == before


def test_a_closed_pool_starts_again_when_it_is_needed(pool: ThreadPool) -> None:
    pool.close()
    assert count_kernel_threads() == 0
    seen: list[int] = []
    run(pool, rendezvous(seen, 3), threads=3)
    assert sorted(seen) == [0, 1, 2]


def test_threads_that_cannot_be_had_are_an_error_that_says_so(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.endswith("-2"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(
        RuntimeError, match="num_threads is 5, but no more than 2 threads can be had; lower it"
    ):
        ThreadPool(5, library)
    assert count_kernel_threads() == 0


def test_an_idle_pool_costs_no_processor_time(library: Library) -> None:
    pool = ThreadPool(4, library)
    run(pool, lambda argument, thread: 0, threads=4)

    def is_idle() -> bool:
        before_s = time.process_time()
        time.sleep(0.1)
        return time.process_time() - before_s < 0.01

    wait_until(is_idle)  # threads of other tests may cost some at first
    pool.close()


@pytest.mark.parametrize("poll_s", [0.0, 1e-4])
def test_polls_that_cannot_be_timed_are_taken_for_possible_ones(
    library: Library, monkeypatch: pytest.MonkeyPatch, poll_s: float
) -> None:
    """A debugger, or a machine so busy that every measurement is interrupted."""
    clock_s = itertools.count(0.0, 2000 * poll_s)
    clock = SimpleNamespace(perf_counter=lambda: next(clock_s))
    monkeypatch.setattr("nanovllm.model.kernels.threads.pool.time", clock)
    monkeypatch.setattr("nanovllm.model.kernels.threads.pool.usable_cpus", lambda: 2)
    pool = ThreadPool(2, library)
    words = pool._job  # noqa: SLF001 - the measurement has no other effect
    assert 200 <= words["spins"] <= 50_000
    assert words["idle_spins"] == 20 * words["spins"]
    pool.close()


def test_a_run_that_fails_leaves_nothing_behind_that_the_next_is_taken_for(
    pool: ThreadPool,
) -> None:
    threads = pool.choose_threads("forward", 1000)
    with pytest.raises(RuntimeError, match="has failed"):
        run(pool, lambda argument, thread: 1, threads=threads)
    run(pool, lambda argument, thread: 0, threads=3)
    assert not pool._count._costs  # noqa: SLF001 - this run was not chosen for


EXIT = """
import threading, time
from ctypes import c_void_p, cast
from nanovllm.model.kernels.build.layout import DONE, PHASE_BYTES, THREAD_BYTES, THREADS
from nanovllm.model.kernels.build.codegen import PROTOTYPE
from nanovllm.model.kernels.library import load_library
from nanovllm.model.kernels.build.target import Spec, host_target
from nanovllm.model.kernels.threads.pool import ThreadPool

pool = ThreadPool(3, load_library(Spec(host_target())))
work = PROTOTYPE(lambda argument, thread: time.sleep(0.001) or 0)

def serve():
    while True:
        pool.run(cast(work, c_void_p).value, 0, 3)

pool.run(cast(work, c_void_p).value, 0, 3)
"""


@pytest.mark.parametrize(
    "end",
    [
        "",
        "time.sleep(0.1)",
        "del pool",
        "pool.close()",
        "threading.Thread(target=serve, daemon=True).start(); time.sleep(0.05)",
    ],
)
def test_a_process_ends_well_whatever_its_threads_are_doing(end: str) -> None:
    subprocess.run(
        [sys.executable, "-c", f"{EXIT}\n{end}"], check=True, timeout=240, stderr=subprocess.DEVNULL
    )


@pytest.mark.skipif(sys.platform == "win32", reason="has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own(pool: ThreadPool) -> None:
    run(pool, lambda argument, thread: 0, threads=3)
    child = os.fork()
    if child == 0:
        seen: list[int] = []
        run(pool, rendezvous(seen, 3), threads=3)
        os._exit(0 if sorted(seen) == [0, 1, 2] else 1)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        time.sleep(0.01)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the forked process hangs")
    assert os.waitstatus_to_exitcode(status) == 0
    run(pool, lambda argument, thread: 0, threads=3)


def test_helpers_need_nothing_of_the_interpreter_in_a_run(library: Library) -> None:
    """The engine's thread holds the GIL during the run, so a helper that needed it would hang."""
    keeping = SimpleNamespace(functions=dict(library.functions), addresses=library.addresses)
    pool = ThreadPool(3, keeping, phases=PHASES)  # type: ignore[arg-type]
    pool.run(library.addresses["run_phases"], pool.job, 3)
    keeping.functions["run_job"] = PYFUNCTYPE(c_int32, c_int64, c_int64)(
        library.addresses["run_job"]
    )
    for _ in range(20):
        pool.run(library.addresses["run_phases"], pool.job, 3)
        assert items_done(pool) == [ITEMS] * PHASES, "all items of each phase are computed"
    assert count_kernel_threads() == 2, "and the helpers are still there"
    pool.close()
    assert count_kernel_threads() == 0
