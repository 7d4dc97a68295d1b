"""The tile unit of a CPU (Intel AMX) in NumPy: what its bits must be; see simd/tile_unit.py."""

import struct

import numpy as np
from jaxtyping import Float32, Float64, Int32, UInt16, UInt32

TILE_BYTES = 1024
"""Bytes of a register: 16 rows of 64 bytes."""
FLUSHED_BELOW = 2.0**-126 - 2.0**-151
"""Exact results below this count as 0: rounded to 24 bits, they are less than any normal float32.
"""


def configuration(rows: int) -> bytes:
    """Return the unit's configuration: registers 0 to 4 have `rows` rows, the others 16.

    It has 64 bytes: palette 1, first row 0, 14 reserved; int16 bytes of a row of each of 16
    registers; rows of each of 16 registers. The unit has eight of them.
    """
    heights = [rows] * 5 + [16] * 3
    return struct.pack("<2B14x8H16x8B8x", 1, 0, *[64] * 8, *heights)


def multiply_add(
    kind: str,
    accumulators: UInt32[np.ndarray, "rows columns"],
    inputs: UInt32[np.ndarray, "rows words"],
    weights: UInt32[np.ndarray, "words columns"],
) -> UInt32[np.ndarray, "rows columns"]:
    """Return accumulators + inputs @ weights; all are bits, `kind` is "bfloat16" or "int8".

    A register has up to 16 rows, columns and words; more rows and columns are several registers.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if kind == "int8":
            return _add_bytes(accumulators.view(np.int32), inputs, weights).view(np.uint32)
        return _add_floats(accumulators.view(np.float32), inputs, weights).view(np.uint32)


def _add_bytes(
    sums: Int32[np.ndarray, "rows columns"],
    inputs: UInt32[np.ndarray, "rows words"],
    weights: UInt32[np.ndarray, "words columns"],
) -> Int32[np.ndarray, "rows columns"]:
    a = np.ascontiguousarray(inputs).view(np.uint8).astype(np.int32)
    columns = np.ascontiguousarray(weights.T).view(np.int8).astype(np.int32)
    return sums + a @ columns.T


def _add_floats(
    sums: Float32[np.ndarray, "rows columns"],
    inputs: UInt32[np.ndarray, "rows words"],
    weights: UInt32[np.ndarray, "words columns"],
) -> Float32[np.ndarray, "rows columns"]:
    a = _flushed(_widened(np.ascontiguousarray(inputs).view(np.uint16)))
    columns = _flushed(_widened(np.ascontiguousarray(weights.T).view(np.uint16)))
    chains = [np.zeros_like(sums), np.zeros_like(sums)]
    for number in range(a.shape[1]):
        product = a[:, None, number].astype(np.float64) * columns[None, :, number]
        chains[number % 2] = _rounded(product + chains[number % 2])
    total = _rounded(chains[0].astype(np.float64) + chains[1])
    return _rounded(total.astype(np.float64) + _flushed(sums))


def _widened(bits: UInt16[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _rounded(exact: Float64[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    return np.where(np.abs(exact) < FLUSHED_BELOW, exact * 0.0, exact).astype(np.float32)


def _flushed(x: Float32[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    return np.where(np.abs(x) < np.float32(2.0**-126), x * np.float32(0), x)
