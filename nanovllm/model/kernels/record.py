"""The arguments of compiled code: a record of integers, and the arrays that it points to."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

Dtypes = Mapping[str, tuple[np.dtype[Any], ...]]


class KernelMemory:
    """The one writer of a record, whose fields are all 64-bit integers.

    The field of an address is `<name>_ptr` or `<name>`; methods take the name without `_ptr`.

    Attributes:
        address: of the record.
        arrays: by name; an array is kept until another one takes its place.
    """

    def __init__(self, record: np.dtype[Any], dtypes: Dtypes) -> None:
        """Make a record of zeros; `dtypes` are the types that each array may have."""
        names = record.names or ()
        self._index = {name.removesuffix("_ptr"): index for index, name in enumerate(names)}
        self._integers = np.zeros(len(names), dtype=np.int64)  # faster to write than a record
        self._dtypes = dtypes
        self.address = self._integers.ctypes.data
        self.arrays: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> int:
        """Return the integer in a field."""
        return int(self._integers[self._index[name]])

    def set(self, **integers: int) -> None:
        """Write integers."""
        for name, integer in integers.items():
            self._integers[self._index[name]] = integer

    def bind(self, **arrays: np.ndarray) -> None:
        """Keep arrays and write their addresses.

        Raises:
            TypeError: an array has another type, or is not C-contiguous. Compiled code sees only an
                address, and would read garbage.
        """
        for name, array in arrays.items():
            if array.dtype not in self._dtypes[name] or not array.flags.c_contiguous:
                order = "C order" if array.flags.c_contiguous else "another order"
                dtypes = " or ".join(map(str, self._dtypes[name]))
                raise TypeError(
                    f"{name} is {array.dtype} in {order}; kernels read {dtypes} in C order"
                )
            self.arrays[name] = array
            self._integers[self._index[name]] = array.ctypes.data

    def point(self, name: str, address: int) -> None:
        """Write the address of memory that the caller keeps, instead of an array."""
        self.arrays.pop(name, None)
        self._integers[self._index[name]] = address

    def reserve(self, name: str, count: int) -> np.ndarray:
        """Return an int64 array of at least `count` numbers; it may have to make a new one."""
        array = self.arrays.get(name)
        if array is None or array.size < count:
            self.bind(**{name: np.zeros(max(64, 2 * count), dtype=np.int64)})
        return self.arrays[name]

    def fill(self, **values: np.ndarray) -> None:
        """Copy integers to arrays that grow where they must and otherwise stay where they are."""
        for name, integers in values.items():
            self.reserve(name, integers.size)[: integers.size] = integers.ravel()

    def all_arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the record and every array, with their names."""
        yield "the record", self._integers
        yield from self.arrays.items()
