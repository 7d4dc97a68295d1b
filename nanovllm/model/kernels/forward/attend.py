"""Attention of some rows of one sequence.

In decode, the rows are heads of one query, and each has keys and values of its own. They are read
block by block over the heads, in memory order. While one block is read, the next one is prefetched:
it may be anywhere in memory. In prefill, the rows are queries of one head, which share its keys and
values.

Slots that were never written may hold anything. Their scores are masked to weights of exactly 0,
and weights V stops at the last word that has a token, because 0 * NaN is NaN. The rest of that word
is zeros, or int8, which are finite whatever they are.

A query's weights for the tokens after it are 0 too. If one of those tokens has a value that is not
finite, no output of the queries computed together is finite. Then each query is computed again by
itself, with only the values that it sees. int8 values are always finite, and their scales are
applied only to the tokens that a query sees.
"""

from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.forward.attention_parts import AttentionParts
from nanovllm.model.kernels.forward.kv_cache import block_index
from nanovllm.model.kernels.simd.kernel import kernel
from nanovllm.model.kernels.simd.move import load_int
from nanovllm.model.kernels.simd.rows import rows_at
from nanovllm.model.kernels.simd.value import I32, Value
from nanovllm.model.kernels.simd.vector import Vectors


def make_attend(target: KernelTarget, parts: AttentionParts, *, is_decode: bool) -> Any:
    """Return attend, the attention of some rows.

    record     record of the step (step_record.py)
    thread     number of the calling thread
    layer      number of the layer
    head       the head, or the first one
    rows       number of heads in decode, of queries in prefill
    table_ptr  block ids of the sequence, int64
    position   position of the query, or of the first one
    query_ptr  its row of qkv
    out_ptr    its row of attn_out
    """
    compute_scores, softmax = _make_compute_scores(parts, is_decode=is_decode), parts.softmax
    weighted_sum = _make_weighted_sum(target, parts, is_decode=is_decode)
    convert_query, convert_output = parts.convert_query, parts.convert_output
    multiply_row, output_bytes = parts.multiply_row, parts.output_bytes

    @compiled
    def attend(
        record: Any, thread: int, layer: int, head: int, rows: int, table_ptr: int, position: int,
        query_ptr: int, out_ptr: int,
    ) -> None:  # fmt: skip
        visible = position + (1 if is_decode else rows)  # keys that the last row sees
        blocks = (visible + record.block_size - 1) // record.block_size
        queries_ptr = record.queries_ptr + thread * record.queries_bytes
        scores_ptr = record.scores_ptr + thread * record.scores_bytes
        scores_stride_bytes = blocks * record.block_columns * WORD_BYTES
        sums_ptr = record.scratch_ptr + thread * record.scratch_bytes
        sums_stride_bytes = record.head_columns * WORD_BYTES

        query_ptr += head * record.head_dim * WORD_BYTES
        row_bytes = record.head_dim * WORD_BYTES if is_decode else record.qkv_stride_bytes
        for row in range(rows):
            converted_ptr = queries_ptr + row * record.query_stride_bytes
            convert_query(query_ptr + row * row_bytes, converted_ptr, record.head_dim)
        compute_scores(record, layer, head, rows, table_ptr, visible, queries_ptr, scores_ptr)
        for row in range(rows):
            softmax(
                scores_ptr + row * scores_stride_bytes,
                visible if is_decode else position + row + 1,
                blocks,
                record.block_size,
                record.block_columns,
                record.attention_scales_ptr + layer * WORD_BYTES,
                queries_ptr + row * record.query_stride_bytes,  # 1 / sum replaces the query
            )
        weighted_sum(record, layer, head, rows, table_ptr, visible, scores_ptr, sums_ptr)
        out_ptr += head * record.head_dim * output_bytes
        row_bytes = record.head_dim * output_bytes if is_decode else record.hidden_stride_bytes
        for row in range(rows):
            sum_ptr = sums_ptr + row * sums_stride_bytes
            inv_sum_ptr = queries_ptr + row * record.query_stride_bytes
            multiply_row(sum_ptr, inv_sum_ptr, record.head_columns)
            convert_output(sum_ptr, out_ptr + row * row_bytes, record.head_dim)

    return attend


