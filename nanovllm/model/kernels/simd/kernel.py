"""Kernels: functions of compiled code whose bodies are emitted through Vectors."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from numba import types

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
            are those of the function, int64: addresses, strides in bytes and counts.
        returns: the Numba type of the result.
    """
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = list(inspect.signature(emit).parameters)[1:]

    def declare(typing_context: Any, *arguments: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Sequence[Any]) -> Any:
            result = emit(Vectors(builder, target), *(Value(builder, value) for value in values))
            return context.get_dummy_value() if result is None else result.ir

        return returns(*[types.intp] * len(names)), generate

    # Numba passes arguments by the names in the signature.
    declare.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, kind) for name in ("typing_context", *names)]
    )
    return intrinsic(declare)
