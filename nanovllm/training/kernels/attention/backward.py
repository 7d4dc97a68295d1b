"""Backward pass of causal self-attention; the formulas are those of NumpyOperations.

An item is one head of one sequence, so no two threads add to the same gradient. A block of KEYS
keys at a time, against all queries from the block's first key on:

    S^T = K @ Q^T      (grad_out @ V^T)^T = V @ grad_out^T
    P^T = exp(scale * S^T - logsumexp), and grad_S^T, row by row
    grad_V = (P * M)^T @ grad_out      grad_K = scale * grad_S^T @ Q     complete for these keys
    grad_Q += scale * grad_S @ K                                         the sum over the blocks

The rows of S^T are keys, so grad_V and grad_K are sums over a row, and only grad_Q is added up.
"""

from typing import Any, NamedTuple

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.elements import sum_elements
from nanovllm.model.kernels.simd.kernel import Record, kernel
from nanovllm.model.kernels.simd.memory import make_clear, make_copy
from nanovllm.model.kernels.simd.rows import Rows, columns_from, rows_at, rows_from
from nanovllm.model.kernels.simd.tile import HEAD, TAIL
from nanovllm.model.kernels.simd.value import Value
from nanovllm.model.kernels.simd.vector import Vectors
from nanovllm.training.kernels.attention.layout import KEYS, count_heads, panel_width
from nanovllm.training.kernels.attention.tiles import make_matmul
from nanovllm.training.kernels.dropout import Mask
from nanovllm.training.kernels.matmul.pack import Panels, make_pack_panels
from nanovllm.training.kernels.phases import Work, make_operation


class Head(NamedTuple):
    """A head of a sequence.

    number       of the head among all heads of the batch
    row          of the sequence's first token in the batch
    column       of the head's first element in a row of d_model
    scratch_ptr  working memory of the thread (layout.py)
    """

    number: int
    row: int
    column: int
    scratch_ptr: int


