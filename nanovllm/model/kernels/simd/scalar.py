"""Loads and stores of scalars at an address, for compiled code that is not vector code.

Ordered integers make float32 values comparable as int32, so that they can be counted into bins and
sorted together with token ids:

    positive floats   their bits, which already ascend with the value
    negative floats   their bits with all but the sign inverted
"""

from typing import Annotated, Any

from llvmlite import ir
from numba import types

from nanovllm.model.kernels.build.bounds import checked, size_of
from nanovllm.model.kernels.build.target import CHECKS_ADDRESSES
from nanovllm.model.kernels.simd.kernel import Float, emitted
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

    @emitted(returns)
    def load(base: Value, index: Value) -> Value:
        pointer = _element(base, index, kind)
        value = Value(base.builder, base.builder.load(pointer, align=size_of(kind)))
        return value.sext(I64) if kind == I32 else value

    return load


def _make_store(kind: Any, takes: Any) -> Any:
    """Make store(base, index, value), the counterpart of `make_load`; int64 is cut to int32."""

    @emitted()
    def store(base: Value, index: Value, value: Annotated[Value, takes]) -> None:
        value = value.trunc(I32) if kind == I32 else value
        pointer = _element(base, index, kind, writes=True)
        base.builder.store(value.ir, pointer, align=size_of(kind))

    return store


load_float, store_float = make_load(F32, types.float32), _make_store(F32, types.float32)
load_double, store_double = make_load(F64, types.float64), _make_store(F64, types.float64)
load_i32, store_i32 = make_load(I32, types.intp), _make_store(I32, types.intp)
store_int = _make_store(I64, types.intp)


def ordered_bits(bits: Value) -> Value:
    """Return the ordered integers of the bits of float32; the map is its own inverse."""
    return bits ^ ((bits >> 31) & _MAGNITUDE)


@emitted(types.intp)
def float_to_ordered(x: Float) -> Value:
    """Return the ordered integer of a float32."""
    return ordered_bits(x.bitcast(I32)).sext(I64)


@emitted(types.float32)
def ordered_to_float(key: Value) -> Value:
    """Return the float32 of an ordered integer."""
    return ordered_bits(key.trunc(I32)).bitcast(F32)
