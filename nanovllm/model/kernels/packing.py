"""Laying weights and buffers out for the kernels: panels, padded rows, aligned memory."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

ALIGNMENT = 64  # bytes: a cache line, and the widest vector


def round_up(count: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `count`."""
    return -(-count // multiple) * multiple


def aligned_zeros(count: int) -> Float32[np.ndarray, " count"]:
    """`count` float32 zeros that begin at a cache line; memory that is never written to is never taken."""
    spare = ALIGNMENT // 4
    memory = np.zeros(count + spare, dtype=np.float32)
    start = -memory.ctypes.data % ALIGNMENT // 4
    return memory[start : start + count]


def pack_rows(rows: Sequence[Float32[np.ndarray, " columns"]], width: int) -> Float32[np.ndarray, "rows padded"]:
    """Rows of equal length one below the other, each filled up with zeros to a multiple of `width`."""
    padded = round_up(rows[0].shape[0], width)
    packed = aligned_zeros(len(rows) * padded).reshape(len(rows), padded)
    for row, values in zip(packed, rows, strict=True):
        row[: values.shape[0]] = values
    return packed


def pack_panels(weights: Sequence[Float32[np.ndarray, "d_in d_out"]], width: int) -> Float32[np.ndarray, "layers panels d_in width"]:
    """Each layer's weight as panels of `width` columns, the last one filled up with zeros."""
    d_in, d_out = weights[0].shape
    panels = round_up(d_out, width) // width
    packed = aligned_zeros(len(weights) * panels * d_in * width).reshape(len(weights), panels, d_in, width)
    for layer, weight in zip(packed, weights, strict=True):
        for panel in range(panels):
            columns = weight[:, panel * width : (panel + 1) * width]
            layer[panel, :, : columns.shape[1]] = columns
    return packed
