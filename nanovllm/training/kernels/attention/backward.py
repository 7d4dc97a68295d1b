"""Backward pass of causal self-attention; the formulas are those of NumpyOperations.

An item is one head of one sequence, so no two threads add to the same gradient. A block of KEYS
keys at a time, against all queries from the block's first key on:

    S^T = K @ Q^T      (grad_out @ V^T)^T = V @ grad_out^T
    P^T = exp(scale * S^T - logsumexp), and grad_S^T, row by row
    grad_V = (P * M)^T @ grad_out      grad_K = scale * grad_S^T @ Q     complete for these keys
    grad_Q += scale * grad_S @ K                                         the sum over the blocks

The rows of S^T are keys, so grad_V and grad_K are sums over a row, and only grad_Q is added up.
"""

from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.elements import sum_elements
from nanovllm.model.kernels.simd.kernel import kernel
from nanovllm.model.kernels.simd.move import make_clear, make_copy, record_at
from nanovllm.model.kernels.simd.value import Value
from nanovllm.model.kernels.simd.vector import Vectors
from nanovllm.model.kernels.threads.barrier import take_item
from nanovllm.training.kernels.attention.layout import (
    KEYS,
    attention_backward_layout,
    panel_width,
)
from nanovllm.training.kernels.attention.panels import make_copy_panels, make_transpose_panels
from nanovllm.training.kernels.attention.tiles import HEAD, TAIL, make_matmul
from nanovllm.training.kernels.dropout import count_up, is_kept
from nanovllm.training.kernels.records import RECORDS

_record_at = record_at(RECORDS["attention_backward"])
_layout = compiled(attention_backward_layout)


