"""Reports on a row: log-probability and rank of its token, and its most likely tokens, of the logits as the network gave them.

The compiled twin of nanovllm/runner/logprobs.py.
"""

import math
from typing import Any

import numpy as np

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import F32_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.sampling.filters import make_find_kth
from nanovllm.model.kernels.sampling.passes import (
    LOWEST,
    make_maxima,
    make_rank,
    make_scale,
    make_weigh_groups,
)
from nanovllm.model.kernels.sampling.record import group_size
from nanovllm.model.kernels.sampling.sort import sort_descending
from nanovllm.model.kernels.simd.move import INT_BYTES, load_int
from nanovllm.model.kernels.simd.scalar import (
    float_to_bits,
    float_to_ordered,
    load_float,
    ordered_to_float,
    store_float,
    store_int,
)

_ONE = np.float32(1.0)
_LOWEST = np.float32(LOWEST)
_INFINITY = np.float32(np.inf)
_ID_BITS = 32
_ID_MASK = (1 << _ID_BITS) - 1


def make_report_row(target: KernelTarget) -> Any:
    """report_row(p, row, scratch): writes the row's report; `p` is the record of sample.py, `scratch` this thread's memory."""
    scale, maxima, weigh_groups, rank = (
        make_scale(target),
        make_maxima(target),
        make_weigh_groups(target),
        make_rank(target),
    )
    find_likely = _make_find_likely(target)

    @compiled
    def report_row(p: Any, row: int, scratch: int) -> None:
        logprobs = p.logprobs + row * (p.max_logprobs + 1) * F32_BYTES
        token = load_int(p.tokens, row)
        scale(p.logits + row * p.logits_stride, scratch, p.vocab, p.padded, float_to_bits(_ONE))
        largest = maxima(scratch, p.groups, scratch + p.maxima_offset)
        if not abs(largest) < _INFINITY:
            store_float(logprobs, 0, np.float32(np.nan))
            store_int(p.ranks, row, 1)
            store_int(p.num_top, row, 0)
            return
        total = weigh_groups(
            scratch,
            p.groups,
            float_to_bits(_LOWEST),
            float_to_bits(largest),
            scratch + p.sums_offset,
        )
        log_total = np.float32(math.log(total))
        own = load_float(scratch, token)
        store_float(logprobs, 0, own - largest - log_total)
        store_int(p.ranks, row, 1 + rank(scratch, p.padded, token, float_to_bits(own)))
        ids = p.top_ids + row * p.max_logprobs * INT_BYTES
        found = find_likely(p, scratch, min(load_int(p.num_logprobs, row), p.vocab), largest)
        store_int(p.num_top, row, found)
        for i in range(found):
            packed = load_int(scratch + p.keys_offset, i)
            store_int(ids, i, _ID_MASK - (packed & _ID_MASK))
            store_float(logprobs, 1 + i, ordered_to_float(packed >> _ID_BITS) - largest - log_total)

    return report_row


def _make_find_likely(target: KernelTarget) -> Any:
    lanes = target.lanes
    size = group_size(lanes)
    find_kth = make_find_kth(target)

    @compiled
    def collect(p: Any, scratch: int, least: Any, most: Any, packed: int, room: int) -> int:
        """Writes scores from `least` to `most`, packed with their ids, in order of ids, as many as there is room for; returns how many."""
        found = 0
        for group in range(p.groups):
            is_worth_it = False
            for column in range(group * lanes, (group + 1) * lanes):
                is_worth_it |= load_float(scratch + p.maxima_offset, column) >= least
            if is_worth_it:
                for token in range(group * size, (group + 1) * size):
                    score = load_float(scratch, token)
                    if score >= least and score <= most and found < room:
                        store_int(
                            packed,
                            found,
                            (float_to_ordered(score) << _ID_BITS) | (_ID_MASK - token),
                        )
                        found += 1
        return found

    @compiled
    def find_likely(p: Any, scratch: int, count: int, largest: Any) -> int:
        """Writes the `count` largest scores packed with their ids, the largest first, the lower id first among equals; returns how many.

        A score's ordered key stands in the upper half, the id turned round in the lower: one comparison orders both. Those above the
        last one come first and are sorted; those that tie with the last one follow in order of ids.
        """
        if count == 0:
            return 0
        packed = scratch + p.keys_offset
        last = find_kth(p, scratch, count, _LOWEST, largest)
        above = collect(
            p, scratch, ordered_to_float(float_to_ordered(last) + 1), _INFINITY, packed, count
        )
        sort_descending(packed, above)
        return above + collect(p, scratch, last, last, packed + above * INT_BYTES, count - above)

    return find_likely
