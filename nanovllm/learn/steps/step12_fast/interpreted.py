"""Compiled functions run by Python, which is fast for small arrays and shows what they do."""

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import numba
import numpy as np


def interpreted(
    module: ModuleType, name: str, prange: Callable[..., Iterable[int]] = range
) -> Callable[..., Any]:
    """Return a function of a module, in which nothing is compiled.

    Args:
        module: has the function.
        name: of the function.
        prange: what `numba.prange` is in it; by default `range`.
    """
    names = dict(vars(module))
    for key, value in vars(module).items():
        function = getattr(value, "py_func", value)
        if value is numba:
            names[key] = SimpleNamespace(**{**vars(numba), "prange": prange})
        elif value is numba.prange:
            names[key] = prange
        elif isinstance(function, FunctionType) and function.__globals__ is vars(module):
            names[key] = FunctionType(function.__code__, names, key, function.__defaults__)
    return names[name]


class WatchedRange:
    """A `prange` that counts the elements which two iterations write.

    Before and after each iteration it looks at the arrays that the function has in local variables.

    Attributes:
        iterations: how many there were.
        step: from one index to the next; Numba compiles 1 only.
        num_shared: elements that a second iteration wrote.
    """

    def __init__(self) -> None:
        """Start without iterations."""
        self.iterations = 0
        self.step = 1
        self.num_shared = 0

    def __call__(self, *arguments: int) -> Iterator[int]:
        """Iterate over range(*arguments)."""
        writers: Counter[tuple[str, int]] = Counter()
        frame = inspect.currentframe()
        assert frame is not None
        assert frame.f_back is not None
        function = frame.f_back  # which asks for the next index
        indices = range(*arguments)
        self.step = indices.step
        for index in indices:
            before = {
                name: (value, value.copy())
                for name, value in function.f_locals.items()
                if isinstance(value, np.ndarray)
            }
            yield index
            self.iterations += 1
            for name, (array, copy) in before.items():
                is_written = ~((array == copy) | (np.isnan(array) & np.isnan(copy)))
                writers.update((name, int(place)) for place in np.flatnonzero(is_written))
        self.num_shared = sum(count > 1 for count in writers.values())
