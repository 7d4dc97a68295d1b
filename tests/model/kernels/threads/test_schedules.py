"""Runs under random schedules: every atomic operation of the thread protocol may be delayed.

The modules of the protocol are loaded a second time with atomic operations that sometimes spin
first, so that threads interleave in rare orders. A run checks that each item of a phase is computed
once, after all items of the previous phase, and by a thread that is in the run.
"""

import importlib.util
import threading
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nanovllm.model.kernels.build.codegen import Library, host_cpu
from nanovllm.model.kernels.build.compiler import ARGUMENTS, compiled, emit_object
from nanovllm.model.kernels.build.layout import PHASE_BYTES
from nanovllm.model.kernels.simd.memory import load_int, store_int
from nanovllm.model.kernels.threads import atomics, barrier, os_wait, worker
from nanovllm.model.kernels.threads.pool import ThreadPool

ENTRIES = ("prepare_job", "run_job", "help_job", "wake_helpers", "spin", "compute")
PHASES, ITEMS, RUNS = 5, 4, 4000
RUN, WRONG, HELPED, JOB_PTR, PHASES_PTR, VALUES = range(6)
"""Fields of a run's record; the values of the items come last."""

RANDOM = np.zeros(8, dtype=np.int64)  # all threads draw their delays from it
RANDOM_PTR = RANDOM.ctypes.data


@compiled
def delay() -> None:
    """Spin in one of sixteen calls, for long in one of 256."""
    drawn = atomics.atomic_add(RANDOM_PTR, 0x5851F42D) * 0x2545F4914F6CDD1D >> 32 & 0xFFFFFF
    if drawn & 0xF == 0:
        for _ in range((drawn >> 8) & (0xFFF if drawn & 0xFF == 0 else 0x7F)):
            atomics.relax()


@compiled
def delayed_add(address: int, amount: int) -> int:
    delay()
    return int(atomics.atomic_add(address, amount))


@compiled
def delayed_load(address: int) -> int:
    delay()
    return int(atomics.atomic_load(address))


@compiled
def delayed_store(address: int, value: int) -> int:
    delay()
    return int(atomics.atomic_store(address, value))


DELAYED = {
    "atomic_add": delayed_add,
    "atomic_load": delayed_load,
    "atomic_store": delayed_store,
}


def load_again(module: ModuleType, replacements: dict[str, Any]) -> Any:
    """Load a module a second time, with other functions under the names that it imports."""
    assert module.__file__ is not None
    spec = importlib.util.spec_from_file_location(f"delayed_{module.__name__}", module.__file__)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    vars(copy).update({name: new for name, new in replacements.items() if name in vars(copy)})
    return copy


def make_compute(delayed_threads: Any) -> Any:
    take_item, barrier = delayed_threads.take_item, delayed_threads.barrier

    @compiled
    def compute(record: int, thread: int) -> None:
        """Some phases of items; the last has no barrier, as in the forward pass."""
        run = load_int(record, RUN)
        phase = load_int(record, PHASES_PTR)
        if run < 0:
            atomics.atomic_add(record + 8 * WRONG, 1)
        for number in range(PHASES):
            done = 0
            item = take_item(phase)
            while item < ITEMS:
                expected = run * PHASES + number
                if load_int(record, VALUES + item) != expected or load_int(record, RUN) != run:
                    atomics.atomic_add(record + 8 * WRONG, 1)
                for _ in range(8):
                    delay()
                store_int(record, VALUES + item, expected + 1)
                if thread > 0:
                    atomics.atomic_add(record + 8 * HELPED, 1)
                done += 1
                item = take_item(phase)
            if number == PHASES - 1:
                return
            if not barrier(load_int(record, JOB_PTR), phase, thread, done, ITEMS):
                return
            phase += PHASE_BYTES

    return compute


@pytest.fixture(scope="module")
def library() -> Library:
    """The pool's functions and `compute`, with delays."""
    # Names of the protocol must stay those of the originals: os_wait.py only calls the system.
    delayed_threads = load_again(barrier, DELAYED)
    delayed_helpers = load_again(worker, {**vars(delayed_threads), **DELAYED, "os_wait": os_wait})
    entries: dict[str, Any] = {name: getattr(delayed_helpers, name, None) for name in ENTRIES}
    entries |= {"spin": delayed_threads.spin, "compute": make_compute(delayed_threads)}
    for function in entries.values():
        function.compile(ARGUMENTS)
    return Library(emit_object(entries, host_cpu()), ENTRIES)


@pytest.fixture
def pool(library: Library, request: pytest.FixtureRequest) -> Iterator[ThreadPool]:
    count, spins = request.param
    pool = ThreadPool(count, library, phases=PHASES)
    pool._job["spins"] = pool._job["idle_spins"] = spins  # noqa: SLF001 - no public setting
    yield pool
    pool.close()


def repeat(pool: ThreadPool, compute: int, outcome: SimpleNamespace) -> None:
    """Run many times on changing numbers of threads; nobody may touch the record between runs."""
    record = np.zeros(VALUES + ITEMS, dtype=np.int64)
    record[JOB_PTR], record[PHASES_PTR] = pool.job, pool.phases
    for run in range(RUNS):
        record[RUN], record[VALUES:] = run, run * PHASES
        pool.run(compute, record.ctypes.data, 1 + run * 7 % pool.threads)
        values = record.tolist()
        record[RUN], record[VALUES:] = -1, -1
        assert values[WRONG] == 0, f"run {run}: items out of order, or by a thread not in the run"
        assert values[VALUES:] == [(run + 1) * PHASES] * ITEMS
        assert (record[VALUES:] == -1).all(), "a helper writes after the run"
    outcome.helped = values[HELPED]


@pytest.mark.parametrize(
    "pool", [(2, 0), (3, 0), (3, 20), (5, 3)], indirect=True, ids=lambda given: f"{given}"
)
def test_runs_are_in_order_whatever_the_delays(pool: ThreadPool, library: Library) -> None:
    outcome = SimpleNamespace(helped=0)
    errors: list[BaseException] = []

    def call() -> None:
        try:
            repeat(pool, library.addresses["compute"], outcome)
        except BaseException as error:  # noqa: BLE001 - told to the test's thread
            errors.append(error)

    caller = threading.Thread(target=call, daemon=True)
    caller.start()
    caller.join(60)
    assert not caller.is_alive(), "a thread waits for ever"
    if errors:
        raise errors[0]
    assert outcome.helped > RUNS // 10, "helpers take part"
