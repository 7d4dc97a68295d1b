"""The loop in which helper threads stay inside compiled code between runs.

    thread 0   run_job:   open a generation       function(argument, 0)   close it, wait for helpers
    helper n   help_job:  wait for a generation   activate, function(argument, n), deactivate, again

A helper returns when the job's field `abort` is set: a thread has failed, or the pool is closed.
"""

from typing import Any

from llvmlite import ir
from numba import types

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import (
    ABORT,
    ARGUMENT,
    FUNCTION,
    GENERATION,
    IDLE_SPINS,
    RUN_THREADS,
)
from nanovllm.model.kernels.simd.kernel import emitted
from nanovllm.model.kernels.simd.value import I32, I64, Value
from nanovllm.model.kernels.threads import os_wait
from nanovllm.model.kernels.threads.atomics import atomic_add, atomic_load, atomic_store
from nanovllm.model.kernels.threads.barrier import (
    activate,
    deactivate,
    open_run,
    spin,
    wait_for_helpers,
    wait_for_run,
    wake,
)


@emitted(types.intp)
def _call(function: Value, argument: Value, thread: Value) -> Value:
    """Call the C function at an address with two integers; return its status, 0 for success."""
    builder, kind = function.builder, ir.FunctionType(I32, [I64, I64])
    pointer = builder.inttoptr(function.ir, ir.PointerType(kind))
    return Value(builder, builder.call(pointer, [argument.ir, thread.ir])).sext(I64)


@compiled
def _work(job: int, thread: int) -> None:
    if _call(atomic_load(job + FUNCTION), atomic_load(job + ARGUMENT), thread) != 0:
        atomic_add(job + ABORT, 1)
        wake(job)


@compiled
def prepare_job(job: int, _: int) -> None:
    """Initialise the lock of a job of zeros."""
    os_wait.prepare_lock(job)


@compiled
def wake_helpers(job: int, _: int) -> None:
    """Wake all sleeping threads."""
    wake(job)


@compiled
def run_job(job: int, threads: int) -> None:
    """Run the job's function on thread 0 and on the helpers that have a core.

    Afterwards no helper touches the run's memory, unless `abort` is set.
    """
    if threads <= 1:
        _work(job, 0)
        return
    atomic_store(job + RUN_THREADS, threads)
    open_run(job)
    _work(job, 0)
    atomic_add(job + GENERATION, 1)
    wait_for_helpers(job, threads)


@compiled
def help_job(job: int, thread: int) -> None:
    """Take part in runs as thread number `thread` until the job has failed or is closed."""
    generation = 0
    while True:
        generation = wait_for_run(job, thread, generation, atomic_load(job + IDLE_SPINS))
        if atomic_load(job + ABORT) != 0:
            return
        is_open = generation % 2 == 1 and thread < atomic_load(job + RUN_THREADS)
        if is_open and activate(job, thread, generation):
            _work(job, thread)
            deactivate(job, thread)


POOL_FUNCTIONS: dict[str, Any] = {
    "prepare_job": prepare_job,
    "run_job": run_job,
    "help_job": help_job,
    "wake_helpers": wake_helpers,
    "spin": spin,
}
"""The entries that ThreadPool calls, a part of each library."""