def make_attention_backward(target: KernelTarget) -> Any:
    """Return the entry of NumpyOperations.attention_backward."""
    pack_queries = _make_pack_queries(target)
    differentiate_keys = _make_differentiate_keys(target)
    clear, write_rows = make_clear(target), _make_write_rows(target)

    @compiled
    def differentiate_head(record: Any, thread: int, item: int) -> None:
        context, head_dim = record.context, record.head_dim
        row_bytes = record.heads * head_dim * WORD_BYTES
        row, column = item // record.heads * context, item % record.heads * head_dim
        head = Head(item, row, column, record.scratch_ptr + thread * record.scratch_bytes)
        pack_queries(record, head)
        grads = rows_at(head.scratch_ptr + record.grad_queries_offset, record.row_bytes)
        clear(grads.ptr, context * record.row_bytes // WORD_BYTES)
        for first in range(0, context, KEYS):
            differentiate_keys(record, head, first)
        grad_ptr = record.grad_qkv_ptr + 3 * row * row_bytes + column * WORD_BYTES
        write_rows(grads, context, head_dim, rows_at(grad_ptr, 3 * row_bytes))

    work = Work(compiled(count_heads), differentiate_head)
    return make_operation("attention_backward", [work])


def _make_write_rows(target: KernelTarget) -> Any:
    """Return write_rows(source, rows, columns, out), which copies Rows."""
    copy = make_copy(target)

    @compiled
    def write_rows(source: Any, rows: int, columns: int, out: Any) -> None:
        for row in range(rows):
            copy(source.ptr + row * source.stride_bytes, out.ptr + row * out.stride_bytes, columns)

    return write_rows


def _make_pack_queries(target: KernelTarget) -> Any:
    """Return pack_queries(record, head): all that the blocks of keys read of queries."""
    pack = make_pack_panels(target, panel_width(target))
    copy, dot = make_copy(target), kernel(target, _dot)

    @compiled
    def pack_queries(record: Any, head: Head) -> None:
        context, head_dim, memory_ptr = record.context, record.head_dim, head.scratch_ptr
        row_bytes = record.heads * head_dim * WORD_BYTES
        offset_bytes = head.row * row_bytes + head.column * WORD_BYTES
        query_ptr = record.qkv_ptr + 3 * head.row * row_bytes + head.column * WORD_BYTES
        grad_ptr, out_ptr = record.grad_out_ptr + offset_bytes, record.out_ptr + offset_bytes
        panels_ptr = memory_ptr + record.queries_t_offset
        pack(Panels(query_ptr, 3 * row_bytes, True, head_dim, context, panels_ptr))
        panels_ptr = memory_ptr + record.grads_t_offset
        pack(Panels(grad_ptr, row_bytes, True, head_dim, context, panels_ptr))
        panels_ptr = memory_ptr + record.queries_offset
        pack(Panels(query_ptr, 3 * row_bytes, False, context, head_dim, panels_ptr))
        panels_ptr = memory_ptr + record.grads_offset
        pack(Panels(grad_ptr, row_bytes, False, context, head_dim, panels_ptr))
        logsumexp_ptr = record.logsumexp_ptr + head.number * context * WORD_BYTES
        copy(logsumexp_ptr, memory_ptr + record.logsumexp_offset, context)
        dots_ptr = memory_ptr + record.dots_offset
        for query in range(context):
            query_bytes = query * row_bytes
            dot(grad_ptr + query_bytes, out_ptr + query_bytes, head_dim, dots_ptr)
            dots_ptr += WORD_BYTES

    return pack_queries


def _make_differentiate_keys(target: KernelTarget) -> Any:
    """Return differentiate_keys(record, head, first).

    It computes grad_V and grad_K of the block of keys from `first` on, and its part of grad_Q.
    """
    width = panel_width(target)
    matmul, later_matmul = make_matmul(target), make_matmul(target, HEAD)
    add_matmul = make_matmul(target, transposed=True, accumulate=True)
    add_causal_matmul = make_matmul(target, TAIL, transposed=True, accumulate=True)
    pack, write_rows = make_pack_panels(target, width), _make_write_rows(target)
    differentiate = kernel(target, _differentiate)

    @compiled
    def differentiate_keys(record: Any, head: Head, first: int) -> None:
        context, head_dim, memory_ptr = record.context, record.head_dim, head.scratch_ptr
        d_model_bytes = record.heads * head_dim * WORD_BYTES
        qkv_row_bytes, row_bytes = 3 * d_model_bytes, record.row_bytes
        scores = rows_at(memory_ptr + record.scores_offset, record.scores_row_bytes)
        grad_scores = rows_at(memory_ptr + record.grad_scores_offset, record.scores_row_bytes)
        keys = min(KEYS, context - first)
        later = context - first - keys  # queries that see all keys of the block
        key_offset_bytes = (
            (head.row + first) * qkv_row_bytes + d_model_bytes + head.column * WORD_BYTES
        )
        key_rows = rows_at(record.qkv_ptr + key_offset_bytes, qkv_row_bytes)
        value_rows = rows_at(key_rows.ptr + d_model_bytes, qkv_row_bytes)

        for query in range(first // width * width, context, width):
            seen = min(keys, query + width - first)  # keys that the panel's last query sees
            panel_ptr = memory_ptr + query * head_dim * WORD_BYTES
            out, grad_out = columns_from(scores, query), columns_from(grad_scores, query)
            matmul(key_rows, seen, panel_ptr + record.queries_t_offset, head_dim, out)
            matmul(value_rows, seen, panel_ptr + record.grads_t_offset, head_dim, grad_out)
        for key in range(keys):
            differentiate(record, scores, grad_scores, first, key, head.number, memory_ptr)

        keys_ptr = memory_ptr + record.keys_offset
        pack(Panels(key_rows.ptr, qkv_row_bytes, False, keys, head_dim, keys_ptr))
        block, grad_block = columns_from(scores, first), columns_from(grad_scores, first)
        grad_values = rows_at(memory_ptr + record.grad_values_offset, row_bytes)
        grad_keys = rows_at(memory_ptr + record.grad_keys_offset, row_bytes)
        grad_queries = rows_at(memory_ptr + record.grad_queries_offset, row_bytes)
        for column in range(0, head_dim, width):
            panel_ptr = memory_ptr + (column * context + first * width) * WORD_BYTES
            left = context - first
            out = columns_from(grad_values, column)
            later_matmul(block, keys, panel_ptr + record.grads_offset, left, out)
            out = columns_from(grad_keys, column)
            later_matmul(grad_block, keys, panel_ptr + record.queries_offset, left, out)
            panel_ptr = keys_ptr + column * keys * WORD_BYTES
            out = columns_from(rows_from(grad_queries, first), column)
            add_causal_matmul(grad_block, keys, panel_ptr, 0, out)
            later_block, later_out = columns_from(grad_block, keys), rows_from(out, keys)
            add_matmul(later_block, later, panel_ptr, keys, later_out)
        out = rows_at(record.grad_qkv_ptr + key_offset_bytes, qkv_row_bytes)
        write_rows(grad_keys, keys, head_dim, out)
        write_rows(grad_values, keys, head_dim, rows_at(out.ptr + d_model_bytes, qkv_row_bytes))

    return differentiate_keys


def _differentiate(
    v: Vectors, record: Record, scores: Rows, grad_scores: Rows, first: Value, row: Value,
    head: Value, memory_ptr: Value,
) -> None:  # fmt: skip
    """Emit P * M in place of a key's scores, and scale * grad_S = scale * P * (M * grad - D).

    record               record of the operation
    scores, grad_scores  S^T and (grad_out @ V^T)^T of a block of keys and all queries
    first, row           the block's first key, and the key's row in the block; queries before the
                         key get arbitrary values
    head                 number of the head among all heads of the batch
    memory_ptr           working memory, which has the logsumexp and D of all queries
    """
    scale, mask = v.splat(record.scale), Mask(v, record)
    key, context = first + row, record.context
    start = key & -v.lanes
    count = context - start
    scores_ptr, grad_scores_ptr, lse_ptr, dots_ptr = (
        v.element(base_ptr, start)
        for base_ptr in (
            scores.row(row),
            grad_scores.row(row),
            memory_ptr + record.logsumexp_offset,
            memory_ptr + record.dots_offset,
        )
    )
    first_index = (head * context + start) * context + key

    def differentiate_all(*, drops: bool) -> None:
        with v.range(count, v.lanes) as i:
            score, grad = (v.load(v.element(base, i)) for base in (scores_ptr, grad_scores_ptr))
            lse, dot = (v.load(v.element(base, i)) for base in (lse_ptr, dots_ptr))
            weight = v.exp(score * scale - lse)
            dropped = weight
            if drops:
                factors = mask.factors(first_index + i * context, context)
                dropped, grad = weight * factors, grad * factors
            grad_score = weight * (grad - dot) * scale
            v.store(dropped, v.element(scores_ptr, i))
            v.store(grad_score, v.element(grad_scores_ptr, i))

    with v.when_else(record.threshold != 0) as (drops, keeps):
        with drops:
            differentiate_all(drops=True)
        with keeps:
            differentiate_all(drops=False)


def _dot(v: Vectors, a_ptr: Value, b_ptr: Value, count: Value, out_ptr: Value) -> None:
    """Emit out = the dot product of `count` float32."""
    products = sum_elements(v, count, (a_ptr, b_ptr), 1, lambda a, b: [a * b])
    v.store(products[0], out_ptr)
