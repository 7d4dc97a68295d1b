"""Thresholds without sorting.

A threshold is the score at which a running sum of weights, from the largest score down, reaches a
goal. Top-k and top-p are the same problem with different weights: 1 for each score and a goal of k,
or its probability and a goal of p. The ordered integers of the scores (scalar.py), the keys, are
summed in bins, as in a step of a radix sort. Only the bin in which the sum reaches the goal is
divided further, until all keys in it are equal. A key has 32 bits and a round settles nine of them,
so there are at most four rounds. The first round nearly always leaves a handful of keys.
"""

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.sampling.record import BIN_SETS, BINS
from nanovllm.model.kernels.simd.scalar import (
    load_double,
    load_float,
    load_i32,
    store_double,
    store_float,
    store_i32,
)


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
