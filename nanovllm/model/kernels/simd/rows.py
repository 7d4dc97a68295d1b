"""Rows of an array, as one argument of compiled functions and of kernels."""

from typing import Any, NamedTuple

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import WORD_BYTES


class Rows(NamedTuple):
    """The address of the first row, and the bytes from one row to the next."""

    ptr: Any
    stride_bytes: Any

    def row(self, index: Any) -> Any:
        """Return the address of a row; for the bodies of kernels."""
        return self.ptr + self.stride_bytes * index


@compiled
def rows_at(ptr: int, stride_bytes: int) -> Rows:
    """Return Rows, in compiled code: the type of Rows(ptr, 0) would have the constant in it."""
    return Rows(ptr, stride_bytes)


@compiled
def rows_from(rows: Any, first: int) -> Rows:
    """Return the rows from row `first` on."""
    return Rows(rows.ptr + first * rows.stride_bytes, rows.stride_bytes)


@compiled
def columns_from(rows: Any, first: int) -> Rows:
    """Return the columns of 32-bit words from column `first` on."""
    return Rows(rows.ptr + first * WORD_BYTES, rows.stride_bytes)