def _make_compute_scores(parts: AttentionParts, *, is_decode: bool) -> Any:
    """Return compute_scores: scores = Q K^T, block by block.

    record, layer, head, rows, table_ptr: as in attend
    visible      number of keys that the last row sees
    queries_ptr  converted queries of the rows
    scores_ptr   result, float32 [rows, blocks, block_columns]
    """
    matmul = parts.batched_matmul if is_decode else parts.matmul
    apply_scales, clear, has_scales = parts.apply_scales, parts.clear, parts.has_scales

    @compiled
    def compute_scores(
        record: Any, layer: int, head: int, rows: int, table_ptr: int, visible: int,
        queries_ptr: int, scores_ptr: int,
    ) -> None:  # fmt: skip
        blocks = (visible + record.block_size - 1) // record.block_size
        scores_stride_bytes = blocks * record.block_columns * WORD_BYTES
        first_index = block_index(record, layer, load_int(table_ptr, 0)) + head
        clear(scores_ptr, rows * blocks * record.block_columns)
        for block in range(blocks):
            index = block_index(record, layer, load_int(table_ptr, block)) + head
            panel_ptr = record.keys_ptr + index * record.key_block_bytes
            next_ptr = record.values_ptr + first_index * record.value_block_bytes
            if block + 1 < blocks:
                next_index = block_index(record, layer, load_int(table_ptr, block + 1)) + head
                next_ptr = record.keys_ptr + next_index * record.key_block_bytes
            block_ptr = scores_ptr + block * record.block_columns * WORD_BYTES
            matmul(
                rows_at(queries_ptr, record.query_stride_bytes),
                rows,
                rows_at(panel_ptr, record.key_block_bytes),
                record.key_steps,
                record.block_columns,
                rows_at(block_ptr, scores_stride_bytes),
                next_ptr - panel_ptr,
            )
            if has_scales:
                seen = min(record.block_size, visible - block * record.block_size)
                for row in range(rows):
                    row_index = index + row if is_decode else index
                    scale_bytes = row_index * record.block_columns * WORD_BYTES
                    row_ptr = block_ptr + row * scores_stride_bytes
                    scales_ptr = record.key_scales_ptr + scale_bytes
                    apply_scales(row_ptr, scales_ptr, seen, record.block_columns)

    return compute_scores


def _make_weighted_sum(target: KernelTarget, parts: AttentionParts, *, is_decode: bool) -> Any:
    """Return weighted_sum: sums = weights V, block by block.

    record, layer, head, rows, table_ptr: as in attend
    visible      number of values that the last row sees
    weights_ptr  the rows' weights, in place of their scores
    sums_ptr     result, float32 [rows, head_columns], followed by one row of spare memory
    """
    matmul = parts.batched_matmul if is_decode else parts.matmul
    apply_scales, clear, has_scales = parts.apply_scales, parts.clear, parts.has_scales
    per_word, weight_bytes = parts.cache_format.per_word, parts.weight_bytes
    all_finite, sum_by_query = parts.all_finite, _make_sum_by_query(target, parts)
    may_spoil = not (is_decode or has_scales)

    @compiled
    def weighted_sum(
        record: Any, layer: int, head: int, rows: int, table_ptr: int, visible: int,
        weights_ptr: int, sums_ptr: int,
    ) -> None:  # fmt: skip
        blocks = (visible + record.block_size - 1) // record.block_size
        weights_stride_bytes = blocks * record.block_columns * WORD_BYTES
        clear(sums_ptr, rows * record.head_columns)
        for block in range(blocks):
            index = block_index(record, layer, load_int(table_ptr, block)) + head
            panel_ptr = record.values_ptr + index * record.value_block_bytes
            next_block = min(block + 1, blocks - 1)
            next_index = block_index(record, layer, load_int(table_ptr, next_block)) + head
            next_ptr = record.values_ptr + next_index * record.value_block_bytes
            block_ptr = weights_ptr + block * record.block_columns * weight_bytes
            left = visible - block * record.block_size
            if has_scales:
                for row in range(rows):
                    row_index = index + row if is_decode else index
                    scale_bytes = row_index * record.block_columns * WORD_BYTES
                    row_ptr = block_ptr + row * weights_stride_bytes
                    scales_ptr = record.value_scales_ptr + scale_bytes
                    seen = min(record.block_size, left if is_decode else left - rows + row + 1)
                    apply_scales(row_ptr, scales_ptr, seen, record.block_columns)
            steps = (min(record.block_size, left) + per_word - 1) // per_word
            matmul(
                rows_at(block_ptr, weights_stride_bytes),
                rows,
                rows_at(panel_ptr, record.value_block_bytes),
                steps,
                record.head_columns,
                rows_at(sums_ptr, record.head_columns * WORD_BYTES),
                next_ptr - panel_ptr,
            )
        if may_spoil and not all_finite(sums_ptr, rows * record.head_columns):
            sum_by_query(
                record, layer, head, rows, table_ptr, visible, weights_ptr, weights_stride_bytes,
                sums_ptr,
            )  # fmt: skip

    return weighted_sum


