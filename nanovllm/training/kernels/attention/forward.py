"""Causal self-attention of a batch, without a [context, context] matrix in memory.

An item is one head of one sequence. Its keys are packed as K^T and its values as V (panels). Then,
a block of QUERIES queries at a time:

    S = Q @ K^T           only the panels that the block's last query sees
    P = exp(S - max)      row by row; the sum and the maximum give the logsumexp and 1 / sum
    out = P @ V / sum     on the diagonal, each row stops at its own key

A score is a sum over head_dim in order, and an output a sum over the keys in order.
"""

import math
from typing import Any

import numpy as np

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.elements import map_elements
from nanovllm.model.kernels.simd.kernel import kernel
from nanovllm.model.kernels.simd.move import record_at
from nanovllm.model.kernels.simd.scalar import load_float, store_float
from nanovllm.model.kernels.simd.value import Value
from nanovllm.model.kernels.simd.vector import Vectors
from nanovllm.model.kernels.threads.barrier import take_item
from nanovllm.training.kernels.attention.layout import QUERIES, attention_layout, panel_width
from nanovllm.training.kernels.attention.panels import make_copy_panels, make_transpose_panels
from nanovllm.training.kernels.attention.tiles import TAIL, make_matmul
from nanovllm.training.kernels.dropout import count_up, is_kept
from nanovllm.training.kernels.records import RECORDS

_record_at = record_at(RECORDS["attention"])
_layout = compiled(attention_layout)


