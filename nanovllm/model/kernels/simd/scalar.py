"""Single numbers at an address, for compiled code that cannot be vector code: reading, writing, and a float32 as an integer.

An ordered key is a 32-bit integer that grows with its float32, so that floats can be counted into bins and narrowed down bit by bit:

    positive floats   their bits, which already grow with them
    negative floats   the bits below the sign turned round
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


def _reach(builder: Any, base: Value, index: Value, kind: Any, *, writes: bool = False) -> Value:
    """A pointer to number `index` from address `base`, about to be used."""
    size = size_of(kind)
    address = builder.add(base, builder.mul(index, I64(size)))
    if CHECKS_ADDRESSES:
        address = checked(builder, address, size, writes=writes)
    return builder.inttoptr(address, ir.PointerType(kind))


def make_load(kind: Any, returns: Any) -> Any:
    """load(base, index): number `index` from address `base`; an integer is widened."""

    def load(typing_context: Any, base: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            value = builder.load(
                _reach(builder, arguments[0], arguments[1], kind), align=size_of(kind)
            )
            return builder.sext(value, I64) if kind == I32 else value

        return returns(types.intp, types.intp), generate

    return intrinsic(load)


def _make_store(kind: Any, takes: Any) -> Any:
    """store(base, index, value): write number `index` from address `base`; an integer is cut to its low bits."""

    def store(typing_context: Any, base: Any, index: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            value = builder.trunc(arguments[2], I32) if kind == I32 else arguments[2]
            builder.store(
                value,
                _reach(builder, arguments[0], arguments[1], kind, writes=True),
                align=size_of(kind),
            )
            return context.get_dummy_value()

        return types.void(types.intp, types.intp, takes), generate

    return intrinsic(store)


load_float, store_float = make_load(F32, types.float32), _make_store(F32, types.float32)
load_double, store_double = make_load(F64, types.float64), _make_store(F64, types.float64)
load_i32, store_i32 = make_load(I32, types.intp), _make_store(I32, types.intp)
store_int = _make_store(I64, types.intp)


def turn_round(builder: Any, bits: Value, constant: Any) -> Value:
    """From a float's bits to its ordered key, and back: the same operation. `constant` makes a 32-bit integer of the shape of `bits`."""
    return builder.xor(bits, builder.and_(builder.ashr(bits, constant(31)), constant(_MAGNITUDE)))


@intrinsic
def bits_of(typing_context: Any, number: Any) -> Any:
    """The bits of a float32 as an integer: how a number is handed to vector code."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.zext(builder.bitcast(arguments[0], I32), I64)

    return types.intp(types.float32), generate


@intrinsic
def key_of(typing_context: Any, number: Any) -> Any:
    """The ordered key of a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.sext(turn_round(builder, builder.bitcast(arguments[0], I32), I32), I64)

    return types.intp(types.float32), generate


@intrinsic
def number_of(typing_context: Any, key: Any) -> Any:
    """The float32 of an ordered key."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(turn_round(builder, builder.trunc(arguments[0], I32), I32), F32)

    return types.float32(types.intp), generate
