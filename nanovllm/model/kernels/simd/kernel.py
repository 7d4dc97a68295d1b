"""Functions of compiled code whose bodies are emitted by Python functions of Values."""

import inspect
from collections.abc import Callable, Sequence
from functools import cache, partial, wraps
from types import SimpleNamespace
from typing import Annotated, Any, get_args, get_origin

from numba import types
from numba.core import cgutils

from nanovllm.model.kernels.build.compiler import intrinsic
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.value import F32, I32, I64, Value
from nanovllm.model.kernels.simd.vector import Vectors

Float = Annotated[Value, types.float32]
"""A float32 argument."""
Double = Annotated[Value, types.float64]
"""A float64 argument."""


class Record(SimpleNamespace):
    """A record argument: its fields as scalars, all of them loaded when the function begins.

    Fields are int64. A float32 whose bits are in the field `<name>_bits` is `<name>`.
    """


def emitted(returns: Any = types.void) -> Callable[[Callable[..., Value | None]], Any]:
    """Return a decorator that makes a function of compiled code from one that emits its body.

    `returns` is the Numba type of the result. Parameters are int64 (addresses, strides in bytes and
    counts) where they are annotated as Value, and otherwise Float, Double, a Record, or a
    NamedTuple of int64 such as Rows.
    """

    def decorate(emit: Callable[..., Value | None]) -> Any:
        parameters = list(inspect.signature(emit).parameters.values())
        return _make(lambda _builder: emit, parameters, returns)

    return decorate


def kernel(
    target: KernelTarget, emit: Callable[..., Value | None], returns: Any = types.void
) -> Any:
    """Make a function of compiled code as `emitted` does, from emit(v, ...) with Vectors `v`."""
    parameters = list(inspect.signature(emit).parameters.values())[1:]
    return _make(lambda builder: partial(emit, Vectors(builder, target)), parameters, returns)


def kernel_maker(returns: Any = types.void) -> Callable[..., Callable[[KernelTarget], Any]]:
    """Return a decorator that turns emit(v, ...) into make(target), which returns its kernel."""

    def decorate(emit: Callable[..., Value | None]) -> Callable[[KernelTarget], Any]:
        @cache
        @wraps(emit)
        def make(target: KernelTarget) -> Any:
            return kernel(target, emit, returns)

        return make

    return decorate


def _make(
    emit_in: Callable[[Any], Callable[..., Value | None]],
    parameters: Sequence[inspect.Parameter],
    returns: Any,
) -> Any:
    """Make a function with these parameters; `emit_in(builder)` returns what emits its body."""

    def declare(_typing_context: Any, *arguments: Any) -> Any:
        takes = [
            _numba_type(parameter.annotation, argument)
            for parameter, argument in zip(parameters, arguments, strict=True)
        ]

        def generate(context: Any, builder: Any, _signature: Any, values: Sequence[Any]) -> Any:
            passed = map(partial(_to_argument, builder), takes, values)
            result = emit_in(builder)(*passed)
            return context.get_dummy_value() if result is None else result.ir

        return returns(*takes), generate

    # Numba passes arguments by the names in the signature.
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = ("typing_context", *(parameter.name for parameter in parameters))
    declare.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, kind) for name in names]
    )
    return intrinsic(declare)


def _numba_type(annotation: Any, argument: Any) -> Any:
    """Return the Numba type that a parameter takes; `argument` is the type of what is passed."""
    if get_origin(annotation) is Annotated:
        return get_args(annotation)[1]
    if isinstance(annotation, type) and issubclass(annotation, tuple):
        fields = annotation._fields  # type: ignore[attr-defined]
        return types.NamedUniTuple(types.intp, len(fields), annotation)
    return argument if annotation is Record else types.intp


def _to_argument(builder: Any, kind: Any, value: Any) -> Any:
    """Return llvmlite's value of a Numba type as a Value, a NamedTuple of them, or a Record."""
    if isinstance(kind, types.NamedUniTuple):
        parts = cgutils.unpack_tuple(builder, value)
        return kind.instance_class(*(Value(builder, part) for part in parts))
    if not isinstance(kind, types.Record):
        return Value(builder, value)
    record = Record()
    for name in kind.fields:
        pointer = cgutils.get_record_member(builder, value, kind.offset(name), I64)
        field = Value(builder, builder.load(pointer))
        if name.endswith("_bits"):
            field = field.trunc(I32).bitcast(F32)
        setattr(record, name.removesuffix("_bits"), field)
    return record
