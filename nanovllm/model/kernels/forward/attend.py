"""Attention of some rows of one sequence.

In decode, the rows are heads of one query, and each has keys and values of its own. They are read
block by block over the heads, in memory order. In prefill, and where query heads share keys and
values, the rows are queries that share those of one head: token after token, and of a token all
heads that share. In decode of either kind the next block is prefetched while one is read, as it may
be anywhere in memory: by the tiles, line by line, or all of the head's keys or values at once where
the tiles of several rows would prefetch them again and again.

Slots that were never written may hold anything. Their scores are masked to weights of exactly 0,
and weights V stops at the last word that has a token, because 0 * NaN is NaN. The rest of that word
is zeros, or int8, which are finite whatever they are.

A query's weights for the tokens after it, and before its window, are 0 too. If one of those tokens
has a value that is not finite, no output of the queries computed together is finite. Then each
query is computed again by itself, with only the values that it sees. int8 values are always finite,
and their scales are applied only to the tokens that a query sees. Heads of one query in decode all
see the same tokens, and attention.py computes them so only where no token is before the window.
"""

from typing import Any, NamedTuple

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.build.target import PER_WORD, KernelTarget, Spec
from nanovllm.model.kernels.forward.attention_parts import (
    make_all_finite,
    make_apply_scales,
    make_convert_query,
    make_matmul,
    make_multiply_row,
    make_prefetch_block,
    make_softmax,
)
from nanovllm.model.kernels.forward.convert import make_round_row
from nanovllm.model.kernels.forward.kv_cache import block_index
from nanovllm.model.kernels.simd.formats import cache_format
from nanovllm.model.kernels.simd.kernel import kernel
from nanovllm.model.kernels.simd.memory import load_int, make_clear, make_copy
from nanovllm.model.kernels.simd.rows import Rows, rows_at, rows_from
from nanovllm.model.kernels.simd.value import I32, Value
from nanovllm.model.kernels.simd.vector import Vectors


class Item(NamedTuple):
    """Rows of attention that are computed together.

    Attributes:
        layer: index of the layer.
        head: the head of keys and values, or the first one in decode.
        rows: number of heads in decode, of queries in prefill.
        table_ptr: block ids of the sequence, int64, from the first that a row sees.
        visible: number of keys from there to the last that a row sees.
    """

    layer: Any
    head: Any
    rows: Any
    table_ptr: Any
    visible: Any


@compiled
def _block_of(record: Any, item: Any, block: int) -> int:
    """Return the index of a block of the sequence and the item's head in the cache."""
    return block_index(record, item.layer, load_int(item.table_ptr, block)) + int(item.head)


