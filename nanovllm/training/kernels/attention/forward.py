"""Causal self-attention of a batch, without a [context, context] matrix in memory.

An item is one head of one sequence. Its keys are packed as K^T and its values as V. Then,
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
from nanovllm.model.kernels.simd.kernel import Record, kernel
from nanovllm.model.kernels.simd.memory import load_float, store_float
from nanovllm.model.kernels.simd.rows import columns_from, rows_at, rows_from
from nanovllm.model.kernels.simd.tile import TAIL
from nanovllm.model.kernels.simd.value import Value
from nanovllm.model.kernels.simd.vector import Vectors
from nanovllm.training.kernels.attention.layout import QUERIES, count_heads, panel_width
from nanovllm.training.kernels.attention.tiles import make_matmul
from nanovllm.training.kernels.dropout import Mask
from nanovllm.training.kernels.matmul.pack import Panels, make_pack_panels
from nanovllm.training.kernels.phases import Work, make_operation


def make_attention(target: KernelTarget) -> Any:
    """Return the entry of NumpyOperations.attention."""
    width = panel_width(target)
    pack = make_pack_panels(target, width)
    matmul, causal_matmul = make_matmul(target), make_matmul(target, TAIL)
    softmax, write_row = _make_softmax_row(target), kernel(target, _write_row)

    @compiled
    def attend_head(record: Any, thread: int, item: int) -> None:
        context, head_dim = record.context, record.head_dim
        row_bytes = record.heads * head_dim * WORD_BYTES
        qkv_row_bytes = 3 * row_bytes
        row, head_column = item // record.heads * context, item % record.heads * head_dim
        query_ptr = record.qkv_ptr + row * qkv_row_bytes + head_column * WORD_BYTES
        key_ptr, value_ptr = query_ptr + row_bytes, query_ptr + 2 * row_bytes
        out_ptr = record.out_ptr + row * row_bytes + head_column * WORD_BYTES
        logsumexp_ptr = record.logsumexp_ptr + item * context * WORD_BYTES
        scratch_ptr = record.scratch_ptr + thread * record.scratch_bytes
        keys_ptr, values_ptr = scratch_ptr + record.keys_offset, scratch_ptr + record.values_offset
        scores = rows_at(scratch_ptr + record.scores_offset, record.scores_row_bytes)
        sums = rows_at(scratch_ptr + record.sums_offset, record.row_bytes)
        factors_ptr = scratch_ptr + record.factors_offset
        pack(Panels(key_ptr, qkv_row_bytes, True, head_dim, context, keys_ptr))
        pack(Panels(value_ptr, qkv_row_bytes, False, context, head_dim, values_ptr))
        for first in range(0, context, QUERIES):
            queries = min(QUERIES, context - first)
            block = rows_at(query_ptr + first * qkv_row_bytes, qkv_row_bytes)
            for column in range(0, first + queries, width):
                above = max(0, column - first)  # queries that see no key of this panel
                panel_ptr = keys_ptr + column * head_dim * WORD_BYTES
                out = columns_from(rows_from(scores, above), column)
                matmul(rows_from(block, above), queries - above, panel_ptr, head_dim, out)
            for query in range(queries):
                position = first + query
                softmax(
                    record, scores.ptr + query * scores.stride_bytes, position + 1,
                    (item * context + position) * context,
                    logsumexp_ptr + position * WORD_BYTES, factors_ptr + query * WORD_BYTES,
                )  # fmt: skip
            for column in range(0, head_dim, width):
                panel_ptr = values_ptr + column * context * WORD_BYTES
                causal_matmul(scores, queries, panel_ptr, first, columns_from(sums, column))
            for query in range(queries):
                write_row(
                    sums.ptr + query * sums.stride_bytes, factors_ptr + query * WORD_BYTES,
                    out_ptr + (first + query) * row_bytes, head_dim,
                )  # fmt: skip

    return make_operation("attention", [Work(compiled(count_heads), attend_head)])


def _make_softmax_row(target: KernelTarget) -> Any:
    """Return softmax, which turns a row of scores into unnormalized weights, in place.

    record         record of the operation
    scores_ptr     the row
    visible        keys that the query sees
    first_index    number of the row's first weight in the site of dropout
    logsumexp_ptr  receives the logsumexp of the row
    factor_ptr     receives the factor that normalizes the weights
    """
    exponentiate = kernel(target, _exponentiate)

    @compiled
    def softmax(
        record: Any, scores_ptr: int, visible: int, first_index: int, logsumexp_ptr: int,
        factor_ptr: int,
    ) -> None:  # fmt: skip
        exponentiate(record, scores_ptr, visible, first_index, logsumexp_ptr, factor_ptr)
        total, largest = load_float(factor_ptr, 0), load_float(logsumexp_ptr, 0)
        store_float(logsumexp_ptr, 0, np.float32(largest + math.log(total)))
        store_float(factor_ptr, 0, np.float32(1.0 / total))

    return softmax


def _exponentiate(
    v: Vectors, record: Record, scores_ptr: Value, visible: Value, first_index: Value,
    largest_ptr: Value, sum_ptr: Value,
) -> None:  # fmt: skip
    """Emit weights = exp(scale * scores - max), dropped or not, the maximum, and their sum."""
    scale, mask = v.splat(record.scale), Mask(v, record)
    whole = visible & -v.lanes
    rest = visible - whole
    is_visible = v.first_lanes(rest)

    def scaled(i: Value) -> Value:
        return v.load(v.element(scores_ptr, i)) * scale

    def find_largest(i: Value, largest: Value) -> Value:
        return v.maximum(scaled(i), largest)

    def find_largest_in_rest(_: Value, largest: Value) -> Value:
        return v.maximum(v.where(is_visible, scaled(whole), float("-inf")), largest)

    peaks = v.fold(whole, v.lanes, v.constant(float("-inf")), find_largest)
    peaks = v.fold(rest, v.lanes, peaks, find_largest_in_rest)
    largest_scalar = v.largest(peaks)
    largest = v.splat(largest_scalar)
    v.store(largest_scalar, largest_ptr)

    def weigh_all(*, drops: bool) -> None:
        def weigh(i: Value) -> Value:
            weight = v.exp(scaled(i) - largest)
            stored = mask.apply(weight, first_index + i) if drops else weight
            v.store(stored, v.element(scores_ptr, i))
            return weight

        def add(i: Value, total: Value) -> Value:
            return total + weigh(i)

        def add_rest(_: Value, total: Value) -> Value:
            return total + v.where(is_visible, weigh(whole), 0.0)

        totals = v.fold(whole, v.lanes, v.constant(0.0), add)
        totals = v.fold(rest, v.lanes, totals, add_rest)
        v.store(v.sum(totals), sum_ptr)

    with v.when_else(record.threshold != 0) as (drops, keeps):
        with drops:
            weigh_all(drops=True)
        with keeps:
            weigh_all(drops=False)


def _write_row(v: Vectors, in_ptr: Value, factor_ptr: Value, out_ptr: Value, count: Value) -> None:
    """Emit out = in * factor."""
    factor = v.splat(v.load_scalar(factor_ptr))
    map_elements(v, count, (in_ptr,), (out_ptr,), lambda x: [x * factor])
