"""Attention of a chunk of a prompt: up to PREFILL_QUERIES queries of one head at a time.

Slots that were never written may hold anything. Their scores are masked to weights of exactly 0,
and weights V stops at the last word that has a token, because 0 * NaN is NaN. The rest of that word
is zeros, or int8, which are finite whatever they are.

A query's weights for the tokens after it are 0 too. If one of those tokens has a value that is not
finite, the whole tile's output is not finite either. In that case every query is computed again by
itself, with only the values that it sees. int8 values are always finite, and their scales are
applied only to the tokens that a query sees.
"""

from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.forward.attention_parts import AttentionParts
from nanovllm.model.kernels.forward.kv_cache import block_index
from nanovllm.model.kernels.simd.move import load_int
from nanovllm.model.kernels.simd.vector import I32, Value, Vectors, kernel
from nanovllm.model.kernels.step_record import WORD_BYTES


def make_prefill_attention(target: KernelTarget, parts: AttentionParts) -> Any:
    """Return prefill_attention, one head's attention of consecutive queries of a sequence.

    record          record of the step (step_record.py)
    thread          number of the calling thread
    layer, head     which head
    table_ptr       block ids of the sequence, int64
    query_ptr       row of qkv of the first query
    queries         number of queries
    first_position  position of the first query
    out_ptr         row of attn_out of the first query
    """
    compute_scores, softmax = _make_compute_scores(parts), parts.softmax
    weighted_sum, multiply_row = _make_weighted_sum(target, parts), parts.multiply_row
    convert_query, convert_output = parts.convert_query, parts.convert_output
    output_bytes = parts.output_bytes

    @compiled
    def prefill_attention(
        record: Any, thread: int, layer: int, head: int, table_ptr: int, query_ptr: int,
        queries: int, first_position: int, out_ptr: int,
    ) -> None:  # fmt: skip
        blocks = (first_position + queries + record.block_size - 1) // record.block_size
        queries_ptr = record.queries_ptr + thread * record.queries_bytes
        scores_ptr = record.scores_ptr + thread * record.scores_bytes
        scores_stride_bytes = blocks * record.block_columns * WORD_BYTES
        sums_ptr = record.scratch_ptr + thread * record.scratch_bytes
        sums_stride_bytes = record.head_columns * WORD_BYTES

        for query in range(queries):
            convert_query(
                query_ptr + query * record.qkv_stride_bytes + head * record.head_dim * WORD_BYTES,
                queries_ptr + query * record.query_stride_bytes,
                record.head_dim,
            )
        compute_scores(
            record, layer, head, table_ptr, queries, first_position, queries_ptr, scores_ptr
        )
        for query in range(queries):
            softmax(
                scores_ptr + query * scores_stride_bytes,
                first_position + query + 1,
                blocks,
                record.block_size,
                record.block_columns,
                record.attention_scales_ptr + layer * WORD_BYTES,
                queries_ptr + query * record.query_stride_bytes,  # 1 / sum replaces the query
            )
        weighted_sum(record, layer, head, table_ptr, queries, first_position, scores_ptr, sums_ptr)
        for query in range(queries):
            row_ptr = sums_ptr + query * sums_stride_bytes
            inv_sum_ptr = queries_ptr + query * record.query_stride_bytes
            multiply_row(row_ptr, inv_sum_ptr, record.head_columns)
            head_ptr = out_ptr + head * record.head_dim * output_bytes
            convert_output(row_ptr, head_ptr + query * record.hidden_stride_bytes, record.head_dim)

    return prefill_attention


def _make_compute_scores(parts: AttentionParts) -> Any:
    """Return compute_scores: scores = Q K^T, block by block.

    record, layer, head, table_ptr, queries, first_position: as in prefill_attention
    queries_ptr  converted queries
    scores_ptr   result, float32 [queries, blocks, block_columns]
    """
    matmul, apply_scales, clear = parts.matmul, parts.apply_scales, parts.clear
    has_scales = parts.has_scales

    @compiled
    def compute_scores(
        record: Any, layer: int, head: int, table_ptr: int, queries: int, first_position: int,
        queries_ptr: int, scores_ptr: int,
    ) -> None:  # fmt: skip
        visible = first_position + queries
        blocks = (visible + record.block_size - 1) // record.block_size
        scores_stride_bytes = blocks * record.block_columns * WORD_BYTES
        clear(scores_ptr, queries * blocks * record.block_columns)
        for block in range(blocks):
            index = block_index(record, layer, load_int(table_ptr, block)) + head
            block_ptr = scores_ptr + block * record.block_columns * WORD_BYTES
            matmul(
                queries_ptr, record.query_stride_bytes, queries,
                record.keys_ptr + index * record.key_block_bytes, 0,
                record.key_steps, record.block_columns, block_ptr, scores_stride_bytes, 0,
            )  # fmt: skip
            if has_scales:
                scales_ptr = record.key_scales_ptr + index * record.block_columns * WORD_BYTES
                seen = min(record.block_size, visible - block * record.block_size)
                for query in range(queries):
                    row_ptr = block_ptr + query * scores_stride_bytes
                    apply_scales(row_ptr, scales_ptr, seen, record.block_columns)

    return compute_scores


