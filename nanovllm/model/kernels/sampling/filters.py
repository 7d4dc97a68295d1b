"""min_p, top_k and top_p as one threshold: the smallest score that all three filters keep.

`record` is a SAMPLING_RECORD and `scratch` the thread's memory (record.py): a row of scores, the
maxima of its columns (passes.py), and space for keys and weights of the scores that matter. All
tokens that tie with the threshold are kept.

Top-k and top-p are the same problem with different weights: the score at which a running sum of
weights, from the largest score down, reaches a goal. The weight is 1 for each score and the goal k,
or its probability and the goal p. The ordered integers of the scores (simd/memory.py), the keys,
are summed in bins, as in a step of a radix sort. Only the bin in which the sum reaches the goal is
divided further, until all keys in it are equal. A key has 32 bits and a round settles nine of them,
so there are at most four rounds. The first round nearly always leaves a handful of keys. No row is
sorted.
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
    make_sum_weights,
    make_weigh_keys,
)
from nanovllm.model.kernels.sampling.record import BIN_SETS, BINS, GROUP_VECTORS, group_size
from nanovllm.model.kernels.simd.memory import (
    float_to_ordered,
    load_double,
    load_float,
    load_i32,
    load_int,
    ordered_to_float,
    store_double,
    store_float,
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
    sum_weights, weigh_keys = make_sum_weights(target), make_weigh_keys(target)
    gather, find_kth = _make_gather(target), make_find_kth(target)

    @compiled
    def find_threshold(record: Any, row: int, scratch: int, largest: Any) -> Any:
        least = max(largest - np.float32(MAX_DISTANCE), _LOWEST)
        least = max(least, largest + load_float(record.log_min_p, row))
        top_k, top_p = load_int(record.top_k, row), load_double(record.top_p, row)
        if 0 < top_k < record.vocab:
            least = max(least, find_kth(record, scratch, top_k, least, largest))
        if top_p < 1.0:
            total = sum_weights(scratch, record.groups, least, largest)
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
def select(keys: int, weights: int, bins: int, count: int, low: int, high: int, goal: float) -> int:
    """Return the largest key whose weight, with that of all larger keys, reaches `goal`.

    Equal keys count together, so all keys that tie with the result are at or above the threshold.

    Args:
        keys: address of int32 keys; overwritten.
        weights: address of their float32 weights, all above 0; overwritten.
        bins: address of BINS_BYTES of scratch memory.
        count: number of keys, at least 1.
        low: lower bound of the keys.
        high: upper bound of the keys.
        goal: weight to reach.

    Returns:
        The key; the smallest one where all weights together do not reach the goal.
    """
    while low < high:
        shift = 0
        while (high - low) >> shift >= BINS:
            shift += 1
        for index in range(BIN_SETS * BINS):
            store_double(bins, index, 0.0)
        for i in range(count):
            index = (i % BIN_SETS) * BINS + ((high - load_i32(keys, i)) >> shift)
            store_double(bins, index, load_double(bins, index) + load_float(weights, i))
        chosen = 0
        before = 0.0
        for index in range(BINS):
            mass = load_double(bins, index)
            for bin_set in range(1, BIN_SETS):
                mass += load_double(bins, bin_set * BINS + index)
            if mass > 0:
                goal -= before
                before = mass
                chosen = index
                if mass >= goal:
                    break
        kept = 0
        for i in range(count):
            key, weight = load_i32(keys, i), load_float(weights, i)
            # Always stored, because a branch that is often mispredicted costs more.
            store_i32(keys, kept, key)
            store_float(weights, kept, weight)
            kept += 1 if (high - key) >> shift == chosen else 0
        count = kept
        high -= chosen << shift
        low = max(low, high - (1 << shift) + 1)
    return low


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