def _make_sum_by_query(target: KernelTarget, parts: AttentionParts) -> Any:
    """Return sum_by_query: weights V in prefill, for each query only over the values that it sees.

    The arguments are those of weighted_sum, with the bytes from one query's weights to the next
    query's before `sums_ptr`.
    """
    matmul, clear, weight_bytes = parts.matmul, parts.clear, parts.weight_bytes
    per_word, step_bytes = parts.cache_format.per_word, parts.cache_format.input_bytes
    keep_first = _make_keep_first(target, per_word)

    @compiled
    def sum_by_query(
        record: Any, layer: int, head: int, queries: int, table_ptr: int, visible: int,
        weights_ptr: int, weights_stride_bytes: int, sums_ptr: int,
    ) -> None:  # fmt: skip
        columns, row_bytes = record.head_columns, record.head_columns * WORD_BYTES
        spare_ptr = sums_ptr + queries * row_bytes
        clear(sums_ptr, queries * columns)
        for query in range(queries):
            seen, out_ptr = visible - queries + query + 1, sums_ptr + query * row_bytes
            for block in range((seen + record.block_size - 1) // record.block_size):
                index = block_index(record, layer, load_int(table_ptr, block)) + head
                block_bytes = block * record.block_columns * weight_bytes
                in_ptr = weights_ptr + query * weights_stride_bytes + block_bytes
                panel_ptr = record.values_ptr + index * record.value_block_bytes
                tokens = min(record.block_size, seen - block * record.block_size)
                steps, rest = tokens // per_word, tokens % per_word
                inputs, panel, out = rows_at(in_ptr, 0), rows_at(panel_ptr, 0), rows_at(out_ptr, 0)
                matmul(inputs, 1, panel, steps, columns, out, 0)
                if rest > 0:  # the last word also holds tokens that the query does not see
                    keep_first(panel_ptr + steps * row_bytes, spare_ptr, rest, columns)
                    inputs = rows_at(in_ptr + steps * step_bytes, 0)
                    matmul(inputs, 1, rows_at(spare_ptr, 0), 1, columns, out, 0)

    return sum_by_query


def _make_keep_first(target: KernelTarget, per_word: int) -> Any:
    """Return keep_first(words_ptr, out_ptr, numbers, columns), which copies a row of words.

    It keeps the first `numbers` numbers of each word and clears the others. The row is `columns`
    words long, in whole vectors.
    """

    def keep_first(
        v: Vectors, words_ptr: Value, out_ptr: Value, numbers: Value, columns: Value
    ) -> None:
        bits = (numbers * (32 // per_word)).trunc(I32)
        mask = v.splat((1 << bits) - 1)

        with v.range(columns, v.lanes) as i:
            kept = v.load_words(v.element(words_ptr, i)) & mask
            v.store(kept, v.element(out_ptr, i))

    return kernel(target, keep_first)
