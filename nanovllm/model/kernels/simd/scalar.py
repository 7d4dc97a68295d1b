"""Loads and stores of scalars at an address, for compiled code that is not vector code.

Ordered integers make float32 values comparable as int32, so that they can be counted into bins and
sorted together with token ids:

    positive floats   their bits, which already ascend with the value
    negative floats   their bits with all but the sign inverted
"""

from typing import Any

from llvmlite import ir
from numba import types

from nanovllm.model.kernels.build.bounds import checked, size_of
from nanovllm.model.kernels.build.compiler import intrinsic
from nanovllm.model.kernels.build.target import CHECKS_ADDRESSES
from nanovllm.model.kernels.simd.vector import F32, I32, I64, Value

F64 = ir.DoubleType()
_MAGNITUDE = 0x7FFFFFFF


def _element(builder: Any, base: Value, index: Value, kind: Any, *, writes: bool = False) -> Value:
    """Return a pointer to element `index` of an array at address `base`."""
    size = size_of(kind)
    address = builder.add(base, builder.mul(index, I64(size)))
    if CHECKS_ADDRESSES:
        address = checked(builder, address, size, writes=writes)
    return builder.inttoptr(address, ir.PointerType(kind))


def make_load(kind: Any, returns: Any) -> Any:
    """Make load(base, index): element `index` of an array at address `base`.

    Args:
        kind: LLVM type of the elements; int32 is sign-extended to int64.
        returns: Numba type of the result.
    """

    def load(typing_context: Any, base: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            base, index = arguments
            value = builder.load(_element(builder, base, index, kind), align=size_of(kind))
            return builder.sext(value, I64) if kind == I32 else value

        return returns(types.intp, types.intp), generate

    return intrinsic(load)


def _make_store(kind: Any, takes: Any) -> Any:
    """Make store(base, index, value), the counterpart of `make_load`; int64 is cut to int32."""

    def store(typing_context: Any, base: Any, index: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            base, index, value = arguments
            value = builder.trunc(value, I32) if kind == I32 else value
            pointer = _element(builder, base, index, kind, writes=True)
            builder.store(value, pointer, align=size_of(kind))
            return context.get_dummy_value()

        return types.void(types.intp, types.intp, takes), generate

    return intrinsic(store)


load_float, store_float = make_load(F32, types.float32), _make_store(F32, types.float32)
load_double, store_double = make_load(F64, types.float64), _make_store(F64, types.float64)
load_i32, store_i32 = make_load(I32, types.intp), _make_store(I32, types.intp)
store_int = _make_store(I64, types.intp)


def ordered_bits(builder: Any, bits: Value, constant: Any) -> Value:
    """Emit the map of float32 bits to ordered integers, which is its own inverse.

    Args:
        builder: emits the code.
        bits: int32, a scalar or a vector.
        constant: constant(number) -> an int32 of the shape of `bits`.
    """
    return builder.xor(bits, builder.and_(builder.ashr(bits, constant(31)), constant(_MAGNITUDE)))


@intrinsic
def float_to_bits(typing_context: Any, x: Any) -> Any:
    """Return the bits of a float32 as int64, the form in which kernels take a float argument."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.zext(builder.bitcast(arguments[0], I32), I64)

    return types.intp(types.float32), generate


@intrinsic
def float_to_ordered(typing_context: Any, x: Any) -> Any:
    """Return the ordered integer of a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.sext(ordered_bits(builder, builder.bitcast(arguments[0], I32), I32), I64)

    return types.intp(types.float32), generate


@intrinsic
def ordered_to_float(typing_context: Any, key: Any) -> Any:
    """Return the float32 of an ordered integer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(ordered_bits(builder, builder.trunc(arguments[0], I32), I32), F32)

    return types.float32(types.intp), generate
