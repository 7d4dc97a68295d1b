"""Several threads in one compiled function: counters that hand out work, and a barrier between phases.

A barrier costs some 50 ns where the threads arrive together. A thread that waits spins first, since the others are usually about to
come, and then gives its processor away, so that on a machine with more threads than cores everybody gets on.
"""

import sys
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils

from nanovllm.model.kernels.compiler import compiled, intrinsic
from nanovllm.model.kernels.vector import I64

LINE_BYTES = 64  # counters stand a cache line apart, so that threads do not wait for each other's
_SPINS = 20_000

_IS_X86 = binding.get_default_triple().startswith(("x86_64", "i686"))
_give_way = types.ExternalFunction("SwitchToThread" if sys.platform == "win32" else "sched_yield", types.int32())


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
        return builder.load_atomic(builder.inttoptr(arguments[0], ir.PointerType(I64)), "acquire", 8, typ=I64)

    return types.intp(types.intp), generate


@intrinsic
def _relax(typing_context: Any) -> Any:
    """Tell an x86 processor that this thread only waits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if _IS_X86:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), generate


@compiled
def barrier(arrived: int, target: int) -> None:
    """Wait until `target` arrivals have been counted at the address `arrived`, this one among them.

    The counter is never set back within a run: the n-th barrier of t threads waits for n * t.
    """
    atomic_add(arrived, 1)
    spins = 0
    while atomic_load(arrived) < target:
        _relax()
        spins += 1
        if spins > _SPINS:
            _give_way()
