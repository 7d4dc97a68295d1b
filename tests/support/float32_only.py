"""Arrays that fail on becoming float64: every float64 intermediate shows, not just the result."""

from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


class Float32Only(np.ndarray):
    """An array that fails the test when NumPy makes a float64 array of it."""

    def __array_finalize__(self, obj: object) -> None:
        assert self.dtype != np.float64, "float64 in the forward pass"


def float32_only(tree: T) -> T:
    """Return guarding views of an array, or of all arrays in a tuple or dataclass."""
    changed: Any = tree
    if isinstance(tree, np.ndarray):
        changed = tree.view(Float32Only)
    elif isinstance(tree, tuple):
        changed = tuple(map(float32_only, tree))
    elif is_dataclass(tree) and not isinstance(tree, type):
        changed = type(tree)(*(float32_only(getattr(tree, field.name)) for field in fields(tree)))
    result: T = changed
    return result
