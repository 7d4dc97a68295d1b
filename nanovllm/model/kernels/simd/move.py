"""Reading records and integers, and moving rows of words about."""

from typing import Any

import numba
import numpy as np
from numba import types

from nanovllm.model.kernels.build.bounds import checked
from nanovllm.model.kernels.build.compiler import intrinsic
from nanovllm.model.kernels.build.target import CHECKS_ADDRESSES, KernelTarget
from nanovllm.model.kernels.simd.scalar import make_load
from nanovllm.model.kernels.simd.vector import I64, Value, Vectors, kernel
from nanovllm.model.kernels.step_record import LINEAR, PARAMETERS

INT_BYTES = 8


def record_at(dtype: np.dtype) -> Any:
    """A function for compiled code: the record of that type that begins at an address."""
    record = numba.from_dtype(dtype)

    def declare(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address = (
                checked(builder, arguments[0], dtype.itemsize, writes=False)
                if CHECKS_ADDRESSES
                else arguments[0]
            )
            return builder.inttoptr(address, context.get_value_type(record))

        return record(types.intp), generate

    return intrinsic(declare)


step_record_at = record_at(PARAMETERS)
"""step_record_at(address): the record of step_record.py that begins there."""
linear_at = record_at(LINEAR)
"""linear_at(address): a linear layer's record."""
load_int = make_load(I64, types.intp)
"""load_int(base, index): 64-bit integer number `index` from address `base`."""


def make_copy(target: KernelTarget) -> Any:
    """copy(source, out, count): exactly `count` float32."""

    def copy(v: Vectors, source: Value, out: Value, count: Value) -> None:
        whole = v.builder.and_(count, I64(-v.lanes))

        def vectors(i: Value, _: list[Value]) -> list[Value]:
            v.store(v.load(v.element(source, i)), v.element(out, i))
            return []

        def rest(i: Value, _: list[Value]) -> list[Value]:
            place = v.builder.add(whole, i)
            v.store(v.load_scalar(v.element(source, place)), v.element(out, place))
            return []

        v.loop(whole, v.lanes, [], vectors)
        v.loop(v.builder.sub(count, whole), 1, [], rest)

    return kernel(target, copy)


def make_clear(target: KernelTarget) -> Any:
    """clear(out, count): whole vectors of zeros, at least `count` float32."""

    def clear(v: Vectors, out: Value, count: Value) -> None:
        def zero(i: Value, _: list[Value]) -> list[Value]:
            v.store(v.constant(0.0), v.element(out, i))
            return []

        v.loop(count, v.lanes, [], zero)

    return kernel(target, clear)


def make_scatter(target: KernelTarget) -> Any:
    """scatter(source, out, out_stride, count): `count` float32, each `out_stride` bytes after the one before."""

    def scatter(v: Vectors, source: Value, out: Value, out_stride: Value, count: Value) -> None:
        def one(i: Value, _: list[Value]) -> list[Value]:
            v.store(
                v.load_scalar(v.element(source, i)), v.address(out, v.builder.mul(i, out_stride))
            )
            return []

        v.loop(count, 1, [], one)

    return kernel(target, scatter)


def make_add(target: KernelTarget) -> Any:
    """add(source, out, count): out += source, whole vectors, at least `count` float32."""

    def add(v: Vectors, source: Value, out: Value, count: Value) -> None:
        def vector(i: Value, _: list[Value]) -> list[Value]:
            v.store(
                v.add(v.load(v.element(out, i)), v.load(v.element(source, i))), v.element(out, i)
            )
            return []

        v.loop(count, v.lanes, [], vector)

    return kernel(target, add)
