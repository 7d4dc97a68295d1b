"""Memory layouts of weights and buffers: panels, padded rows, aligned memory."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int8, UInt16, UInt32

from nanovllm.model.kernels.build.layout import LINE_BYTES, WORD_BYTES


def round_up(count: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `count`."""
    return -(-count // multiple) * multiple


def aligned_zeros(count: int) -> Float32[np.ndarray, " count"]:
    """Return `count` float32 zeros, aligned to a cache line; pages become resident when written."""
    spare = LINE_BYTES // WORD_BYTES
    memory = np.zeros(count + spare, dtype=np.float32)
    start = -memory.ctypes.data % LINE_BYTES // WORD_BYTES
    return memory[start : start + count]


def pack_rows(
    rows: Sequence[Float32[np.ndarray, " columns"]], width: int
) -> Float32[np.ndarray, "rows padded"]:
    """Stack rows of equal length, each zero-padded to a multiple of `width`."""
    padded = round_up(rows[0].shape[0], width)
    packed = aligned_zeros(len(rows) * padded).reshape(len(rows), padded)
    for row, values in zip(packed, rows, strict=True):
        row[: values.shape[0]] = values
    return packed


def to_bfloat16(values: Float32[np.ndarray, "*shape"]) -> UInt16[np.ndarray, "*shape"]:
    """Round to the nearest bfloat16, ties to even; infinities and NaN stay."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16))


def panel_steps(d_in: int, per_word: int) -> int:
    """Return the 32-bit words down a panel."""
    return -(-d_in // per_word)


def pack_panels(
    weight: Float32[np.ndarray, "d_in d_out"]
    | UInt16[np.ndarray, "d_in d_out"]
    | Int8[np.ndarray, "d_in d_out"],
    width: int,
    *,
    narrow: bool = False,
    steps: int | None = None,
) -> UInt32[np.ndarray, "panels steps width"]:
    """Pack a weight into zero-padded panels of `width` columns; see simd/formats.py for the layout.

    `narrow` rounds float32 to bfloat16, panel by panel, so that no second copy is in memory.
    `steps` are the words down a panel, those behind the weight zeros; by default as many as needed.
    """
    d_in, d_out = weight.shape
    dtype = np.dtype(np.uint16) if narrow else weight.dtype
    per_word = WORD_BYTES // dtype.itemsize
    panels, steps = round_up(d_out, width) // width, steps or panel_steps(d_in, per_word)
    packed = (
        aligned_zeros(panels * steps * width).view(dtype).reshape(panels, steps, width, per_word)
    )
    whole = d_in // per_word
    for panel in range(panels):
        columns = weight[:, panel * width : (panel + 1) * width]
        if narrow:
            columns = to_bfloat16(columns)
        count = columns.shape[1]
        packed[panel, :whole, :count] = (
            columns[: whole * per_word].reshape(whole, per_word, count).transpose(0, 2, 1)
        )
        for offset, row in enumerate(columns[whole * per_word :]):
            packed[panel, whole, :count, offset] = row
    return packed.view(np.uint32).reshape(panels, steps, width)
