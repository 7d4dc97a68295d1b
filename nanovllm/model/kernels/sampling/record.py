"""What compiled sampling is given, in the manner of step_record.py, and the memory that it works in; known without Numba."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from nanovllm.model.kernels.build.layout import F32_BYTES

GROUP_VECTORS = 16
"""Vectors in a group of a row's scores, see passes.py."""
BINS = 1 << 9
"""Bins of a round of select.py: a round settles nine bits of a key."""
SIDES = 4
"""Sets of bins, taken in turn: neighbours often fall into one bin, and an addition would wait for the one before."""
BINS_BYTES = SIDES * BINS * 8

_SIZES = "threads rows vocab padded groups max_logprobs sampling"
_BYTES = (
    "logits_stride scratch_bytes keys_offset weights_offset maxima_offset sums_offset bins_offset"
)
_ADDRESSES = """
    logits work scratch
    temperature log_min_p repetition presence frequency top_k top_p seeds choices positions
    history_starts history_ids history_counts edit_starts edit_ids edit_values allowed_starts allowed_ids
    tokens has_token num_logprobs num_top ranks top_ids logprobs
"""
SAMPLING_RECORD = np.dtype([(name, np.int64) for name in f"{_SIZES} {_BYTES} {_ADDRESSES}".split()])
"""What sample_rows is given, in the manner of step_record.py.

`max_logprobs` is the room for likely tokens a row; `sampling` is 0 where `tokens` are given and only reports are wanted. A row's report has
`num_logprobs` likely tokens, -1 for no report at all; `num_top` says how many there were. Columns of settings have one entry a row, `*_starts`
one more: a row's share of the lists.
"""

_FLOATS = "logits scratch temperature log_min_p repetition presence frequency edit_values logprobs"
_WIDE = {"top_p": np.dtype(np.float64), "seeds": np.dtype(np.uint64)}
SAMPLING_DTYPES: Mapping[str, tuple[np.dtype[Any], ...]] = {
    **dict.fromkeys(_ADDRESSES.split(), (np.dtype(np.int64),)),
    **dict.fromkeys(_FLOATS.split(), (np.dtype(np.float32),)),
    **{name: (dtype,) for name, dtype in _WIDE.items()},
}
"""Types of the arrays at the addresses of SAMPLING_RECORD."""


def group_size(lanes: int) -> int:
    """Scores in a group."""
    return GROUP_VECTORS * lanes


def scratch_layout(vocab: int, lanes: int) -> dict[str, int]:
    """Sizes and offsets of a thread's scratch memory, under their names in the record."""
    groups = -(-vocab // group_size(lanes))
    row_bytes = groups * group_size(lanes) * F32_BYTES
    parts = {
        "keys_offset": row_bytes,
        "weights_offset": row_bytes,
        "maxima_offset": row_bytes,
        "sums_offset": row_bytes // GROUP_VECTORS,
    }
    layout = {"padded": groups * group_size(lanes), "groups": groups}
    at = 0
    for name, size_before in parts.items():
        at += size_before
        layout[name] = at
    layout["bins_offset"] = at + -(-groups * 8 // 64) * 64
    layout["scratch_bytes"] = layout["bins_offset"] + BINS_BYTES
    return layout
