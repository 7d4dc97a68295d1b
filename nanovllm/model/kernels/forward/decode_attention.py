"""Attention of a sequence's newest token: one query of several heads at a time.

Keys and values are read block by block over these heads, in memory order. While one block is read,
the next one is prefetched: it may be anywhere in memory.
"""

from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.forward.attention_parts import AttentionParts
from nanovllm.model.kernels.forward.kv_cache import block_index
from nanovllm.model.kernels.simd.move import load_int
from nanovllm.model.kernels.step_record import WORD_BYTES


def make_decode_attention(parts: AttentionParts) -> Any:
    """Return decode_attention, the attention of one query in some heads.

    record             record of the step (step_record.py)
    thread             number of the calling thread
    layer              number of the layer
    first_head, heads  the heads to compute
    table_ptr          block ids of the sequence, int64
    query_ptr          the query's row of qkv
    position           its position
    out_ptr            its row of attn_out
    """
    compute_scores, softmax = _make_compute_scores(parts), parts.softmax
    weighted_sum, multiply_row = _make_weighted_sum(parts), parts.multiply_row
    convert_query, convert_output = parts.convert_query, parts.convert_output
    output_bytes = parts.output_bytes

    @compiled
    def decode_attention(
        record: Any, thread: int, layer: int, first_head: int, heads: int, table_ptr: int,
        query_ptr: int, position: int, out_ptr: int,
    ) -> None:  # fmt: skip
        visible = position + 1
        blocks = (visible + record.block_size - 1) // record.block_size
        queries_ptr = record.queries_ptr + thread * record.queries_bytes
        scores_ptr = record.scores_ptr + thread * record.scores_bytes
        scores_stride_bytes = blocks * record.block_columns * WORD_BYTES
        sums_ptr = record.scratch_ptr + thread * record.scratch_bytes
        sums_stride_bytes = record.head_columns * WORD_BYTES

        for head in range(heads):
            convert_query(
                query_ptr + (first_head + head) * record.head_dim * WORD_BYTES,
                queries_ptr + head * record.query_stride_bytes,
                record.head_dim,
            )
        compute_scores(
            record, layer, first_head, heads, table_ptr, visible, queries_ptr, scores_ptr
        )
        for head in range(heads):
            softmax(
                scores_ptr + head * scores_stride_bytes,
                visible,
                blocks,
                record.block_size,
                record.block_columns,
                record.attention_scales_ptr + layer * WORD_BYTES,
                queries_ptr + head * record.query_stride_bytes,  # 1 / sum replaces the query
            )
        weighted_sum(record, layer, first_head, heads, table_ptr, visible, scores_ptr, sums_ptr)
        for head in range(heads):
            row_ptr = sums_ptr + head * sums_stride_bytes
            inv_sum_ptr = queries_ptr + head * record.query_stride_bytes
            multiply_row(row_ptr, inv_sum_ptr, record.head_columns)
            head_ptr = out_ptr + (first_head + head) * record.head_dim * output_bytes
            convert_output(row_ptr, head_ptr, record.head_dim)

    return decode_attention


def _make_compute_scores(parts: AttentionParts) -> Any:
    """Return compute_scores: scores = Q K^T, block by block.

    record, layer, first_head, heads, table_ptr: as in decode_attention
    visible      number of keys that the query sees
    queries_ptr  converted queries of the heads
    scores_ptr   result, float32 [heads, blocks, block_columns]
    """
    matmul, apply_scales, clear = parts.batched_matmul, parts.apply_scales, parts.clear
    has_scales = parts.has_scales

    @compiled
    def compute_scores(
        record: Any, layer: int, first_head: int, heads: int, table_ptr: int, visible: int,
        queries_ptr: int, scores_ptr: int,
    ) -> None:  # fmt: skip
        blocks = (visible + record.block_size - 1) // record.block_size
        scores_stride_bytes = blocks * record.block_columns * WORD_BYTES
        first_index = block_index(record, layer, load_int(table_ptr, 0)) + first_head
        clear(scores_ptr, heads * blocks * record.block_columns)
        for block in range(blocks):
            index = block_index(record, layer, load_int(table_ptr, block)) + first_head
            panel_ptr = record.keys_ptr + index * record.key_block_bytes
            next_ptr = record.values_ptr + first_index * record.value_block_bytes
            if block + 1 < blocks:
                next_index = block_index(record, layer, load_int(table_ptr, block + 1)) + first_head
                next_ptr = record.keys_ptr + next_index * record.key_block_bytes
            block_ptr = scores_ptr + block * record.block_columns * WORD_BYTES
            matmul(
                queries_ptr, record.query_stride_bytes, heads, panel_ptr, record.key_block_bytes,
                record.key_steps, record.block_columns, block_ptr, scores_stride_bytes,
                next_ptr - panel_ptr,
            )  # fmt: skip
            if has_scales:
                seen = min(record.block_size, visible - block * record.block_size)
                for head in range(heads):
                    scale_bytes = (index + head) * record.block_columns * WORD_BYTES
                    row_ptr = block_ptr + head * scores_stride_bytes
                    scales_ptr = record.key_scales_ptr + scale_bytes
                    apply_scales(row_ptr, scales_ptr, seen, record.block_columns)

    return compute_scores


def _make_weighted_sum(parts: AttentionParts) -> Any:
    """Return weighted_sum: sums = weights V, block by block.

    record, layer, first_head, heads, table_ptr: as in decode_attention
    visible      number of values that the query sees
    weights_ptr  the heads' weights, in place of their scores
    sums_ptr     result, float32 [heads, head_columns]
    """
    matmul, apply_scales, clear = parts.batched_matmul, parts.apply_scales, parts.clear
    has_scales, per_word = parts.has_scales, parts.cache_format.per_word
    weight_bytes = parts.weight_bytes

    @compiled
    def weighted_sum(
        record: Any, layer: int, first_head: int, heads: int, table_ptr: int, visible: int,
        weights_ptr: int, sums_ptr: int,
    ) -> None:  # fmt: skip
        blocks = (visible + record.block_size - 1) // record.block_size
        weights_stride_bytes = blocks * record.block_columns * WORD_BYTES
        clear(sums_ptr, heads * record.head_columns)
        for block in range(blocks):
            index = block_index(record, layer, load_int(table_ptr, block)) + first_head
            panel_ptr = record.values_ptr + index * record.value_block_bytes
            next_block = min(block + 1, blocks - 1)
            next_index = block_index(record, layer, load_int(table_ptr, next_block)) + first_head
            next_ptr = record.values_ptr + next_index * record.value_block_bytes
            block_ptr = weights_ptr + block * record.block_columns * weight_bytes
            seen = min(record.block_size, visible - block * record.block_size)
            if has_scales:
                for head in range(heads):
                    scale_bytes = (index + head) * record.block_columns * WORD_BYTES
                    row_ptr = block_ptr + head * weights_stride_bytes
                    scales_ptr = record.value_scales_ptr + scale_bytes
                    apply_scales(row_ptr, scales_ptr, seen, record.block_columns)
            matmul(
                block_ptr, weights_stride_bytes, heads, panel_ptr, record.value_block_bytes,
                (seen + per_word - 1) // per_word, record.head_columns, sums_ptr,
                record.head_columns * WORD_BYTES, next_ptr - panel_ptr,
            )  # fmt: skip

    return weighted_sum