def make_attention(target: KernelTarget) -> Any:
    """Return the entry attention(record_ptr, thread); see NumpyOperations.attention."""
    attend_head = _make_attend_head(target)

    @compiled
    def attention(record_ptr: int, thread: int) -> None:
        record = _record_at(record_ptr)
        item = take_item(record.phases_ptr)
        while item < record.batch * record.heads:
            attend_head(record, thread, item // record.heads, item % record.heads)
            item = take_item(record.phases_ptr)

    return attention


def _make_attend_head(target: KernelTarget) -> Any:
    """Return attend_head(record, thread, sequence, head)."""
    width = panel_width(target)
    copy_panels, transpose_panels = make_copy_panels(target), make_transpose_panels(target)
    matmul, causal_matmul = make_matmul(target), make_matmul(target, TAIL)
    softmax, write_row = _make_softmax_row(target), kernel(target, _write_row)

    @compiled
    def attend_head(record: Any, thread: int, sequence: int, head: int) -> None:
        context, head_dim = record.context, record.head_dim
        d_model = record.heads * head_dim
        qkv_stride_bytes, row = 3 * d_model * WORD_BYTES, sequence * context
        query_ptr = record.qkv_ptr + row * qkv_stride_bytes + head * head_dim * WORD_BYTES
        key_ptr = query_ptr + d_model * WORD_BYTES
        value_ptr = key_ptr + d_model * WORD_BYTES
        out_ptr = record.out_ptr + (row * d_model + head * head_dim) * WORD_BYTES
        number = sequence * record.heads + head
        logsumexp_ptr = record.logsumexp_ptr + number * context * WORD_BYTES

        keys_ptr = record.scratch_ptr + thread * record.scratch_bytes
        values, scores, sums, factors, scores_stride_bytes, sums_stride_bytes, _ = _layout(
            context, head_dim, width
        )
        values_ptr, scores_ptr = keys_ptr + values, keys_ptr + scores
        sums_ptr, factors_ptr = keys_ptr + sums, keys_ptr + factors

        transpose_panels(key_ptr, qkv_stride_bytes, context, head_dim, keys_ptr)
        copy_panels(value_ptr, qkv_stride_bytes, context, head_dim, values_ptr)
        for first in range(0, context, QUERIES):
            queries = min(QUERIES, context - first)
            block_ptr = query_ptr + first * qkv_stride_bytes
            for column in range(0, first + queries, width):
                above = max(0, column - first)  # queries that see no key of this panel
                matmul(
                    block_ptr + above * qkv_stride_bytes, qkv_stride_bytes, queries - above,
                    keys_ptr + column * head_dim * WORD_BYTES, head_dim,
                    scores_ptr + above * scores_stride_bytes + column * WORD_BYTES,
                    scores_stride_bytes,
                )  # fmt: skip
            for query in range(queries):
                position = first + query
                softmax(
                    record, scores_ptr + query * scores_stride_bytes, position + 1,
                    (number * context + position) * context,
                    logsumexp_ptr + position * WORD_BYTES, factors_ptr + query * WORD_BYTES,
                )  # fmt: skip
            for column in range(0, head_dim, width):
                causal_matmul(
                    scores_ptr, scores_stride_bytes, queries,
                    values_ptr + column * context * WORD_BYTES, first,
                    sums_ptr + column * WORD_BYTES, sums_stride_bytes,
                )  # fmt: skip
            for query in range(queries):
                write_row(
                    sums_ptr + query * sums_stride_bytes, factors_ptr + query * WORD_BYTES,
                    out_ptr + (first + query) * d_model * WORD_BYTES, head_dim,
                )  # fmt: skip

    return attend_head


def _make_softmax_row(target: KernelTarget) -> Any:
    """Return softmax, which turns a row of scores into unnormalized weights, in place.

    record         record of the operation
    scores_ptr     the row
    visible        keys that the query sees
    first_index    number of the row's first weight in the site of dropout
    logsumexp_ptr  receives the logsumexp of the row
    factor_ptr     receives the factor that normalizes the weights
    """
    exponentiate = kernel(target, _make_exponentiate(drops=False))
    exponentiate_and_drop = kernel(target, _make_exponentiate(drops=True))

    @compiled
    def softmax(
        record: Any, scores_ptr: int, visible: int, first_index: int, logsumexp_ptr: int,
        factor_ptr: int,
    ) -> None:  # fmt: skip
        if record.threshold > 0:
            exponentiate_and_drop(
                scores_ptr, visible, record.scale_bits, logsumexp_ptr, factor_ptr,
                first_index, record.key_low, record.key_high, record.threshold, record.factor_bits,
            )  # fmt: skip
        else:
            exponentiate(
                scores_ptr, visible, record.scale_bits, logsumexp_ptr, factor_ptr,
                first_index, record.key_low, record.key_high, record.threshold, record.factor_bits,
            )  # fmt: skip
        total, largest = load_float(factor_ptr, 0), load_float(logsumexp_ptr, 0)
        store_float(logsumexp_ptr, 0, np.float32(largest + math.log(total)))
        store_float(factor_ptr, 0, np.float32(1.0 / total))

    return softmax


def _make_exponentiate(*, drops: bool) -> Any:
    """Return the emitter of weights = exp(scale * scores - max), dropped or not."""

    def emit(
        v: Vectors, scores_ptr: Value, visible: Value, scale_bits: Value, largest_ptr: Value,
        sum_ptr: Value, first_index: Value, key_low: Value, key_high: Value, threshold: Value,
        factor_bits: Value,
    ) -> None:  # fmt: skip
        scale = v.float_argument(scale_bits)
        key = v.integer_argument(key_low), v.integer_argument(key_high)
        least, factor = v.integer_argument(threshold), v.float_argument(factor_bits)
        whole = visible & -v.lanes
        rest = visible - whole
        is_visible = v.first_lanes(rest)

        def scaled(i: Value) -> Value:
            return v.load(v.element(scores_ptr, i)) * scale

        def find_largest(i: Value, largest: Value) -> Value:
            return v.maximum(scaled(i), largest)

        def find_largest_in_rest(_: Value, largest: Value) -> Value:
            score = v.where(is_visible, scaled(whole), float("-inf"))
            return v.maximum(score, largest)

        def weigh(i: Value) -> Value:
            weight = v.exp(scaled(i) - largest)
            stored = weight
            if drops:
                index = count_up(v, first_index + i, v.scalar(1))
                is_weight_kept = is_kept(v, index, key, least)
                stored = v.where(is_weight_kept, weight * factor, 0.0)
            v.store(stored, v.element(scores_ptr, i))
            return weight

        def add(i: Value, total: Value) -> Value:
            return total + weigh(i)

        def add_rest(_: Value, total: Value) -> Value:
            return total + v.where(is_visible, weigh(whole), 0.0)

        peaks = v.fold(whole, v.lanes, v.constant(float("-inf")), find_largest)
        peaks = v.fold(rest, v.lanes, peaks, find_largest_in_rest)
        largest_scalar = v.largest(peaks)
        largest = v.splat(largest_scalar)
        totals = v.fold(whole, v.lanes, v.constant(0.0), add)
        totals = v.fold(rest, v.lanes, totals, add_rest)
        v.store(largest_scalar, largest_ptr)
        v.store(v.sum(totals), sum_ptr)

    return emit


def _write_row(v: Vectors, in_ptr: Value, factor_ptr: Value, out_ptr: Value, count: Value) -> None:
    """Emit out = in * factor."""
    factor = v.splat(v.load_scalar(factor_ptr))
    map_elements(v, count, (in_ptr,), (out_ptr,), lambda x: [x * factor])
