"""Kernels: functions of compiled code whose bodies are emitted through Vectors."""

import inspect
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any

from numba import types
from numba.core import cgutils

from nanovllm.model.kernels.build.compiler import intrinsic
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.value import Value
from nanovllm.model.kernels.simd.vector import Vectors


def kernel(
    target: KernelTarget, emit: Callable[..., Value | None], returns: Any = types.void
) -> Any:
    """Make a function that compiled code can call and whose body `emit` emits.

    Args:
        target: what the code is compiled for.
        emit: emit(v, ...) emits the body through a Vectors, at every call. Its other parameters
            are those of the function, int64: addresses, strides in bytes and counts. A parameter
            that is annotated with a NamedTuple, such as Rows, takes one of int64.
        returns: the Numba type of the result.
    """
    parameters = list(inspect.signature(emit).parameters.values())[1:]
    records = [_record_of(parameter.annotation) for parameter in parameters]
    takes = [types.intp if record is None else _numba_type(record) for record in records]

    def declare(typing_context: Any, *arguments: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Sequence[Any]) -> Value:
            pairs = zip(records, values, strict=True)
            arguments = (_to_argument(builder, record, value) for record, value in pairs)
            result = emit(Vectors(builder, target), *arguments)
            return context.get_dummy_value() if result is None else result.ir

        return returns(*takes), generate

    # Numba passes arguments by the names in the signature.
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    declare.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, kind)
            for name in ("typing_context", *(parameter.name for parameter in parameters))
        ]
    )
    return intrinsic(declare)


def kernel_maker(returns: Any = types.void) -> Callable[..., Callable[[KernelTarget], Any]]:
    """Return a decorator that turns emit(v, ...) into make(target), which returns its kernel."""

    def decorate(emit: Callable[..., Value | None]) -> Callable[[KernelTarget], Any]:
        @cache
        @wraps(emit)
        def make(target: KernelTarget) -> Any:
            return kernel(target, emit, returns)

        return make

    return decorate


def _record_of(annotation: Any) -> Any:
    """Return the NamedTuple that a parameter takes, or None."""
    is_record = isinstance(annotation, type) and issubclass(annotation, tuple)
    return annotation if is_record else None


def _numba_type(record: Any) -> Any:
    return types.NamedUniTuple(types.intp, len(record._fields), record)


def _to_argument(builder: Any, record: Any, value: Any) -> Any:
    """Return a Value, or a NamedTuple of them, for an argument of llvmlite."""
    if record is None:
        return Value(builder, value)
    return record(*(Value(builder, part) for part in cgutils.unpack_tuple(builder, value)))
