"""From rows of logits to tokens: the compiled twin of nanovllm/model/numpy_sampler.py.

Every filter is a threshold: min_p, top_k and top_p keep the scores from some value up, and each
raises the threshold of the previous one. So a row is read a few times from end to end and never
sorted:

    scale      edits and penalties, then division by the temperature, into scratch memory
    maxima     the largest score, and the maximum of each column of 16
    threshold  filters.py: min_p is an addition; top_k and top_p read the few columns that matter
    bound      an upper bound of weight / noise for each column, without exp and log
    draw       the largest weight / noise, of the few columns whose bound reaches it
    report     logprobs.py, of the unmodified logits

A counter hands out rows. One thread computes a row, by the same operations whatever the batch.
`record` is a SAMPLING_RECORD and `scratch` the thread's memory (record.py).
"""

import math
from functools import cache
from typing import Any

import numpy as np

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.sampling.filters import make_find_threshold
from nanovllm.model.kernels.sampling.logprobs import make_report_row
from nanovllm.model.kernels.sampling.passes import (
    make_bound_race,
    make_fill,
    make_maxima,
    make_scale,
)
from nanovllm.model.kernels.sampling.philox import draw_key, exponential
from nanovllm.model.kernels.sampling.record import GROUP_VECTORS, SAMPLING_RECORD, group_size
from nanovllm.model.kernels.simd.memory import (
    load_float,
    load_int,
    make_copy,
    record_at,
    store_float,
    store_int,
)
from nanovllm.model.kernels.threads.atomics import atomic_add

sampling_record_at = record_at(SAMPLING_RECORD)

_MAX_RACE_DISTANCE = np.float32(27.0)
"""Scores further below the largest are never drawn: noise is from 2**-33 to 22.9."""
_BOUND_ERROR = 1e-3
"""Above the error of the bounds of passes.py by rounding."""
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
                least = find_threshold(record, row, scratch, largest)
                token = draw_token(record, row, scratch, least, largest)
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
    """Make draw_token(record, row, scratch, least, largest) -> the token that is drawn.

    It is the token with the largest weight / noise, which is computed as NumPy does, in float64,
    but for few columns: first the one with the largest bound, then those whose bound is not below
    the result.

    Arguments of draw_token:
        least, largest: bounds of the scores that are kept.
    """
    lanes = target.lanes
    size = group_size(lanes)
    bound_race = make_bound_race(target)

    @compiled
    def race_column(
        scratch: int, column: int, least: Any, largest: Any, key: Any, best: Any, winner: int
    ) -> Any:
        """Return the largest weight / noise of `best` and a column, and its token."""
        first = column // lanes * size + column % lanes
        for vector in range(GROUP_VECTORS):
            token = first + vector * lanes
            score = load_float(scratch, token)
            if score >= least:
                weight = math.exp(np.float64(score - largest))
                ratio = weight / exponential(token, key[0], key[1], key[2])
                if ratio > best or (ratio == best and token < winner):
                    best, winner = ratio, token
        return best, winner

    @compiled
    def draw_token(record: Any, row: int, scratch: int, least: Any, largest: Any) -> int:
        key = draw_key(
            load_int(record.seeds, row),
            load_int(record.choices, row),
            load_int(record.positions, row),
        )
        least = max(least, largest - _MAX_RACE_DISTANCE)
        bounds = scratch + record.maxima_offset
        highest = bound_race(scratch, record.groups, least, largest, key[0], key[1], key[2], bounds)
        leader = 0
        while load_float(bounds, leader) < highest:
            leader += 1
        best, winner = race_column(scratch, leader, least, largest, key, 0.0, 0)
        reached = np.float32(math.log2(best) - _BOUND_ERROR)
        for column in range(record.groups * lanes):
            if load_float(bounds, column) >= reached:
                best, winner = race_column(scratch, column, least, largest, key, best, winner)
        return winner

    return draw_token
