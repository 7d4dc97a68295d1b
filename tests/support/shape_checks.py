"""Check jaxtyping's annotations by beartype at calls, once for each case.

A case of a call is all that the checks depend on: the shape and dtype of each array, the type of
each other value, and the values of strings and types. A case that has passed passes again.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from types import FunctionType
from typing import Any, TypeVar

import beartype
import jaxtyping
import numpy as np
from jaxtyping import install_import_hook, jaxtyped

T = TypeVar("T")


def install_shape_checks(modules: Sequence[str]) -> None:
    """Check the calls of the functions and dataclasses of modules that are imported from now on."""
    install_import_hook(modules, None)
    jaxtyping.jaxtyped = lambda *, typechecker: check_once_per_case  # type: ignore[assignment]


def check_once_per_case(checked: T) -> T:
    """Return the function, or the class if it is a dataclass, with checks of its calls.

    A function within a function is returned as it is: each call creates a new one, and wrapping it
    takes milliseconds.
    """
    if isinstance(checked, type):
        if dataclasses.is_dataclass(checked):
            checked.__init__ = _check_function(checked.__init__)  # type: ignore[method-assign]
        return checked
    if "<locals>" in checked.__qualname__:  # type: ignore[attr-defined]
        return checked
    return _check_function(checked)  # type: ignore[return-value]


def _check_function(function: Any) -> Callable[..., Any]:
    """jaxtyping binds the names of dimensions in a call, so that arguments and result agree.

    The checks are made when they are first needed: most modules have functions that no test calls.
    """
    local = threading.local()

    @functools.cache
    def call_and_check() -> Callable[..., Any]:
        check: Callable[..., Any] = jaxtyped(function, typechecker=beartype.beartype)
        return check

    @functools.cache
    def check_result() -> Callable[..., Any]:
        def take_result(*_args: Any, **_kwargs: Any) -> Any:
            return local.result

        stand_in = FunctionType(
            take_result.__code__, function.__globals__, closure=take_result.__closure__
        )
        return jaxtyped(functools.update_wrapper(stand_in, function), typechecker=beartype.beartype)

    passed_arguments: set[Hashable] = set()
    passed_calls: set[Hashable] = set()

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            case = (*map(_summary, args), *kwargs, *map(_summary, kwargs.values()))
        except _ContainerError:
            return call_and_check()(*args, **kwargs)
        if case not in passed_arguments:
            result = call_and_check()(*args, **kwargs)
            passed_arguments.add(case)
            return result
        result = function(*args, **kwargs)
        try:
            whole_case = case, _summary(result)
        except _ContainerError:
            whole_case = None
        if whole_case not in passed_calls:
            local.result = result
            check_result()(*args, **kwargs)
            del local.result
            if whole_case is not None:
                passed_calls.add(whole_case)
        return result

    return call


class _ContainerError(Exception):
    """beartype looks at one item of a container, another one each time."""


def _summary(value: Any) -> Hashable:
    """Return what the checks of a value depend on."""
    kind = type(value)
    if isinstance(value, np.ndarray):
        return kind, value.dtype, value.shape
    if isinstance(value, (str, type)):
        return value
    if kind is tuple:
        return tuple(map(_summary, value))
    if issubclass(kind, Iterable):
        raise _ContainerError
    return kind  # type: ignore[return-value]
