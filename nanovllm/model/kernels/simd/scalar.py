"""Loads and stores of scalars at an address, for compiled code that is not vector code.

Ordered integers make float32 values comparable as int32, so that they can be counted into bins and
sorted together with token ids:

    positive floats   their bits, which already ascend with the value
    negative floats   their bits with all but the sign inverted
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from nanovllm.model.kernels.build.bounds import checked, size_of
from nanovllm.model.kernels.build.compiler import intrinsic
from nanovllm.model.kernels.build.target import CHECKS_ADDRESSES
from nanovllm.model.kernels.simd.value import F32, F64, I32, I64, Value

_MAGNITUDE = 0x7FFFFFFF


def _element(base: Value, index: Value, kind: Any, *, writes: bool = False) -> Any:
    """Return a pointer to element `index` of an array at address `base`."""
    size = size_of(kind)
    address = (base + index * size).ir
    if CHECKS_ADDRESSES:
        address = checked(base.builder, address, size, writes=writes)
    return base.builder.inttoptr(address, ir.PointerType(kind))


def make_load(kind: Any, returns: Any) -> Any:
    """Make load(base, index): element `index` of an array at address `base`.

    Args:
        kind: LLVM type of the elements; int32 is sign-extended to int64.
        returns: Numba type of the result.
    """

    def load(typing_context: Any, base: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            base, index = (Value(builder, argument) for argument in arguments)
            value = builder.load(_element(base, index, kind), align=size_of(kind))
            return builder.sext(value, I64) if kind == I32 else value

        return returns(types.intp, types.intp), generate

    return intrinsic(load)


def _make_store(kind: Any, takes: Any) -> Any:
    """Make store(base, index, value), the counterpart of `make_load`; int64 is cut to int32."""

    def store(typing_context: Any, base: Any, index: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            base, index, value = (Value(builder, argument) for argument in arguments)
            value = value.trunc(I32) if kind == I32 else value
            pointer = _element(base, index, kind, writes=True)
            builder.store(value.ir, pointer, align=size_of(kind))
            return context.get_dummy_value()

        return types.void(types.intp, types.intp, takes), generate

    return intrinsic(store)


load_float, store_float = make_load(F32, types.float32), _make_store(F32, types.float32)
load_double, store_double = make_load(F64, types.float64), _make_store(F64, types.float64)
load_i32, store_i32 = make_load(I32, types.intp), _make_store(I32, types.intp)
store_int = _make_store(I64, types.intp)


def ordered_bits(bits: Value) -> Value:
    """Return the ordered integers of the bits of float32; the map is its own inverse."""
    return bits ^ ((bits >> 31) & _MAGNITUDE)


def _make_conversion(emit: Callable[[Value], Value], takes: Any, returns: Any) -> Any:
    """Make a function of one scalar whose body `emit` emits."""

    def convert(typing_context: Any, x: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return emit(Value(builder, arguments[0])).ir

        return returns(takes), generate

    return intrinsic(convert)


float_to_bits = _make_conversion(
    lambda x: x.bitcast(I32).zext(I64), takes=types.float32, returns=types.intp
)
"""float_to_bits(x): the bits of a float32 as int64, as kernels take a float argument."""
float_to_ordered = _make_conversion(
    lambda x: ordered_bits(x.bitcast(I32)).sext(I64), takes=types.float32, returns=types.intp
)
"""float_to_ordered(x): the ordered integer of a float32."""
ordered_to_float = _make_conversion(
    lambda key: ordered_bits(key.trunc(I32)).bitcast(F32), takes=types.intp, returns=types.float32
)
"""ordered_to_float(key): the float32 of an ordered integer."""
