"""Thresholds without sorting: the score at which a running sum, from the largest score down, reaches a goal.

Top-k and top-p are the same question with other weights: 1 for each score and k in all, or its probability and p in all. Ordered keys of
the scores in question are summed up in bins, as in one step of a radix sort; the bin in which the sum reaches the goal is the only one
that is looked into, again by bins, until all keys in it are equal. A key has 32 bits and a round settles ten of them, so there are at most
four rounds, and nearly always the first leaves a handful of keys.
"""

from nanovllm.model.kernels.compiler import compiled
from nanovllm.model.kernels.scalars import load_double, load_float, load_short, store_double, store_float, store_short

BIN_BITS = 10
BINS = 1 << BIN_BITS


@compiled
def select(keys: int, weights: int, bins: int, count: int, goal: float) -> int:
    """The largest of `count` keys down to which the weights add up to `goal`; the smallest key where they never do.

    `keys` and `weights` are overwritten; `bins` is room for BINS float64. Equal keys count together, so what ties with the last one is in.
    """
    low = load_short(keys, 0)
    high = low
    for i in range(count):
        key = load_short(keys, i)
        low = min(low, key)
        high = max(high, key)
    while low < high:
        shift = 0
        while (high - low) >> shift >= BINS:
            shift += 1
        last = (high - low) >> shift
        for place in range(last + 1):
            store_double(bins, place, 0.0)
        for i in range(count):
            place = (high - load_short(keys, i)) >> shift
            store_double(bins, place, load_double(bins, place) + load_float(weights, i))
        reached = 0
        while reached < last and load_double(bins, reached) < goal:
            goal -= load_double(bins, reached)
            reached += 1
        top = high
        low, high = top, top - (1 << 33)
        kept = 0
        for i in range(count):
            key = load_short(keys, i)
            if (top - key) >> shift == reached:
                store_short(keys, kept, key)
                store_float(weights, kept, load_float(weights, i))
                low = min(low, key)
                high = max(high, key)
                kept += 1
        count = kept
    return low