def make_attention_backward(target: KernelTarget) -> Any:
    """Return the entry attention_backward(record_ptr, thread)."""
    pack_queries = _make_pack_queries(target)
    differentiate_keys = _make_differentiate_keys(target)
    clear, write_rows = make_clear(target), _make_write_rows(target)
    width = panel_width(target)

    @compiled
    def attention_backward(record_ptr: int, thread: int) -> None:
        record = _record_at(record_ptr)
        context, head_dim = record.context, record.head_dim
        d_model = record.heads * head_dim
        scratch_ptr = record.scratch_ptr + thread * record.scratch_bytes
        grad_queries_ptr = scratch_ptr + _layout(context, head_dim, width)[3]
        row_bytes = _layout(context, head_dim, width)[9]
        item = take_item(record.phases_ptr)
        while item < record.batch * record.heads:
            row, head = item // record.heads * context, item % record.heads
            column = head * head_dim
            pack_queries(record, scratch_ptr, row, column, item)
            clear(grad_queries_ptr, context * row_bytes // WORD_BYTES)
            for first in range(0, context, KEYS):
                differentiate_keys(record, scratch_ptr, row, column, item, first)
            write_rows(
                grad_queries_ptr, row_bytes, context, head_dim,
                record.grad_qkv_ptr + (row * 3 * d_model + column) * WORD_BYTES,
                3 * d_model * WORD_BYTES,
            )  # fmt: skip
            item = take_item(record.phases_ptr)

    return attention_backward


def _make_write_rows(target: KernelTarget) -> Any:
    """Return write_rows(in_ptr, in_stride_bytes, rows, columns, out_ptr, out_stride_bytes)."""
    copy = make_copy(target)

    @compiled
    def write_rows(
        in_ptr: int, in_stride_bytes: int, rows: int, columns: int, out_ptr: int,
        out_stride_bytes: int,
    ) -> None:  # fmt: skip
        for row in range(rows):
            copy(in_ptr + row * in_stride_bytes, out_ptr + row * out_stride_bytes, columns)

    return write_rows


def _make_pack_queries(target: KernelTarget) -> Any:
    """Return pack_queries: all that the blocks of keys read of a head's queries.

    record       record of the operation
    scratch_ptr  the thread's working memory
    row, column  of the head's first query in grad_out
    number       of the head among all heads of the batch
    """
    width = panel_width(target)
    copy_panels, transpose_panels = make_copy_panels(target), make_transpose_panels(target)
    copy, dot = make_copy(target), kernel(target, _dot)

    @compiled
    def pack_queries(record: Any, scratch_ptr: int, row: int, column: int, number: int) -> None:
        context, head_dim = record.context, record.head_dim
        d_model = record.heads * head_dim
        grads_t, queries, grads, _, lse, dots, _, _, _, _, _ = _layout(context, head_dim, width)
        row_bytes = d_model * WORD_BYTES
        query_ptr = record.qkv_ptr + (3 * row * d_model + column) * WORD_BYTES
        grad_ptr = record.grad_out_ptr + (row * d_model + column) * WORD_BYTES
        out_ptr = record.out_ptr + (row * d_model + column) * WORD_BYTES
        transpose_panels(query_ptr, 3 * row_bytes, context, head_dim, scratch_ptr)
        transpose_panels(grad_ptr, row_bytes, context, head_dim, scratch_ptr + grads_t)
        copy_panels(query_ptr, 3 * row_bytes, context, head_dim, scratch_ptr + queries)
        copy_panels(grad_ptr, row_bytes, context, head_dim, scratch_ptr + grads)
        logsumexp_ptr = record.logsumexp_ptr + number * context * WORD_BYTES
        copy(logsumexp_ptr, scratch_ptr + lse, context)
        for query in range(context):
            dot(
                grad_ptr + query * row_bytes, out_ptr + query * row_bytes, head_dim,
                scratch_ptr + dots + query * WORD_BYTES,
            )  # fmt: skip

    return pack_queries


def _make_differentiate_keys(target: KernelTarget) -> Any:
    """Return differentiate_keys: grad_V and grad_K of a block of keys, and its part of grad_Q.

    The arguments are those of pack_queries, and the number of the block's first key.
    """
    width = panel_width(target)
    matmul, later_matmul = make_matmul(target), make_matmul(target, HEAD)
    add_matmul = make_matmul(target, transposed=True, accumulate=True)
    add_causal_matmul = make_matmul(target, TAIL, transposed=True, accumulate=True)
    copy_panels, write_rows = make_copy_panels(target), _make_write_rows(target)
    differentiate_row = _make_differentiate_row(target)

    @compiled
    def differentiate_keys(
        record: Any, scratch_ptr: int, row: int, column: int, number: int, first: int
    ) -> None:
        context, head_dim = record.context, record.head_dim
        row_bytes = record.heads * head_dim * WORD_BYTES
        keys = min(KEYS, context - first)
        later = context - first - keys  # queries that see all keys of the block
        (
            grads_t, queries, grads, grad_queries, lse, dots, key_panels, scores,
            scores_stride_bytes, out_stride_bytes, _,
        ) = _layout(context, head_dim, width)  # fmt: skip
        scores_ptr = scratch_ptr + scores
        grad_scores_ptr = scores_ptr + KEYS * scores_stride_bytes
        sums_ptr = grad_scores_ptr + KEYS * scores_stride_bytes
        key_ptr = record.qkv_ptr + 3 * (row + first) * row_bytes + row_bytes + column * WORD_BYTES
        value_ptr = key_ptr + row_bytes

        for query in range(first // width * width, context, width):
            seen = min(keys, query + width - first)  # keys that the panel's last query sees
            panel = query * head_dim * WORD_BYTES
            matmul(
                key_ptr, 3 * row_bytes, seen, scratch_ptr + panel, head_dim,
                scores_ptr + query * WORD_BYTES, scores_stride_bytes,
            )  # fmt: skip
            matmul(
                value_ptr, 3 * row_bytes, seen, scratch_ptr + grads_t + panel, head_dim,
                grad_scores_ptr + query * WORD_BYTES, scores_stride_bytes,
            )  # fmt: skip
        for key in range(keys):
            differentiate_row(
                record, scores_ptr + key * scores_stride_bytes,
                grad_scores_ptr + key * scores_stride_bytes, first + key,
                scratch_ptr + lse, scratch_ptr + dots, number,
            )  # fmt: skip

        keys_ptr = scratch_ptr + key_panels
        copy_panels(key_ptr, 3 * row_bytes, keys, head_dim, keys_ptr)
        block_ptr = scores_ptr + first * WORD_BYTES
        grad_block_ptr = grad_scores_ptr + first * WORD_BYTES
        for panel_column in range(0, head_dim, width):
            offset = panel_column * WORD_BYTES
            later_matmul(
                block_ptr, scores_stride_bytes, keys,
                scratch_ptr + grads + (panel_column * context + first * width) * WORD_BYTES,
                context - first, sums_ptr + offset, out_stride_bytes,
            )  # fmt: skip
            later_matmul(
                grad_block_ptr, scores_stride_bytes, keys,
                scratch_ptr + queries + (panel_column * context + first * width) * WORD_BYTES,
                context - first, sums_ptr + KEYS * out_stride_bytes + offset, out_stride_bytes,
            )  # fmt: skip
            panel_ptr = keys_ptr + panel_column * keys * WORD_BYTES
            out_ptr = scratch_ptr + grad_queries + first * out_stride_bytes + offset
            add_causal_matmul(
                grad_block_ptr, scores_stride_bytes, keys, panel_ptr, 0, out_ptr, out_stride_bytes
            )
            add_matmul(
                grad_block_ptr + keys * WORD_BYTES, scores_stride_bytes, later, panel_ptr, keys,
                out_ptr + keys * out_stride_bytes, out_stride_bytes,
            )  # fmt: skip
        grad_key_ptr = record.grad_qkv_ptr + key_ptr - record.qkv_ptr
        write_rows(
            sums_ptr, out_stride_bytes, keys, head_dim, grad_key_ptr + row_bytes, 3 * row_bytes
        )
        write_rows(
            sums_ptr + KEYS * out_stride_bytes, out_stride_bytes, keys, head_dim, grad_key_ptr,
            3 * row_bytes,
        )  # fmt: skip

    return differentiate_keys


def _make_differentiate_row(target: KernelTarget) -> Any:
    """Return differentiate_row: P * M in place of a key's scores, and scale * grad_S.

    record           record of the operation
    scores_ptr       S^T of the key and all queries
    grad_scores_ptr  (grad_out @ V^T)^T of the key and all queries
    key              number of the key; the queries before it get arbitrary values
    lse_ptr          logsumexp of all queries
    dots_ptr         D of all queries
    number           of the head among all heads of the batch
    """
    differentiate = kernel(target, _make_differentiate(drops=False))
    differentiate_dropped = kernel(target, _make_differentiate(drops=True))
    lanes = target.lanes

    @compiled
    def differentiate_row(
        record: Any, scores_ptr: int, grad_scores_ptr: int, key: int, lse_ptr: int,
        dots_ptr: int, number: int,
    ) -> None:  # fmt: skip
        context = record.context
        first = key // lanes * lanes
        offset = first * WORD_BYTES
        index = (number * context + first) * context + key
        if record.threshold > 0:
            differentiate_dropped(
                context - first, scores_ptr + offset, grad_scores_ptr + offset,
                lse_ptr + offset, dots_ptr + offset, record.scale_bits, index, context,
                record.key_low, record.key_high, record.threshold, record.factor_bits,
            )  # fmt: skip
        else:
            differentiate(
                context - first, scores_ptr + offset, grad_scores_ptr + offset,
                lse_ptr + offset, dots_ptr + offset, record.scale_bits, index, context,
                record.key_low, record.key_high, record.threshold, record.factor_bits,
            )  # fmt: skip

    return differentiate_row


def _make_differentiate(*, drops: bool) -> Any:
    def emit(
        v: Vectors, count: Value, scores_ptr: Value, grad_scores_ptr: Value, lse_ptr: Value,
        dots_ptr: Value, scale_bits: Value, first_index: Value, index_step: Value,
        key_low: Value, key_high: Value, threshold: Value, factor_bits: Value,
    ) -> None:  # fmt: skip
        """Emit P * M and scale * P * (M * grad - D), in whole vectors."""
        scale = v.float_argument(scale_bits)
        key = v.integer_argument(key_low), v.integer_argument(key_high)
        least, factor = v.integer_argument(threshold), v.float_argument(factor_bits)

        with v.range(count, v.lanes) as i:
            score, grad = (v.load(v.element(base, i)) for base in (scores_ptr, grad_scores_ptr))
            lse, dot = (v.load(v.element(base, i)) for base in (lse_ptr, dots_ptr))
            weight = v.exp(score * scale - lse)
            dropped = weight
            if drops:
                first = first_index + i * index_step
                index = count_up(v, first, index_step)
                mask = v.where(is_kept(v, index, key, least), factor, 0.0)
                dropped, grad = weight * mask, grad * mask
            grad_score = weight * (grad - dot) * scale
            v.store(dropped, v.element(scores_ptr, i))
            v.store(grad_score, v.element(grad_scores_ptr, i))

    return emit


def _dot(v: Vectors, a_ptr: Value, b_ptr: Value, count: Value, out_ptr: Value) -> None:
    """Emit out = the dot product of `count` float32."""
    products = sum_elements(v, count, (a_ptr, b_ptr), 1, lambda a, b: [a * b])
    v.store(products[0], out_ptr)
