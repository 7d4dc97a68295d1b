"""Loads and stores of scalars and records at an address, and copies of rows.

Ordered integers make float32 values comparable as int32, so that they can be counted into bins and
sorted together with token ids:

    positive floats   their bits, which already ascend with the value
    negative floats   their bits with all but the sign inverted
"""

from typing import Annotated, Any

import numba
import numpy as np
from llvmlite import ir
from numba import types

from nanovllm.model.kernels.build.check_code import checked, size_of
from nanovllm.model.kernels.build.target import CHECKS_ADDRESSES
from nanovllm.model.kernels.simd.elements import map_elements
from nanovllm.model.kernels.simd.kernel import Float, emitted, kernel_maker
from nanovllm.model.kernels.simd.value import F32, F64, I8, I32, I64, Value
from nanovllm.model.kernels.simd.vector import Vectors
from nanovllm.model.kernels.step_record import LINEAR_RECORD, STEP_RECORD

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
load_int, store_int = make_load(I64, types.intp), _make_store(I64, types.intp)


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


def record_at(dtype: np.dtype) -> Any:
    """Make a function for compiled code that returns the record of a type at an address."""

    @emitted(numba.from_dtype(dtype))
    def at(address: Value) -> Value:
        builder, place = address.builder, address.ir
        if CHECKS_ADDRESSES:
            place = checked(builder, place, dtype.itemsize, writes=False)
        kind = ir.PointerType(ir.ArrayType(I8, dtype.itemsize))
        return Value(builder, builder.inttoptr(place, kind))

    return at


step_record_at = record_at(STEP_RECORD)
"""step_record_at(address): the step record of step_record.py."""
linear_at = record_at(LINEAR_RECORD)
"""linear_at(address): the record of a linear layer."""


@kernel_maker()
def make_copy(v: Vectors, source: Value, out: Value, count: Value) -> None:
    """Make copy(source, out, count), which copies exactly `count` float32."""
    map_elements(v, count, [source], [out], lambda value: [value])


@kernel_maker()
def make_clear(v: Vectors, out: Value, count: Value) -> None:
    """Make clear(out, count), which stores `count` float32 zeros, rounded up to whole vectors."""
    with v.range(count, v.lanes) as i:
        v.store(v.constant(0.0), v.element(out, i))


@kernel_maker()
def make_scatter(v: Vectors, source: Value, out: Value, out_stride: Value, count: Value) -> None:
    """Make scatter(source, out, out_stride, count), which copies float32 values to a strided row.

    Arguments of scatter:
        source: address of `count` float32.
        out: address of the first of them in the copy.
        out_stride: bytes from one to the next in the copy.
        count: exact number of values.
    """
    with v.range(count) as i:
        value = v.load_scalar(v.element(source, i))
        v.store(value, out + i * out_stride)


@kernel_maker()
def make_add(v: Vectors, source: Value, out: Value, count: Value) -> None:
    """Make add(source, out, count): out += source for exactly `count` float32."""
    map_elements(v, count, [out, source], [out], lambda total, value: [total + value])
