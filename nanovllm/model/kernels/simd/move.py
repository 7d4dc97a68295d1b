"""Access to records and integers at an address, and copies of rows."""

from typing import Any

import numba
import numpy as np
from numba import types

from nanovllm.model.kernels.build.bounds import checked
from nanovllm.model.kernels.build.compiler import intrinsic
from nanovllm.model.kernels.build.target import CHECKS_ADDRESSES
from nanovllm.model.kernels.simd.elements import map_elements
from nanovllm.model.kernels.simd.kernel import kernel_maker
from nanovllm.model.kernels.simd.scalar import make_load
from nanovllm.model.kernels.simd.value import I64, Value
from nanovllm.model.kernels.simd.vector import Vectors
from nanovllm.model.kernels.step_record import LINEAR_RECORD, STEP_RECORD


def record_at(dtype: np.dtype) -> Any:
    """Make a function for compiled code that returns the record of a type at an address."""
    record = numba.from_dtype(dtype)

    def declare(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address = arguments[0]
            if CHECKS_ADDRESSES:
                address = checked(builder, address, dtype.itemsize, writes=False)
            return builder.inttoptr(address, context.get_value_type(record))

        return record(types.intp), generate

    return intrinsic(declare)


step_record_at = record_at(STEP_RECORD)
"""step_record_at(address): the step record of step_record.py."""
linear_at = record_at(LINEAR_RECORD)
"""linear_at(address): the record of a linear layer."""
load_int = make_load(I64, types.intp)
"""load_int(base, index): element `index` of an int64 array at address `base`."""


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