def _make_weighted_sum(target: KernelTarget, parts: AttentionParts) -> Any:
    """Return weighted_sum: sums = weights V, block by block.

    record, layer, head, table_ptr, queries, first_position: as in prefill_attention
    weights_ptr  the queries' weights, in place of their scores
    sums_ptr     result, float32 [queries, head_columns], followed by one row of spare memory
    """
    matmul, apply_scales, clear = parts.matmul, parts.apply_scales, parts.clear
    has_scales, per_word = parts.has_scales, parts.cache_format.per_word
    weight_bytes, all_finite = parts.weight_bytes, parts.all_finite
    sum_by_query = _make_sum_by_query(target, parts)

    @compiled
    def weighted_sum(
        record: Any, layer: int, head: int, table_ptr: int, queries: int, first_position: int,
        weights_ptr: int, sums_ptr: int,
    ) -> None:  # fmt: skip
        visible = first_position + queries
        blocks = (visible + record.block_size - 1) // record.block_size
        weights_stride_bytes = blocks * record.block_columns * WORD_BYTES
        clear(sums_ptr, queries * record.head_columns)
        for block in range(blocks):
            index = block_index(record, layer, load_int(table_ptr, block)) + head
            block_ptr = weights_ptr + block * record.block_columns * weight_bytes
            first_token = block * record.block_size
            if has_scales:
                scales_ptr = record.value_scales_ptr + index * record.block_columns * WORD_BYTES
                for query in range(queries):
                    row_ptr = block_ptr + query * weights_stride_bytes
                    seen = min(record.block_size, first_position + query + 1 - first_token)
                    apply_scales(row_ptr, scales_ptr, seen, record.block_columns)
            tokens = min(record.block_size, visible - first_token)
            matmul(
                block_ptr, weights_stride_bytes, queries,
                record.values_ptr + index * record.value_block_bytes, 0,
                (tokens + per_word - 1) // per_word, record.head_columns,
                sums_ptr, record.head_columns * WORD_BYTES, 0,
            )  # fmt: skip
        if not has_scales and not all_finite(sums_ptr, queries * record.head_columns):
            sum_by_query(
                record, layer, head, table_ptr, queries, first_position, weights_ptr,
                weights_stride_bytes, sums_ptr,
            )  # fmt: skip

    return weighted_sum


def _make_sum_by_query(target: KernelTarget, parts: AttentionParts) -> Any:
    """Return sum_by_query: weights V, for each query only over the values that it sees.

    The arguments are those of weighted_sum, with the bytes from one query's weights to the next
    query's before `sums_ptr`.
    """
    matmul, clear, weight_bytes = parts.matmul, parts.clear, parts.weight_bytes
    per_word, step_bytes = parts.cache_format.per_word, parts.cache_format.input_bytes
    keep_first = _make_keep_first(target, per_word)

    @compiled
    def sum_by_query(
        record: Any, layer: int, head: int, table_ptr: int, queries: int, first_position: int,
        weights_ptr: int, weights_stride_bytes: int, sums_ptr: int,
    ) -> None:  # fmt: skip
        columns, row_bytes = record.head_columns, record.head_columns * WORD_BYTES
        spare_ptr = sums_ptr + queries * row_bytes
        clear(sums_ptr, queries * columns)
        for query in range(queries):
            visible, out_ptr = first_position + query + 1, sums_ptr + query * row_bytes
            for block in range((visible + record.block_size - 1) // record.block_size):
                index = block_index(record, layer, load_int(table_ptr, block)) + head
                in_ptr = (
                    weights_ptr
                    + query * weights_stride_bytes
                    + block * record.block_columns * weight_bytes
                )
                panel_ptr = record.values_ptr + index * record.value_block_bytes
                tokens = min(record.block_size, visible - block * record.block_size)
                steps, rest = tokens // per_word, tokens % per_word
                matmul(in_ptr, 0, 1, panel_ptr, 0, steps, columns, out_ptr, 0, 0)
                if rest > 0:  # the last word also holds tokens that the query does not see
                    keep_first(panel_ptr + steps * row_bytes, spare_ptr, rest, columns)
                    in_ptr += steps * step_bytes
                    matmul(in_ptr, 0, 1, spare_ptr, 0, 1, columns, out_ptr, 0, 0)

    return sum_by_query


def _make_keep_first(target: KernelTarget, per_word: int) -> Any:
    """Return keep_first(words_ptr, out_ptr, numbers, columns), which copies a row of words.

    It keeps the first `numbers` numbers of each word and clears the others. The row is `columns`
    words long, in whole vectors.
    """

    def keep_first(
        v: Vectors, words_ptr: Value, out_ptr: Value, numbers: Value, columns: Value
    ) -> None:
        bits = v.builder.trunc(v.times(numbers, 32 // per_word), I32)
        mask = v.splat(v.builder.sub(v.builder.shl(I32(1), bits), I32(1)))

        def vector(i: Value, _: list[Value]) -> list[Value]:
            kept = v.builder.and_(v.load_words(v.element(words_ptr, i)), mask)
            v.store(kept, v.element(out_ptr, i))
            return []

        v.loop(columns, v.lanes, [], vector)

    return kernel(target, keep_first)
