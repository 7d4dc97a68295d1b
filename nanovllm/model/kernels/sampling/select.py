"""Thresholds without sorting: the score at which a running sum, from the largest score down, reaches a goal.

Top-k and top-p are the same question with other weights: 1 for each score and k in all, or its probability and p in all. Ordered keys of
the scores in question are summed up in bins, as in one step of a radix sort; the bin in which the sum reaches the goal is the only one
that is looked into, again by bins, until all keys in it are equal. A key has 32 bits and a round settles nine of them, so there are at most
four rounds, and nearly always the first leaves a handful of keys.
"""

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.sampling.record import BINS, SIDES
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
    """The largest of `count` keys down to which the weights add up to `goal`; the smallest key where they never do.

    There is at least one key, all are from `low` to `high`, and all weights are above 0. `keys` and `weights` are overwritten; `bins` is
    room for BINS_BYTES. Equal keys count together, so what ties with the last one is in.
    """
    while low < high:
        shift = 0
        while (high - low) >> shift >= BINS:
            shift += 1
        for place in range(SIDES * BINS):
            store_double(bins, place, 0.0)
        for i in range(count):
            place = (i % SIDES) * BINS + ((high - load_i32(keys, i)) >> shift)
            store_double(bins, place, load_double(bins, place) + load_float(weights, i))
        chosen = 0
        before = 0.0
        for place in range(BINS):
            mass = load_double(bins, place)
            for side in range(1, SIDES):
                mass += load_double(bins, side * BINS + place)
            if mass > 0:
                goal -= before
                before = mass
                chosen = place
                if mass >= goal:
                    break
        kept = 0
        for i in range(count):
            key, weight = load_i32(keys, i), load_float(weights, i)
            store_i32(
                keys, kept, key
            )  # always, since a branch that is often mispredicted costs more
            store_float(weights, kept, weight)
            kept += 1 if (high - key) >> shift == chosen else 0
        count = kept
        high -= chosen << shift
        low = max(low, high - (1 << shift) + 1)
    return low
