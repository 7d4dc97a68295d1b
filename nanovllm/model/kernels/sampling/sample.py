"""From rows of logits to tokens and log-probabilities: the compiled twin of nanovllm/runner/sampler.py and logprobs.py.

Every filter is a threshold: min_p, top_k and top_p keep the scores that are at least some number, and each raises what the one before
has set. So a row is read a few times from one end to the other and never sorted:

    scale      edits and penalties, then divided by the temperature, into memory of the thread's own
    maxima     the largest score; one maximum for each column of 16
    threshold  filters.py: min_p is an addition; for top_k and top_p the few columns that matter are opened, and select.py finds the place
    weigh      the sum of the weights that are left, group by group
    draw       the group in which the running sum passes the draw, then the token in it
    report     sampling/logprobs.py, of the logits as they were

Rows are handed out by a counter. A row is worked on by one thread, by the same operations whatever else is there.
"""

from functools import cache
from typing import Any

import numpy as np

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import F32_BYTES
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
from nanovllm.model.kernels.simd.move import load_int, make_copy, record_at
from nanovllm.model.kernels.simd.scalar import (
    float_to_bits,
    load_double,
    load_float,
    store_float,
    store_int,
)
from nanovllm.model.kernels.threads.atomics import atomic_add

sampling_record_at = record_at(SAMPLING_RECORD)

_MINUS_INFINITY = np.float32(-np.inf)
_ONE = np.float32(1.0)


@cache
def make_sample_rows(target: KernelTarget) -> Any:
    """sample_rows(address, thread): tokens and reports of this thread's share of the rows; a record of SAMPLING_RECORD is at `address`."""
    sample_row, report_row = _make_sample_row(target), make_report_row(target)

    @compiled
    def sample_rows(address: int, thread: int) -> None:
        p = sampling_record_at(address)
        scratch = p.scratch + thread * p.scratch_bytes
        while True:
            row = atomic_add(p.work, 1)
            if row >= p.rows:
                return
            if p.sampling != 0:
                sample_row(p, row, scratch)
            if load_int(p.num_logprobs, row) >= 0:
                report_row(p, row, scratch)

    return sample_rows


def _make_sample_row(target: KernelTarget) -> Any:
    edit, find_threshold, draw_token = (
        _make_edit(target),
        make_find_threshold(target),
        _make_draw_token(target),
    )
    find_best, scale, maxima = _make_find_best(target), make_scale(target), make_maxima(target)

    @compiled
    def sample_row(p: Any, row: int, scratch: int) -> None:
        """Writes the row's token, and whether it has one."""
        temperature = load_float(p.temperature, row)
        is_greedy = temperature == 0
        source = edit(p, row, scratch)
        scale(source, scratch, p.vocab, p.padded, float_to_bits(_ONE if is_greedy else temperature))
        largest = maxima(scratch, p.groups, scratch + p.maxima_offset)
        is_sound = abs(largest) < np.float32(np.inf)
        store_int(p.has_token, row, 1 if is_sound else 0)
        token = 0
        if is_sound:
            if is_greedy:
                token = find_best(p, scratch, largest)
            else:
                draw = uniform(
                    load_int(p.seeds, row), load_int(p.choices, row), load_int(p.positions, row)
                )
                token = draw_token(
                    p, scratch, find_threshold(p, row, scratch, largest), largest, draw
                )
        store_int(p.tokens, row, token)

    return sample_row


def _make_edit(target: KernelTarget) -> Any:
    fill, copy = make_fill(target), make_copy(target)

    @compiled
    def edit(p: Any, row: int, scores: int) -> int:
        """Allowed tokens, biases, penalties. Returns where the row's logits are then: where they were, or in `scores`."""
        logits = p.logits + row * p.logits_stride
        first_allowed, last_allowed = (
            load_int(p.allowed_starts, row),
            load_int(p.allowed_starts, row + 1),
        )
        first_edit, last_edit = load_int(p.edit_starts, row), load_int(p.edit_starts, row + 1)
        first_seen, last_seen = load_int(p.history_starts, row), load_int(p.history_starts, row + 1)
        if first_allowed == last_allowed and first_edit == last_edit and first_seen == last_seen:
            return logits
        if first_allowed == last_allowed:
            copy(logits, scores, p.vocab)
        else:
            fill(scores, p.padded, float_to_bits(_MINUS_INFINITY))
            for i in range(first_allowed, last_allowed):
                token = load_int(p.allowed_ids, i)
                store_float(scores, token, load_float(logits, token))
        for i in range(first_edit, last_edit):
            token = load_int(p.edit_ids, i)
            store_float(scores, token, load_float(scores, token) + load_float(p.edit_values, i))
        repetition, presence, frequency = (
            load_float(p.repetition, row),
            load_float(p.presence, row),
            load_float(p.frequency, row),
        )
        for i in range(first_seen, last_seen):
            token = load_int(p.history_ids, i)
            count = load_int(p.history_counts, i)
            score = load_float(scores, token)
            score = score / repetition if score > 0 else score * repetition
            score -= frequency * np.float32(count)
            if count > 0:
                score -= presence
            store_float(scores, token, score)
        return scores

    return edit


def _make_find_best(target: KernelTarget) -> Any:
    lanes = target.lanes
    size = group_size(lanes)

    @compiled
    def find_best(p: Any, scores: int, largest: float) -> int:
        """The lowest id of a token whose score is `largest`."""
        column = 0
        while load_float(scores + p.maxima_offset, column) < largest:
            column += 1
        token = column // lanes * size
        while load_float(scores, token) < largest:
            token += 1
        return token

    return find_best


def _make_draw_token(target: KernelTarget) -> Any:
    lanes = target.lanes
    size = group_size(lanes)
    weigh_groups, weigh = make_weigh_groups(target), make_weigh(target)

    @compiled
    def draw_token(p: Any, scratch: int, least: float, largest: float, draw: float) -> int:
        """The token at which the running sum of weights, in order of ids, passes `draw` of the whole."""
        sums, weights = scratch + p.sums_offset, scratch + p.weights_offset
        goal = draw * weigh_groups(
            scratch, p.groups, float_to_bits(least), float_to_bits(largest), sums
        )
        reached = 0.0
        group = 0
        chosen = 0
        while group < p.groups:
            weight = load_double(sums, group)
            if weight > 0:
                chosen = group
            if reached + weight > goal:
                break
            reached += weight
            group += 1
        weigh(
            scratch + chosen * size * F32_BYTES,
            size,
            float_to_bits(least),
            float_to_bits(largest),
            weights,
        )
        token = 0
        for i in range(size):
            weight = load_float(weights, i)
            if weight > 0:
                token = i  # the last one with a weight, should rounding leave the sum of the group below that of its parts
                reached += weight
                if reached > goal:
                    break
        return chosen * size + token

    return draw_token
