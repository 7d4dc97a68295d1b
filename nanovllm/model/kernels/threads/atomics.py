"""Atomic operations on int64 for compiled code, all sequentially consistent."""

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils

from nanovllm.model.kernels.build.compiler import intrinsic
from nanovllm.model.kernels.simd.value import I64

_IS_X86 = binding.get_default_triple().startswith(("x86_64", "i686"))


@intrinsic
def atomic_add(typing_context: Any, address: Any, amount: Any) -> Any:
    """Add to the integer at `address` and return its old value."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.PointerType(I64))
        return builder.atomic_rmw("add", pointer, arguments[1], "seq_cst")

    return types.intp(types.intp, types.intp), generate


@intrinsic
def atomic_store(typing_context: Any, address: Any, value: Any) -> Any:
    """Store an integer at `address` and return its old value; later loads come after the store."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.PointerType(I64))
        return builder.atomic_rmw("xchg", pointer, arguments[1], "seq_cst")

    return types.intp(types.intp, types.intp), generate


@intrinsic
def atomic_load(typing_context: Any, address: Any) -> Any:
    """Load the integer at `address`; writes before the store that it reads become visible."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.PointerType(I64))
        return builder.load_atomic(pointer, "seq_cst", 8, typ=I64)

    return types.intp(types.intp), generate


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
