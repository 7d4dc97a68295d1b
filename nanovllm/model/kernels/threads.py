"""Several threads in one compiled function: counters that hand out work, barriers between phases, and how to wait.

A barrier costs some 50 ns where the threads arrive together. A thread that waits spins for a moment, since the others are usually about
to come. Then it sleeps in the operating system until the last one wakes it: where there are more threads than processors, those that have
work get on, and an idle thread costs nothing. To give the processor away between looks instead (sched_yield) is as good where all threads
are of this process, but beside a busy process it hands over a whole slice of time at every look, ten times as long as a step.

The order of two words decides that nobody sleeps for ever: a thread counts itself among the sleepers before its last look at the word that
it waits for, and the others change that word before they look for sleepers.

Whoever fails sets the word `abort` of the job (layout.py). From then on nobody waits, so that all come out.
"""

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils

from nanovllm.model.kernels import system
from nanovllm.model.kernels.compiler import compiled, intrinsic
from nanovllm.model.kernels.layout import ABORT, ARRIVED, ASLEEP, SPINS
from nanovllm.model.kernels.vector import I64

_IS_X86 = binding.get_default_triple().startswith(("x86_64", "i686"))


@intrinsic
def atomic_add(typing_context: Any, address: Any, amount: Any) -> Any:
    """Add to the integer at `address`; returns what it was before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw(
            "add", builder.inttoptr(arguments[0], ir.PointerType(I64)), arguments[1], "seq_cst"
        )

    return types.intp(types.intp, types.intp), generate


@intrinsic
def atomic_load(typing_context: Any, address: Any) -> Any:
    """The integer at `address`; what other threads wrote before they changed it is visible from here on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(
            builder.inttoptr(arguments[0], ir.PointerType(I64)), "seq_cst", 8, typ=I64
        )

    return types.intp(types.intp), generate


@intrinsic
def relax(typing_context: Any) -> Any:
    """Tell an x86 processor that this thread only waits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if _IS_X86:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(
                cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), []
            )
        return context.get_dummy_value()

    return types.void(), generate


@compiled
def count(job: int, word: int, target: int) -> None:
    """Add 1 to the word at an address in the job; whoever makes it `target` wakes those that sleep."""
    if atomic_add(word, 1) + 1 == target and atomic_load(job + ASLEEP) > 0:
        wake(job)


@compiled
def wake(job: int) -> None:
    """Let all that sleep look again."""
    system.lock(job)
    system.wake(job)
    system.unlock(job)


@compiled
def wait_for(job: int, word: int, target: int, spins: int) -> None:
    """Wait until the word at an address in the job is at least `target`, or the job has failed; after so many looks in sleep."""
    for _ in range(spins):
        if atomic_load(word) >= target or atomic_load(job + ABORT) != 0:
            return
        relax()
    system.lock(job)
    atomic_add(job + ASLEEP, 1)
    while atomic_load(word) < target and atomic_load(job + ABORT) == 0:
        system.wait(job)
    atomic_add(job + ASLEEP, -1)
    system.unlock(job)


@compiled
def barrier(arrived: int, target: int) -> None:
    """Wait until `target` arrivals have been counted at the address `arrived` in a job, this one among them.

    The counter is never set back within a run: the n-th barrier of t threads waits for n * t.
    """
    job = arrived - ARRIVED
    count(job, arrived, target)
    wait_for(job, arrived, target, atomic_load(job + SPINS))


@compiled
def has_failed(arrived: int) -> bool:
    """Whether the run whose arrivals are counted at `arrived` has been given up."""
    return atomic_load(arrived - ARRIVED + ABORT) != 0
