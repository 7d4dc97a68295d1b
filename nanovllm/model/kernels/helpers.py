"""How threads stay inside compiled code between steps.

    engine's thread   run_job:  generation + 1                 | function(argument, 0) | wait until all have finished
    helper            help_job: wait for a new generation       | function(argument, n) | finished + 1, and again

A helper leaves when the word `abort` is set, by a thread that has failed or because nobody needs it any more.
"""

from typing import Any

from llvmlite import ir
from numba import types

from nanovllm.model.kernels import system
from nanovllm.model.kernels.compiler import compiled, intrinsic
from nanovllm.model.kernels.layout import (
    ABORT,
    ARGUMENT,
    FINISHED,
    FUNCTION,
    GENERATION,
    HELPERS,
    IDLE_SPINS,
    SPINS,
)
from nanovllm.model.kernels.threads import atomic_add, atomic_load, count, wait_for, wake
from nanovllm.model.kernels.vector import I32, I64


@intrinsic
def _call(typing_context: Any, function: Any, argument: Any, thread: Any) -> Any:
    """Call the C function at an address with two integers; returns its status, 0 where all went well."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(I32, [I64, I64])
        return builder.sext(
            builder.call(builder.inttoptr(arguments[0], ir.PointerType(kind)), arguments[1:]), I64
        )

    return types.intp(types.intp, types.intp, types.intp), generate


@compiled
def _work(job: int, thread: int) -> None:
    if _call(atomic_load(job + FUNCTION), atomic_load(job + ARGUMENT), thread) != 0:
        atomic_add(job + ABORT, 1)
        wake(job)


@compiled
def prepare_job(job: int, _: int) -> None:
    """Make the lock of a job whose words are all 0."""
    system.prepare_lock(job)


@compiled
def wake_helpers(job: int, _: int) -> None:
    """Let all that sleep look again."""
    wake(job)


@compiled
def run_job(job: int, helpers: int) -> None:
    """Do the job's work as thread 0, alone or with all helpers; afterwards nobody works on it, unless `abort` is set."""
    if helpers > 0:
        count(job, job + GENERATION, atomic_load(job + GENERATION) + 1)
    _work(job, 0)
    wait_for(job, job + FINISHED, helpers, atomic_load(job + SPINS))


@compiled
def help_job(job: int, thread: int) -> None:
    """Do the share of thread number `thread` in every run, until the job has failed or is closed, which sets `abort` too."""
    generation = 0
    while True:
        generation += 1
        wait_for(job, job + GENERATION, generation, atomic_load(job + IDLE_SPINS))
        if atomic_load(job + ABORT) != 0:
            return
        _work(job, thread)
        count(job, job + FINISHED, atomic_load(job + HELPERS))
