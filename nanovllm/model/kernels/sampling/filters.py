"""min_p, top_k and top_p as one threshold: the smallest score that all three filters keep.

`record` is a SAMPLING_RECORD and `scratch` the thread's memory (record.py): a row of scores, the
maxima of its columns (passes.py), and space for keys and weights of the scores that matter. All
tokens that tie with the threshold are kept.
"""

import math
from functools import cache
from typing import Any

import numpy as np

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.sampling.passes import (
    LOWEST,
    MAX_DISTANCE,
    make_fill,
    make_weigh_groups,
    make_weigh_keys,
)
from nanovllm.model.kernels.sampling.record import GROUP_VECTORS, group_size
from nanovllm.model.kernels.sampling.select import select
from nanovllm.model.kernels.simd.move import load_int
from nanovllm.model.kernels.simd.scalar import (
    float_to_ordered,
    load_double,
    load_float,
    ordered_to_float,
    store_i32,
)

_ONE = np.float32(1.0)
_LOWEST = np.float32(LOWEST)


def make_find_threshold(target: KernelTarget) -> Any:
    """Make find_threshold(record, row, scratch, largest) -> the smallest score that is kept.

    Arguments of find_threshold:
        record, scratch: see above.
        row: number of the row.
        largest: its largest score.
    """
    weigh_groups, weigh_keys = make_weigh_groups(target), make_weigh_keys(target)
    gather, find_kth = _make_gather(target), make_find_kth(target)

    @compiled
    def find_threshold(record: Any, row: int, scratch: int, largest: Any) -> Any:
        least = max(largest - np.float32(MAX_DISTANCE), _LOWEST)
        least = max(least, largest + load_float(record.log_min_p, row))
        top_k, top_p = load_int(record.top_k, row), load_double(record.top_p, row)
        if 0 < top_k < record.vocab:
            least = max(least, find_kth(record, scratch, top_k, least, largest))
        if top_p < 1.0:
            sums = scratch + record.sums_offset
            total = weigh_groups(scratch, record.groups, least, largest, sums)
            # Scores of less weight than this sum to less than 1 - top_p. The 0.001 covers rounding.
            negligible = np.float32(math.log((1.0 - top_p) * total / record.vocab) - 0.001)
            least = max(least, largest + negligible)
            count = gather(record, scratch, least)
            keys, weights = scratch + record.keys_offset, scratch + record.weights_offset
            weigh_keys(keys, count, largest, weights)
            least = _select(record, scratch, count, least, largest, top_p * total)
        return least

    return find_threshold


@cache
def make_find_kth(target: KernelTarget) -> Any:
    """Make find_kth(record, scratch, k, least, largest) -> the k-th largest of a row's scores.

    At least k scores reach the k-th largest maximum of a column, so only columns whose maximum
    reaches it are read.

    Arguments of find_kth:
        record, scratch: see above.
        k: rank of the score, from 1.
        least, largest: bounds of the scores. Where fewer than k lie within, the smallest of them
            is returned.
    """
    lanes = target.lanes
    fill, gather = make_fill(target), _make_gather(target)

    @compiled
    def gather_maxima(record: Any, scratch: int, least: Any) -> int:
        """Do what `gather` does for the maxima of the columns."""
        count = 0
        for column in range(record.groups * lanes):
            highest = load_float(scratch + record.maxima_offset, column)
            store_i32(scratch + record.keys_offset, count, float_to_ordered(highest))
            count += 1 if highest >= least else 0
        return count

    @compiled
    def find_kth(record: Any, scratch: int, k: int, least: Any, largest: Any) -> Any:
        weights = scratch + record.weights_offset
        count = gather_maxima(record, scratch, least)
        if count >= k:
            fill(weights, count, _ONE)
            least = max(least, _select(record, scratch, count, least, largest, np.float64(k)))
        count = gather(record, scratch, least)
        fill(weights, count, _ONE)
        return _select(record, scratch, count, least, largest, np.float64(k))

    return find_kth


@compiled
def _select(record: Any, scratch: int, count: int, least: Any, largest: Any, goal: float) -> Any:
    """Apply `select` to the keys and weights in scratch memory; bounds and result are scores."""
    keys, weights, bins = (
        scratch + record.keys_offset,
        scratch + record.weights_offset,
        scratch + record.bins_offset,
    )
    low, high = float_to_ordered(least), float_to_ordered(largest)
    return ordered_to_float(select(keys, weights, bins, count, low, high, goal))


@cache
def _make_gather(target: KernelTarget) -> Any:
    lanes = target.lanes
    size = group_size(lanes)

    @compiled
    def gather(record: Any, scratch: int, least: float) -> int:
        """Write the keys of all scores from `least` up, in any order; return their number."""
        keys = scratch + record.keys_offset
        count = 0
        for column in range(record.groups * lanes):
            if load_float(scratch + record.maxima_offset, column) >= least:
                first = column // lanes * size + column % lanes
                for vector in range(GROUP_VECTORS):
                    score = load_float(scratch, first + vector * lanes)
                    store_i32(keys, count, float_to_ordered(score))
                    count += 1 if score >= least else 0
        return count

    return gather
