"""The record that compiled sampling reads, as step_record.py's, and the layout of its scratch
memory.

This module needs no Numba.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.sampling import ROW_SETTINGS

GROUP_VECTORS = 16
"""Vectors in a group of a row's scores, see passes.py."""
BINS = 1 << 9
"""Bins of a round of filters.py; a round settles nine bits of a key."""
BIN_SETS = 4
"""Sets of bins, used in turn: neighbours often fall into one bin, and additions to one bin wait for
each other."""
BINS_BYTES = BIN_SETS * BINS * 8

_SIZES = "threads rows vocab padded groups max_logprobs sampling"
_BYTES = "logits_stride scratch_bytes keys_offset weights_offset maxima_offset bins_offset"
_ADDRESSES = f"""
    logits work scratch
    {" ".join(ROW_SETTINGS.names or ())} log_min_p positions
    history_starts history_ids history_counts edit_starts edit_ids edit_values
    allowed_starts allowed_ids
    tokens has_token num_top ranks top_ids logprobs
"""
SAMPLING_RECORD = np.dtype([(name, np.int64) for name in f"{_SIZES} {_BYTES} {_ADDRESSES}".split()])
"""Arguments of sample_rows: sizes in elements, strides and offsets in bytes, and addresses.

padded        scores of a row, rounded up to whole groups
groups        groups of a row
max_logprobs  columns of `top_ids`; `logprobs` has one more
sampling      0 where `tokens` are inputs and only log-probabilities are computed
work          a counter that hands out rows
num_logprobs  top tokens to report of each row, -1 for no report
num_top       top tokens that were reported
*_starts      rows + 1 indices: where each row's part of the lists begins

The settings and results have one element a row.
"""

_FLOATS = "logits scratch log_min_p edit_values logprobs"
SAMPLING_DTYPES: Mapping[str, tuple[np.dtype[Any], ...]] = {
    **dict.fromkeys(_ADDRESSES.split(), (np.dtype(np.int64),)),
    **dict.fromkeys(_FLOATS.split(), (np.dtype(np.float32),)),
    **{name: (ROW_SETTINGS[name],) for name in ROW_SETTINGS.names or ()},
    "top_p": (np.dtype(np.float64),),
}
"""Types of the arrays at the addresses of SAMPLING_RECORD."""


def group_size(lanes: int) -> int:
    """Return the scores in a group."""
    return GROUP_VECTORS * lanes


def scratch_layout(vocab: int, lanes: int) -> dict[str, int]:
    """Return the sizes and offsets of a thread's scratch memory, by their names in the record.

    scores | keys | weights | maxima of columns | bins
    """
    groups = -(-vocab // group_size(lanes))
    row_bytes = groups * group_size(lanes) * WORD_BYTES
    bins_offset = 3 * row_bytes + row_bytes // GROUP_VECTORS
    return {
        "padded": groups * group_size(lanes),
        "groups": groups,
        "keys_offset": row_bytes,
        "weights_offset": 2 * row_bytes,
        "maxima_offset": 3 * row_bytes,
        "bins_offset": bins_offset,
        "scratch_bytes": bins_offset + BINS_BYTES,
    }
