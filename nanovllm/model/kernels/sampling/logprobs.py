"""Log-probabilities of a row: its token's with the rank, and the top tokens', of unmodified logits.

The compiled twin of nanovllm/model/logprobs.py. `record` is a SAMPLING_RECORD and `scratch` the
thread's memory (record.py).
"""

import math
from typing import Any

import numpy as np

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import INT_BYTES, WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.sampling.filters import make_find_kth
from nanovllm.model.kernels.sampling.passes import (
    LOWEST,
    make_maxima,
    make_rank,
    make_scale,
    make_sum_weights,
)
from nanovllm.model.kernels.sampling.record import group_size
from nanovllm.model.kernels.simd.memory import (
    float_to_ordered,
    load_float,
    load_int,
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
    """Make report_row(record, row, scratch), which writes the row's log-probabilities and ranks."""
    scale, maxima = make_scale(target), make_maxima(target)
    sum_weights, compute_rank = make_sum_weights(target), make_rank(target)
    find_top = _make_find_top(target)

    @compiled
    def report_row(record: Any, row: int, scratch: int) -> None:
        logprobs = record.logprobs + row * (record.max_logprobs + 1) * WORD_BYTES
        token = load_int(record.tokens, row)
        logits = record.logits + row * record.logits_stride
        scale(logits, scratch, record.vocab, record.padded, _ONE)
        largest = maxima(scratch, record.groups, scratch + record.maxima_offset)
        if not abs(largest) < _INFINITY:
            store_float(logprobs, 0, np.float32(np.nan))
            store_int(record.ranks, row, 1)
            store_int(record.num_top, row, 0)
            return
        total = sum_weights(scratch, record.groups, _LOWEST, largest)
        log_total = np.float32(math.log(total))
        score = load_float(scratch, token)
        store_float(logprobs, 0, score - largest - log_total)
        rank = 1 + compute_rank(scratch, record.padded, token, score)
        store_int(record.ranks, row, rank)
        top_ids = record.top_ids + row * record.max_logprobs * INT_BYTES
        count = min(load_int(record.num_logprobs, row), record.vocab)
        count = find_top(record, scratch, count, largest)
        store_int(record.num_top, row, count)
        for i in range(count):
            packed = load_int(scratch + record.keys_offset, i)
            score = ordered_to_float(packed >> _ID_BITS)
            store_int(top_ids, i, _ID_MASK - (packed & _ID_MASK))
            store_float(logprobs, 1 + i, score - largest - log_total)

    return report_row


def _make_find_top(target: KernelTarget) -> Any:
    """Make find_top(record, scratch, count, largest), the top tokens in order; returns their
    number.

    It writes them to the keys, as int64: the score as an ordered integer in the upper half, the
    inverted id in the lower. So one comparison orders by score and then by the lower id.
    """
    lanes = target.lanes
    size = group_size(lanes)
    find_kth = make_find_kth(target)

    @compiled
    def collect(
        record: Any, scratch: int, least: Any, largest: Any, packed: int, capacity: int
    ) -> int:
        """Write up to `capacity` scores from `least` to `largest`, by id; return their number."""
        count = 0
        for group in range(record.groups):
            is_reached = False
            for column in range(group * lanes, (group + 1) * lanes):
                is_reached |= load_float(scratch + record.maxima_offset, column) >= least
            if is_reached:
                for token in range(group * size, (group + 1) * size):
                    score = load_float(scratch, token)
                    if score >= least and score <= largest and count < capacity:
                        key = float_to_ordered(score) << _ID_BITS
                        store_int(packed, count, key | (_ID_MASK - token))
                        count += 1
        return count

    @compiled
    def find_top(record: Any, scratch: int, count: int, largest: Any) -> int:
        if count == 0:
            return 0
        packed = scratch + record.keys_offset
        last = find_kth(record, scratch, count, _LOWEST, largest)
        above_last = ordered_to_float(float_to_ordered(last) + 1)
        above = collect(record, scratch, above_last, _INFINITY, packed, count)
        sort_descending(packed, above)
        ties = packed + above * INT_BYTES  # of the last score, already in the order of ids
        return above + collect(record, scratch, last, last, ties, count - above)

    return find_top


@compiled
def _sift_down(heap: int, index: int, count: int) -> None:
    """Move element `index` of a min-heap below all smaller ones."""
    value = load_int(heap, index)
    while 2 * index + 1 < count:
        child = 2 * index + 1
        if child + 1 < count and load_int(heap, child + 1) < load_int(heap, child):
            child += 1
        if load_int(heap, child) >= value:
            break
        store_int(heap, index, load_int(heap, child))
        index = child
    store_int(heap, index, value)


@compiled
def sort_descending(values: int, count: int) -> None:
    """Sort `count` int64 at address `values` in descending order.

    It is a heapsort (Williams 1964): no scratch memory, and O(n log n) for any input.
    """
    start, end = count // 2, count
    while end > 1:
        if start > 0:  # build the heap, from the middle down
            start -= 1
        else:  # move its smallest element to the end
            end -= 1
            smallest = load_int(values, 0)
            store_int(values, 0, load_int(values, end))
            store_int(values, end, smallest)
        _sift_down(values, start, end)
