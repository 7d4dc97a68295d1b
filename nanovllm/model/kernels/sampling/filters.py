"""What the filters keep, as a threshold: the least score that min_p, top_k and top_p together leave.

`p` is the record of sample.py, `scratch` this thread's memory: a row of scores, the maxima of its columns (passes.py), and room for
ordered keys and weights of the scores that matter. Tokens that tie with the last one kept stay.
"""

import math
from functools import cache
from typing import Any

import numpy as np

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.sampling.passes import (
    FARTHEST,
    LOWEST,
    make_fill,
    make_weigh_groups,
    make_weigh_keys,
)
from nanovllm.model.kernels.sampling.record import GROUP_VECTORS, group_size
from nanovllm.model.kernels.sampling.select import select
from nanovllm.model.kernels.simd.move import load_int
from nanovllm.model.kernels.simd.scalar import (
    float_to_bits,
    float_to_ordered,
    load_double,
    load_float,
    ordered_to_float,
    store_i32,
)

_ONE = np.float32(1.0)
_LOWEST = np.float32(LOWEST)


def make_find_threshold(target: KernelTarget) -> Any:
    """find_threshold(p, row, scratch, largest) -> the least score that the row's filters keep; `largest` is its largest score."""
    weigh_groups, weigh_keys, gather, find_kth = (
        make_weigh_groups(target),
        make_weigh_keys(target),
        _make_gather(target),
        make_find_kth(target),
    )

    @compiled
    def find_threshold(p: Any, row: int, scratch: int, largest: Any) -> Any:
        least = max(largest - np.float32(FARTHEST), _LOWEST)
        least = max(least, largest + load_float(p.log_min_p, row))
        top_k, top_p = load_int(p.top_k, row), load_double(p.top_p, row)
        if 0 < top_k < p.vocab:
            least = max(least, find_kth(p, scratch, top_k, least, largest))
        if top_p < 1.0:
            total = weigh_groups(
                scratch,
                p.groups,
                float_to_bits(least),
                float_to_bits(largest),
                scratch + p.sums_offset,
            )
            # Scores with less weight than this do not come to 1 - top_p together. The 0.001 is more than all rounding.
            negligible = np.float32(math.log((1.0 - top_p) * total / p.vocab) - 0.001)
            least = max(least, largest + negligible)
            keys, weights, bins = (
                scratch + p.keys_offset,
                scratch + p.weights_offset,
                scratch + p.bins_offset,
            )
            count = gather(p, scratch, least)
            weigh_keys(keys, count, float_to_bits(largest), weights)
            least = ordered_to_float(
                select(
                    keys,
                    weights,
                    bins,
                    count,
                    float_to_ordered(least),
                    float_to_ordered(largest),
                    top_p * total,
                )
            )
        return least

    return find_threshold


@cache
def make_find_kth(target: KernelTarget) -> Any:
    """find_kth(p, scratch, k, least, largest) -> the k-th largest of the scores from `least` to `largest`; where there are fewer, the smallest.

    At least k scores are as large as the k-th largest maximum of a column, so only columns that reach it are opened.
    """
    lanes = target.lanes
    fill, gather = make_fill(target), _make_gather(target)

    @compiled
    def gather_maxima(p: Any, scratch: int, least: Any) -> int:
        """As gather, of the columns' maxima alone."""
        count = 0
        for column in range(p.groups * lanes):
            highest = load_float(scratch + p.maxima_offset, column)
            store_i32(scratch + p.keys_offset, count, float_to_ordered(highest))
            count += 1 if highest >= least else 0
        return count

    @compiled
    def find_kth(p: Any, scratch: int, k: int, least: Any, largest: Any) -> Any:
        keys, weights, bins = (
            scratch + p.keys_offset,
            scratch + p.weights_offset,
            scratch + p.bins_offset,
        )
        count = gather_maxima(p, scratch, least)
        if count >= k:
            fill(weights, count, float_to_bits(_ONE))
            least = max(
                least,
                ordered_to_float(
                    select(
                        keys,
                        weights,
                        bins,
                        count,
                        float_to_ordered(least),
                        float_to_ordered(largest),
                        np.float64(k),
                    )
                ),
            )
        count = gather(p, scratch, least)
        fill(weights, count, float_to_bits(_ONE))
        return ordered_to_float(
            select(
                keys,
                weights,
                bins,
                count,
                float_to_ordered(least),
                float_to_ordered(largest),
                np.float64(k),
            )
        )

    return find_kth


@cache
def _make_gather(target: KernelTarget) -> Any:
    lanes = target.lanes
    size = group_size(lanes)

    @compiled
    def gather(p: Any, scratch: int, least: float) -> int:
        """Writes the ordered keys of all scores from `least` up, in no order of use, and returns how many there are."""
        keys = scratch + p.keys_offset
        count = 0
        for column in range(p.groups * lanes):
            if load_float(scratch + p.maxima_offset, column) >= least:
                first = column // lanes * size + column % lanes
                for vector in range(GROUP_VECTORS):
                    score = load_float(scratch, first + vector * lanes)
                    store_i32(keys, count, float_to_ordered(score))
                    count += 1 if score >= least else 0
        return count

    return gather
