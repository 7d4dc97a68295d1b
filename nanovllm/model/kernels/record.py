"""The record that compiled code is given, and the arrays whose addresses are in it."""

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from nanovllm.model.kernels.step_record import DTYPES, FLOAT32, PARAMETERS

_PLACES = {name: place for place, name in enumerate(PARAMETERS.names or ())}


def check_array(name: str, array: np.ndarray, dtypes: Collection[np.dtype[Any]]) -> None:
    """Raise TypeError unless compiled code can read the array at its address: one of `dtypes`, C order.

    Compiled code sees an address and no type: it would read garbage and say nothing.
    """
    if array.dtype not in dtypes or not array.flags.c_contiguous:
        order = "C order" if array.flags.c_contiguous else "another order"
        wanted = " or ".join(map(str, dtypes))
        raise TypeError(f"{name} is {array.dtype} in {order}; kernels read {wanted} in C order")


class KernelMemory:
    """One record of kernels/step_record.py. Every field is an integer of 64 bits, so it is written as an array of them, which is quick.

    Attributes:
        arrays: by the names that their addresses have in the record; an array is freed when another takes its name.
    """

    def __init__(self) -> None:
        """A record of zeros."""
        self._words = np.zeros(len(_PLACES), dtype=np.int64)
        self.address = self._words.ctypes.data
        self.arrays: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> int:
        """The number that stands under a name."""
        return int(self._words[_PLACES[name]])

    def set(self, **numbers: int) -> None:
        """Write down numbers."""
        for name, number in numbers.items():
            self._words[_PLACES[name]] = number

    def place(self, **arrays: np.ndarray) -> None:
        """Keep arrays and write down where they are; raises TypeError for one of another type."""
        for name, array in arrays.items():
            check_array(name, array, DTYPES.get(name, FLOAT32))
            self.arrays[name] = array
            self._words[_PLACES[name]] = array.ctypes.data

    def reserve(self, name: str, size: int) -> np.ndarray:
        """An array of at least so many integers under a name; what was in it may be lost."""
        array = self.arrays.get(name)
        if array is None or array.size < size:
            self.place(**{name: np.zeros(max(64, 2 * size), dtype=np.int64)})
        return self.arrays[name]

    def fill(self, **values: np.ndarray) -> None:
        """Copy integers into arrays that grow as they must and otherwise stay where they are."""
        for name, given in values.items():
            self.reserve(name, given.size)[: given.size] = given.ravel()

    def all_arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """The record and everything that it names."""
        yield "the record", self._words
        yield from self.arrays.items()
