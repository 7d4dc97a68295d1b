"""How threads stay inside compiled code between steps.

    engine's thread   run_job:  generation + 1, wake who sleeps | function(argument, 0) | wait until all have finished
    helper            help_job: wait for a new generation       | function(argument, n) | finished + 1, and again

A helper looks for work for a moment and then sleeps in the operating system, where it costs nothing. The order of two words decides that
none is forgotten: it counts itself among the sleepers before its last look at the generation, and the engine's thread changes the generation
before it looks for sleepers.
"""

from typing import Any

from llvmlite import ir
from numba import types

from nanovllm.model.kernels import system
from nanovllm.model.kernels.compiler import compiled, intrinsic
from nanovllm.model.kernels.layout import ABORT, ARGUMENT, ASLEEP, CLOSING, FINISHED, FUNCTION, GENERATION
from nanovllm.model.kernels.threads import SPINS, atomic_add, atomic_load, relax, wait_for
from nanovllm.model.kernels.vector import I32, I64


@intrinsic
def _call(typing_context: Any, function: Any, argument: Any, thread: Any) -> Any:
    """Call the C function at an address with two integers; returns its status, 0 where all went well."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(I32, [I64, I64])
        return builder.sext(builder.call(builder.inttoptr(arguments[0], ir.PointerType(kind)), arguments[1:]), I64)

    return types.intp(types.intp, types.intp, types.intp), generate


@compiled
def _work(job: int, thread: int) -> None:
    if _call(atomic_load(job + FUNCTION), atomic_load(job + ARGUMENT), thread) != 0:
        atomic_add(job + ABORT, 1)


@compiled
def _wait_for_work(job: int, generation: int) -> None:
    """Wait until the generation is no longer this one."""
    for _ in range(SPINS):
        if atomic_load(job + GENERATION) != generation:
            return
        relax()
    system.lock(job)
    atomic_add(job + ASLEEP, 1)
    while atomic_load(job + GENERATION) == generation:
        system.wait(job)
    atomic_add(job + ASLEEP, -1)
    system.unlock(job)


@compiled
def prepare_job(job: int, _: int) -> None:
    """Make the lock of a job whose words are all 0."""
    system.prepare_lock(job)


@compiled
def wake_helpers(job: int, _: int) -> None:
    """Begin the next generation."""
    atomic_add(job + GENERATION, 1)
    if atomic_load(job + ASLEEP) > 0:
        system.lock(job)
        system.wake(job)
        system.unlock(job)


@compiled
def run_job(job: int, helpers: int) -> None:
    """Do the job's work as thread 0, alone or with all helpers; afterwards nobody works on it, unless `abort` is set."""
    if helpers > 0:
        wake_helpers(job, 0)
    _work(job, 0)
    wait_for(job + FINISHED, helpers, job + ABORT)


@compiled
def help_job(job: int, thread: int) -> None:
    """Do the share of thread number `thread` in every run, until the job is closed."""
    generation = 0
    while True:
        _wait_for_work(job, generation)
        generation += 1
        if atomic_load(job + CLOSING) != 0:
            return
        _work(job, thread)
        atomic_add(job + FINISHED, 1)