@compiled
def _visible(record: Any, item: Any, row: int) -> int:
    """Return `item.visible` of a row of prefill: keys to the last that it sees."""
    return int(item.visible - (item.rows - 1 - row) // record.sharing)


@compiled
def _unseen(record: Any, visible: int) -> int:
    """Return the number of keys before the window of a row with so many keys to its last one."""
    return int(max(0, visible - record.window))


@compiled
def _count_blocks(record: Any, visible: int) -> int:
    return int((visible + record.block_size - 1) // record.block_size)


def make_attend(spec: Spec, *, is_decode: bool) -> Any:
    """Return attend, the attention of an item.

    record     record of the step (step_record.py)
    thread     index of the calling thread
    item       an Item
    query_ptr  row of qkv of its query, or of the first one
    out_ptr    row of attn_out of that query
    """
    target, is_bfloat16 = spec.target, spec.inputs == "bfloat16"
    compute_scores = _make_compute_scores(spec, is_decode=is_decode)
    softmax = make_softmax(target, as_bfloat16=spec.attention_inputs == "bfloat16")
    weighted_sum = _make_weighted_sum(spec, is_decode=is_decode)
    convert_query = make_convert_query(target, spec.attention_inputs)
    multiply_row = make_multiply_row(target)
    convert_output = make_round_row(target) if is_bfloat16 else make_copy(target)
    output_bytes = 2 if is_bfloat16 else WORD_BYTES

    @compiled
    def attend(record: Any, thread: int, item: Any, query_ptr: int, out_ptr: int) -> None:
        blocks = _count_blocks(record, item.visible)
        scores_stride_bytes = blocks * record.block_columns * WORD_BYTES
        queries_ptr = record.queries_ptr + thread * record.queries_bytes
        queries = Rows(queries_ptr, record.query_stride_bytes)
        scores = Rows(record.scores_ptr + thread * record.scores_bytes, scores_stride_bytes)
        sums_ptr = record.scratch_ptr + thread * record.scratch_bytes
        sums = Rows(sums_ptr, record.head_columns * WORD_BYTES)

        sharing = 1 if is_decode else record.sharing
        head_bytes = record.head_dim * WORD_BYTES
        token_bytes = head_bytes if is_decode else record.qkv_stride_bytes
        query_ptr += item.head * sharing * head_bytes
        for row in range(item.rows):
            row_ptr = query_ptr + row // sharing * token_bytes + row % sharing * head_bytes
            convert_query(row_ptr, queries.ptr + row * queries.stride_bytes, record.head_dim)
        compute_scores(record, item, queries, scores)
        for row in range(item.rows):
            visible = item.visible if is_decode else _visible(record, item, row)
            softmax(
                scores.ptr + row * scores.stride_bytes,
                _unseen(record, visible),
                visible,
                blocks,
                record.block_size,
                record.block_columns,
                record.attention_scales_ptr + item.layer * WORD_BYTES,
                queries.ptr + row * queries.stride_bytes,  # 1 / sum replaces the query
            )
        weighted_sum(record, item, scores, sums)
        head_bytes = record.head_dim * output_bytes
        token_bytes = head_bytes if is_decode else record.attn_out_stride_bytes
        out_ptr += item.head * sharing * head_bytes
        for row in range(item.rows):
            sum_ptr = sums.ptr + row * sums.stride_bytes
            inv_sum_ptr = queries.ptr + row * queries.stride_bytes
            multiply_row(sum_ptr, inv_sum_ptr, record.head_columns)
            row_ptr = out_ptr + row // sharing * token_bytes + row % sharing * head_bytes
            convert_output(sum_ptr, row_ptr, record.head_dim)

    return attend


def _make_scale_block(target: KernelTarget, *, is_decode: bool) -> Any:
    """Return scale_block: rows *= the scales of the keys, or of the values, of one block.

    record, item  as in attend
    block         number of the block in the sequence
    rows          columns of the block in the rows of scores or weights
    scales_ptr    scales of all keys or values
    """
    apply_scales = make_apply_scales(target)

    @compiled
    def scale_block(record: Any, item: Any, block: int, rows: Any, scales_ptr: int) -> None:
        index, columns = _block_of(record, item, block), record.block_columns
        for row in range(item.rows):
            row_index = index + row if is_decode else index
            visible = item.visible if is_decode else _visible(record, item, row)
            before = block * record.block_size
            seen = min(record.block_size, visible - before)
            unseen = _unseen(record, visible) - before
            row_scales_ptr = scales_ptr + row_index * columns * WORD_BYTES
            apply_scales(rows.ptr + row * rows.stride_bytes, row_scales_ptr, unseen, seen, columns)

    return scale_block


def _make_compute_scores(spec: Spec, *, is_decode: bool) -> Any:
    """Return compute_scores: scores = Q K^T, block by block.

    record, item  as in attend
    queries       converted queries of the rows
    scores        result, float32 [rows, blocks, block_columns]
    """
    target, has_scales = spec.target, spec.cache == "int8"
    matmul = make_matmul(target, spec.cache, is_batched=is_decode)
    clear, scale_block = make_clear(target), _make_scale_block(target, is_decode=is_decode)
    prefetch_block = make_prefetch_block(target)

    @compiled
    def compute_scores(record: Any, item: Any, queries: Any, scores: Any) -> None:
        blocks, columns = _count_blocks(record, item.visible), record.block_columns
        clear(scores.ptr, item.rows * blocks * columns)
        for block in range(blocks):
            panel_ptr = record.keys_ptr + _block_of(record, item, block) * record.key_block_bytes
            if block + 1 < blocks:
                next_index = _block_of(record, item, block + 1)
                next_ptr = record.keys_ptr + next_index * record.key_block_bytes
            else:
                next_index = _block_of(record, item, 0)
                next_ptr = record.values_ptr + next_index * record.value_block_bytes
            panels = Rows(panel_ptr, record.key_block_bytes)
            out = Rows(scores.ptr + block * columns * WORD_BYTES, scores.stride_bytes)
            prefetch_bytes = next_ptr - panel_ptr
            if not is_decode and item.rows <= record.sharing:
                prefetch_block(next_ptr, record.key_block_bytes)
            matmul(queries, item.rows, panels, record.key_steps, columns, out, prefetch_bytes)
            if has_scales:
                scale_block(record, item, block, out, record.key_scales_ptr)

    return compute_scores


def _make_weighted_sum(spec: Spec, *, is_decode: bool) -> Any:
    """Return weighted_sum: sums = weights V, block by block.

    record, item  as in attend
    weights       the rows' weights, in place of their scores
    sums          result, float32 [rows, head_columns], followed by one row of spare memory
    """
    target, has_scales = spec.target, spec.cache == "int8"
    matmul = make_matmul(target, spec.cache, is_batched=is_decode)
    clear, scale_block = make_clear(target), _make_scale_block(target, is_decode=is_decode)
    per_word, weight_bytes = PER_WORD[spec.cache], _weight_bytes(spec)
    all_finite, sum_by_query = make_all_finite(target), _make_sum_by_query(spec)
    may_spoil, prefetch_block = not (is_decode or has_scales), make_prefetch_block(target)

    @compiled
    def weighted_sum(record: Any, item: Any, weights: Any, sums: Any) -> None:
        blocks, columns = _count_blocks(record, item.visible), record.head_columns
        clear(sums.ptr, item.rows * columns)
        for block in range(blocks):
            block_bytes = record.value_block_bytes
            panel_ptr = record.values_ptr + _block_of(record, item, block) * block_bytes
            next_index = _block_of(record, item, min(block + 1, blocks - 1))
            prefetch_bytes = record.values_ptr + next_index * block_bytes - panel_ptr
            inputs_ptr = weights.ptr + block * record.block_columns * weight_bytes
            inputs = Rows(inputs_ptr, weights.stride_bytes)
            if has_scales:
                scale_block(record, item, block, inputs, record.value_scales_ptr)
            tokens = min(record.block_size, item.visible - block * record.block_size)
            steps = (tokens + per_word - 1) // per_word
            panels = Rows(panel_ptr, block_bytes)
            if not is_decode and item.rows <= record.sharing:
                prefetch_block(panel_ptr + prefetch_bytes, block_bytes)
            matmul(inputs, item.rows, panels, steps, columns, sums, prefetch_bytes)
        if may_spoil and not all_finite(sums.ptr, item.rows * columns):
            sum_by_query(record, item, weights, sums)

    return weighted_sum


def _weight_bytes(spec: Spec) -> int:
    """Return the bytes of an attention weight."""
    return 2 if spec.attention_inputs == "bfloat16" else WORD_BYTES


def _make_sum_by_query(spec: Spec) -> Any:
    """Return sum_by_query: weights V in prefill, for each query only over the values that it sees.

    The arguments are those of weighted_sum.
    """
    target, per_word, weight_bytes = spec.target, PER_WORD[spec.cache], _weight_bytes(spec)
    matmul, clear = make_matmul(target, spec.cache, is_batched=False), make_clear(target)
    step_bytes = cache_format(target, spec.cache).input_bytes
    keep_between = _make_keep_between(target, per_word)

    @compiled
    def sum_by_query(record: Any, item: Any, weights: Any, sums: Any) -> None:
        columns, block_size = record.head_columns, record.block_size
        spare_ptr = sums.ptr + item.rows * sums.stride_bytes
        clear(sums.ptr, item.rows * columns)
        for query in range(item.rows):
            visible, out = _visible(record, item, query), rows_from(sums, query)
            unseen = _unseen(record, visible)
            for block in range(unseen // block_size, _count_blocks(record, visible)):
                block_bytes = block * record.block_columns * weight_bytes
                in_ptr = weights.ptr + query * weights.stride_bytes + block_bytes
                index = _block_of(record, item, block)
                panel_ptr = record.values_ptr + index * record.value_block_bytes
                first = max(0, unseen - block * block_size)
                end = min(block_size, visible - block * block_size)
                # A word may also hold tokens that the query does not see.
                for step in range(first // per_word, (end + per_word - 1) // per_word):
                    low = max(0, first - step * per_word)
                    high = min(per_word, end - step * per_word)
                    word_ptr = panel_ptr + step * sums.stride_bytes
                    keep_between(word_ptr, spare_ptr, low, high, columns)
                    inputs = rows_at(in_ptr + step * step_bytes, 0)
                    matmul(inputs, 1, rows_at(spare_ptr, 0), 1, columns, out, 0)

    return sum_by_query


def _make_keep_between(target: KernelTarget, per_word: int) -> Any:
    """Return keep_between(words_ptr, out_ptr, low, high, columns), which copies a row of words.

    It keeps the numbers `low` to `high` - 1 of each word and clears the others. The row is
    `columns` words long, in whole vectors.
    """
    number_bits = 32 // per_word

    def keep_between(
        v: Vectors, words_ptr: Value, out_ptr: Value, low: Value, high: Value, columns: Value
    ) -> None:
        mask = v.splat(((1 << high * number_bits) - (1 << low * number_bits)).trunc(I32))

        with v.range(columns, v.lanes) as i:
            kept = v.load_words(v.element(words_ptr, i)) & mask
            v.store(kept, v.element(out_ptr, i))

    return kernel(target, keep_between)
