"""From rows of logits to tokens: the compiled twin of nanovllm/model/numpy_sampler.py.

Every filter is a threshold: min_p, top_k and top_p keep the scores from some value up, and each
raises the threshold of the previous one. So a row is read a few times from end to end and never
sorted:

    scale      edits and penalties, then division by the temperature, into scratch memory
    maxima     the largest score, and the maximum of each column of 16
    threshold  filters.py: min_p is an addition; top_k and top_p read the few columns that matter
    weigh      the sums of the remaining weights, group by group
    draw       the group in which the running sum passes the draw, then the token in it
    report     logprobs.py, of the unmodified logits

A counter hands out rows. One thread computes a row, by the same operations whatever the batch.
`record` is a SAMPLING_RECORD and `scratch` the thread's memory (record.py).
"""

from functools import cache
from typing import Any

import numpy as np

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.sampling.filters import make_find_threshold
from nanovllm.model.kernels.sampling.logprobs import make_report_row
from nanovllm.model.kernels.sampling.passes import (
    make_fill,
    make_maxima,
    make_scale,
    make_weigh,
    make_weigh_groups,
)
from nanovllm.model.kernels.sampling.philox import uniform
from nanovllm.model.kernels.sampling.record import SAMPLING_RECORD, group_size
from nanovllm.model.kernels.simd.memory import (
    load_double,
    load_float,
    load_int,
    make_copy,
    record_at,
    store_float,
    store_int,
)
from nanovllm.model.kernels.threads.atomics import atomic_add

sampling_record_at = record_at(SAMPLING_RECORD)

_MINUS_INFINITY = np.float32(-np.inf)
_ONE = np.float32(1.0)


@cache
def make_sample_rows(target: KernelTarget) -> Any:
    """Make sample_rows(address, thread), which samples and reports this thread's share of the rows.

    Arguments of sample_rows:
        address: of a SAMPLING_RECORD.
        thread: number of this thread.
    """
    sample_row, report_row = _make_sample_row(target), make_report_row(target)

    @compiled
    def sample_rows(address: int, thread: int) -> None:
        record = sampling_record_at(address)
        scratch = record.scratch + thread * record.scratch_bytes
        while True:
            row = atomic_add(record.work, 1)
            if row >= record.rows:
                return
            if record.sampling != 0:
                sample_row(record, row, scratch)
            if load_int(record.num_logprobs, row) >= 0:
                report_row(record, row, scratch)

    return sample_rows


def _make_sample_row(target: KernelTarget) -> Any:
    """Make sample_row(record, row, scratch), which writes a row's token and whether it has one."""
    edit, scale, maxima = _make_edit(target), make_scale(target), make_maxima(target)
    argmax, find_threshold = _make_argmax(target), make_find_threshold(target)
    draw_token = _make_draw_token(target)

    @compiled
    def sample_row(record: Any, row: int, scratch: int) -> None:
        temperature = load_float(record.temperature, row)
        is_greedy = temperature == 0
        scores = edit(record, row, scratch)
        divisor = _ONE if is_greedy else temperature
        scale(scores, scratch, record.vocab, record.padded, divisor)
        largest = maxima(scratch, record.groups, scratch + record.maxima_offset)
        is_finite = abs(largest) < np.float32(np.inf)
        store_int(record.has_token, row, 1 if is_finite else 0)
        token = 0
        if is_finite:
            if is_greedy:
                token = argmax(record, scratch, largest)
            else:
                draw = uniform(
                    load_int(record.seeds, row),
                    load_int(record.choices, row),
                    load_int(record.positions, row),
                )
                least = find_threshold(record, row, scratch, largest)
                token = draw_token(record, scratch, least, largest, draw)
        store_int(record.tokens, row, token)

    return sample_row


def _make_edit(target: KernelTarget) -> Any:
    """Make edit(record, row, scratch) -> the address of the row's logits after edits and penalties.

    A row without edits stays where it is; others are copied to `scratch`.
    """
    fill, copy = make_fill(target), make_copy(target)

    @compiled
    def edit(record: Any, row: int, scratch: int) -> int:
        logits = record.logits + row * record.logits_stride
        first_allowed = load_int(record.allowed_starts, row)
        last_allowed = load_int(record.allowed_starts, row + 1)
        first_edit, last_edit = (
            load_int(record.edit_starts, row),
            load_int(record.edit_starts, row + 1),
        )
        first_seen, last_seen = (
            load_int(record.history_starts, row),
            load_int(record.history_starts, row + 1),
        )
        if first_allowed == last_allowed and first_edit == last_edit and first_seen == last_seen:
            return logits
        if first_allowed == last_allowed:
            copy(logits, scratch, record.vocab)
        else:
            fill(scratch, record.padded, _MINUS_INFINITY)
            for i in range(first_allowed, last_allowed):
                token = load_int(record.allowed_ids, i)
                store_float(scratch, token, load_float(logits, token))
        for i in range(first_edit, last_edit):
            token = load_int(record.edit_ids, i)
            score = load_float(scratch, token) + load_float(record.edit_values, i)
            store_float(scratch, token, score)
        repetition = load_float(record.repetition_penalty, row)
        presence = load_float(record.presence_penalty, row)
        frequency = load_float(record.frequency_penalty, row)
        for i in range(first_seen, last_seen):
            token = load_int(record.history_ids, i)
            count = load_int(record.history_counts, i)
            score = load_float(scratch, token)
            score = score / repetition if score > 0 else score * repetition
            score -= frequency * np.float32(count)
            if count > 0:
                score -= presence
            store_float(scratch, token, score)
        return scratch

    return edit


def _make_argmax(target: KernelTarget) -> Any:
    """Make argmax(record, scratch, largest) -> the lowest token id whose score is `largest`."""
    lanes = target.lanes
    size = group_size(lanes)

    @compiled
    def argmax(record: Any, scratch: int, largest: float) -> int:
        column = 0
        while load_float(scratch + record.maxima_offset, column) < largest:
            column += 1
        token = column // lanes * size
        while load_float(scratch, token) < largest:
            token += 1
        return token

    return argmax


def _make_draw_token(target: KernelTarget) -> Any:
    """Make draw_token(record, scratch, least, largest, draw) -> the token that is drawn.

    It is the token at which the running sum of weights, by ascending id, passes `draw` times the
    sum of all weights.

    Arguments of draw_token:
        least, largest: bounds of the scores that are kept.
        draw: float64 in [0, 1).
    """
    lanes = target.lanes
    size = group_size(lanes)
    weigh_groups, weigh = make_weigh_groups(target), make_weigh(target)

    @compiled
    def draw_token(record: Any, scratch: int, least: float, largest: float, draw: float) -> int:
        sums, weights = scratch + record.sums_offset, scratch + record.weights_offset
        goal = draw * weigh_groups(scratch, record.groups, least, largest, sums)
        running_sum = 0.0
        group = 0
        chosen = 0
        while group < record.groups:
            weight = load_double(sums, group)
            if weight > 0:
                chosen = group
            if running_sum + weight > goal:
                break
            running_sum += weight
            group += 1
        weigh(scratch + chosen * size * WORD_BYTES, size, least, largest, weights)
        token = 0
        for i in range(size):
            weight = load_float(weights, i)
            if weight > 0:
                token = i  # the last one, should rounding keep the sum below the goal
                running_sum += weight
                if running_sum > goal:
                    break
        return chosen * size + token

    return draw_token
