"""Atomic operations on int64 for compiled code, all sequentially consistent."""

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils

from nanovllm.model.kernels.build.compiler import intrinsic
from nanovllm.model.kernels.simd.kernel import emitted
from nanovllm.model.kernels.simd.value import I64, Value

_IS_X86 = binding.get_default_triple().startswith(("x86_64", "i686"))


def _pointer(address: Value) -> Any:
    return address.builder.inttoptr(address.ir, ir.PointerType(I64))


def _exchange(operation: str, address: Value, value: Value) -> Value:
    """Emit an operation that changes the integer at `address`, and return its old value."""
    builder = address.builder
    return Value(builder, builder.atomic_rmw(operation, _pointer(address), value.ir, "seq_cst"))


@emitted(types.intp)
def atomic_add(address: Value, amount: Value) -> Value:
    """Add to the integer at `address` and return its old value."""
    return _exchange("add", address, amount)


@emitted(types.intp)
def atomic_store(address: Value, value: Value) -> Value:
    """Store an integer at `address` and return its old value; later loads come after the store."""
    return _exchange("xchg", address, value)


@emitted(types.intp)
def atomic_load(address: Value) -> Value:
    """Load the integer at `address`; writes before the store that it reads become visible."""
    builder = address.builder
    return Value(builder, builder.load_atomic(_pointer(address), "seq_cst", 8, typ=I64))


@intrinsic
def relax(typing_context: Any) -> Any:
    """Emit x86's `pause`, the hint for spin loops; nothing on other CPUs."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if _IS_X86:
            kind = ir.FunctionType(ir.VoidType(), [])
            pause = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause")
            builder.call(pause, [])
        return context.get_dummy_value()

    return types.void(), generate
