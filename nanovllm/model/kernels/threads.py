"""Several threads in one compiled function: counters that hand out work, barriers between phases, and how to wait.

A barrier costs some 50 ns where the threads arrive together. A thread that waits spins first, since the others are usually about to come.
Then it gives its processor away, and then sleeps a little between two looks: where there are more threads than processors, those that
have work get on.

Whoever fails sets the word `abort` of the job (layout.py). From then on nobody waits, so that all come out.
"""

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils

from nanovllm.model.kernels.compiler import compiled, intrinsic
from nanovllm.model.kernels.layout import ABORT, ARRIVED
from nanovllm.model.kernels.system import give_way, nap
from nanovllm.model.kernels.vector import I64

SPINS = 2_000
_YIELDS = 50

_IS_X86 = binding.get_default_triple().startswith(("x86_64", "i686"))


@intrinsic
def atomic_add(typing_context: Any, address: Any, amount: Any) -> Any:
    """Add to the integer at `address`; returns what it was before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(arguments[0], ir.PointerType(I64)), arguments[1], "seq_cst")

    return types.intp(types.intp, types.intp), generate


@intrinsic
def atomic_load(typing_context: Any, address: Any) -> Any:
    """The integer at `address`; what other threads wrote before they changed it is visible from here on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(arguments[0], ir.PointerType(I64)), "seq_cst", 8, typ=I64)

    return types.intp(types.intp), generate


@intrinsic
def relax(typing_context: Any) -> Any:
    """Tell an x86 processor that this thread only waits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if _IS_X86:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), generate


@compiled
def barrier(arrived: int, target: int) -> None:
    """Wait until `target` arrivals have been counted at the address `arrived` of the job, this one among them.

    The counter is never set back within a run: the n-th barrier of t threads waits for n * t.
    """
    atomic_add(arrived, 1)
    wait_for(arrived, target, arrived + ABORT - ARRIVED)


@compiled
def has_failed(arrived: int) -> bool:
    """Whether the run whose arrivals are counted at `arrived` has been given up."""
    return atomic_load(arrived + ABORT - ARRIVED) != 0


@compiled
def wait_for(counter: int, target: int, abort: int) -> None:
    """Wait until the integer at `counter` is at least `target`, or the one at `abort` is not 0."""
    looks = 0
    while atomic_load(counter) < target and atomic_load(abort) == 0:
        looks += 1
        if looks < SPINS:
            relax()
        elif looks < SPINS + _YIELDS:
            give_way()
        else:
            nap()
