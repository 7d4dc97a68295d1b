"""Reading records and integers, and moving rows of float32 about."""

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types

from nanovllm.model.kernels.compiler import intrinsic
from nanovllm.model.kernels.parameters import PARAMETERS
from nanovllm.model.kernels.vector import I64, Value, Vectors, kernel

INT_BYTES = 8


def _record_at(dtype: np.dtype) -> Any:
    record = numba.from_dtype(dtype)

    def declare(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(record))

        return record(types.intp), generate

    return intrinsic(declare)


parameters_at = _record_at(PARAMETERS)
"""parameters_at(address): the record of parameters.py that begins there."""


@intrinsic
def load_int(typing_context: Any, base: Any, index: Any) -> Any:
    """load_int(base, index): 64-bit integer number `index` from address `base`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = builder.add(arguments[0], builder.mul(arguments[1], I64(INT_BYTES)))
        return builder.load(builder.inttoptr(address, ir.PointerType(I64)), align=INT_BYTES)

    return types.intp(types.intp, types.intp), generate


def make_copy(lanes: int) -> Any:
    """copy(source, target, count): exactly `count` float32."""

    def copy(v: Vectors, source: Value, target: Value, count: Value) -> None:
        whole = v.builder.and_(count, I64(-lanes))

        def vectors(i: Value, _: list[Value]) -> list[Value]:
            v.store(v.load(v.element(source, i)), v.element(target, i))
            return []

        def rest(i: Value, _: list[Value]) -> list[Value]:
            place = v.builder.add(whole, i)
            v.store(v.load_scalar(v.element(source, place)), v.element(target, place))
            return []

        v.loop(whole, lanes, [], vectors)
        v.loop(v.builder.sub(count, whole), 1, [], rest)

    return kernel(lanes, copy)


def make_clear(lanes: int) -> Any:
    """clear(target, count): whole vectors of zeros, at least `count` float32."""

    def clear(v: Vectors, target: Value, count: Value) -> None:
        def zero(i: Value, _: list[Value]) -> list[Value]:
            v.store(v.constant(0.0), v.element(target, i))
            return []

        v.loop(count, lanes, [], zero)

    return kernel(lanes, clear)


def make_scatter(lanes: int) -> Any:
    """scatter(source, target, target_stride, count): `count` float32, each `target_stride` bytes after the one before."""

    def scatter(v: Vectors, source: Value, target: Value, target_stride: Value, count: Value) -> None:
        def one(i: Value, _: list[Value]) -> list[Value]:
            v.store(v.load_scalar(v.element(source, i)), v.address(target, v.builder.mul(i, target_stride)))
            return []

        v.loop(count, 1, [], one)

    return kernel(lanes, scatter)


def make_add(lanes: int) -> Any:
    """add(source, target, count): target += source, whole vectors, at least `count` float32."""

    def add(v: Vectors, source: Value, target: Value, count: Value) -> None:
        def vector(i: Value, _: list[Value]) -> list[Value]:
            v.store(v.add(v.load(v.element(target, i)), v.load(v.element(source, i))), v.element(target, i))
            return []

        v.loop(count, lanes, [], vector)

    return kernel(lanes, add)
