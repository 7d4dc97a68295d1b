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
from nanovllm.model.kernels.simd.kernel import kernel
from nanovllm.model.kernels.simd.move import load_int, make_clear, make_copy
from nanovllm.model.kernels.simd.value import Value
from nanovllm.model.kernels.simd.vector import Vectors
from nanovllm.training.kernels.attention.layout import (
    KEYS,
    BackwardMemory,
    backward_memory,
    panel_width,
)
from nanovllm.training.kernels.attention.panels import (
    count_heads,
    make_copy_panels,
    make_transpose_panels,
)
from nanovllm.training.kernels.attention.tiles import HEAD, TAIL, make_matmul
from nanovllm.training.kernels.dropout import Mask
from nanovllm.training.kernels.phases import Work, make_entry

_memory = compiled(backward_memory)


class Head(NamedTuple):
    """A head of a sequence.

    number  of the head among all heads of the batch
    row     of the sequence's first token in the batch
    column  of the head's first element in a row of d_model
    """

    number: int
    row: int
    column: int


def make_attention_backward(target: KernelTarget) -> Any:
    """Return the entry of NumpyOperations.attention_backward."""
    pack_queries = _make_pack_queries(target)
    differentiate_keys = _make_differentiate_keys(target)
    clear, write_rows = make_clear(target), _make_write_rows(target)
    width = panel_width(target)

    @compiled
    def differentiate_head(record: Any, thread: int, item: int) -> None:
        context, head_dim = record.context, record.head_dim
        row_bytes = record.heads * head_dim * WORD_BYTES
        head = Head(item, item // record.heads * context, item % record.heads * head_dim)
        memory = _memory(
            record.scratch_ptr + thread * record.scratch_bytes, context, head_dim, width
        )
        pack_queries(record, memory, head)
        clear(memory.grad_queries_ptr, context * memory.row_bytes // WORD_BYTES)
        for first in range(0, context, KEYS):
            differentiate_keys(record, memory, head, first)
        write_rows(
            memory.grad_queries_ptr, memory.row_bytes, context, head_dim,
            record.grad_qkv_ptr + 3 * head.row * row_bytes + head.column * WORD_BYTES,
            3 * row_bytes,
        )  # fmt: skip

    return make_entry("attention_backward", [Work(count_heads, differentiate_head)])


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
    """Return pack_queries(record, memory, head): all that the blocks of keys read of queries."""
    copy_panels, transpose_panels = make_copy_panels(target), make_transpose_panels(target)
    copy, dot = make_copy(target), kernel(target, _dot)

    @compiled
    def pack_queries(record: Any, memory: BackwardMemory, head: Head) -> None:
        context, head_dim = record.context, record.head_dim
        row_bytes = record.heads * head_dim * WORD_BYTES
        offset_bytes = head.row * row_bytes + head.column * WORD_BYTES
        query_ptr = record.qkv_ptr + 3 * head.row * row_bytes + head.column * WORD_BYTES
        grad_ptr, out_ptr = record.grad_out_ptr + offset_bytes, record.out_ptr + offset_bytes
        transpose_panels(query_ptr, 3 * row_bytes, context, head_dim, memory.queries_t_ptr)
        transpose_panels(grad_ptr, row_bytes, context, head_dim, memory.grads_t_ptr)
        copy_panels(query_ptr, 3 * row_bytes, context, head_dim, memory.queries_ptr)
        copy_panels(grad_ptr, row_bytes, context, head_dim, memory.grads_ptr)
        logsumexp_ptr = record.logsumexp_ptr + head.number * context * WORD_BYTES
        copy(logsumexp_ptr, memory.logsumexp_ptr, context)
        for query in range(context):
            dot(
                grad_ptr + query * row_bytes, out_ptr + query * row_bytes, head_dim,
                memory.dots_ptr + query * WORD_BYTES,
            )  # fmt: skip

    return pack_queries


def _make_differentiate_keys(target: KernelTarget) -> Any:
    """Return differentiate_keys(record, memory, head, first).

    It computes grad_V and grad_K of the block of keys from `first` on, and its part of grad_Q.
    """
    width = panel_width(target)
    matmul, later_matmul = make_matmul(target), make_matmul(target, HEAD)
    add_matmul = make_matmul(target, transposed=True, accumulate=True)
    add_causal_matmul = make_matmul(target, TAIL, transposed=True, accumulate=True)
    copy_panels, write_rows = make_copy_panels(target), _make_write_rows(target)
    differentiate_row = _make_differentiate_row(target)

    @compiled
    def differentiate_keys(record: Any, memory: BackwardMemory, head: Head, first: int) -> None:
        context, head_dim = record.context, record.head_dim
        d_model_bytes = record.heads * head_dim * WORD_BYTES
        qkv_row_bytes = 3 * d_model_bytes
        scores_row_bytes, row_bytes = memory.scores_row_bytes, memory.row_bytes
        keys = min(KEYS, context - first)
        later = context - first - keys  # queries that see all keys of the block
        key_offset_bytes = (
            (head.row + first) * qkv_row_bytes + d_model_bytes + head.column * WORD_BYTES
        )
        key_ptr = record.qkv_ptr + key_offset_bytes
        value_ptr = key_ptr + d_model_bytes

        for query in range(first // width * width, context, width):
            seen = min(keys, query + width - first)  # keys that the panel's last query sees
            panel_bytes = query * head_dim * WORD_BYTES
            matmul(
                key_ptr, qkv_row_bytes, seen, memory.queries_t_ptr + panel_bytes, head_dim,
                memory.scores_ptr + query * WORD_BYTES, scores_row_bytes,
            )  # fmt: skip
            matmul(
                value_ptr, qkv_row_bytes, seen, memory.grads_t_ptr + panel_bytes, head_dim,
                memory.grad_scores_ptr + query * WORD_BYTES, scores_row_bytes,
            )  # fmt: skip
        for key in range(keys):
            differentiate_row(
                record, memory.scores_ptr + key * scores_row_bytes,
                memory.grad_scores_ptr + key * scores_row_bytes, first + key,
                memory.logsumexp_ptr, memory.dots_ptr, head.number,
            )  # fmt: skip

        copy_panels(key_ptr, qkv_row_bytes, keys, head_dim, memory.keys_ptr)
        block_ptr = memory.scores_ptr + first * WORD_BYTES
        grad_block_ptr = memory.grad_scores_ptr + first * WORD_BYTES
        for column in range(0, head_dim, width):
            offset_bytes = column * WORD_BYTES
            panel_bytes = (column * context + first * width) * WORD_BYTES
            later_matmul(
                block_ptr, scores_row_bytes, keys, memory.grads_ptr + panel_bytes,
                context - first, memory.grad_values_ptr + offset_bytes, row_bytes,
            )  # fmt: skip
            later_matmul(
                grad_block_ptr, scores_row_bytes, keys, memory.queries_ptr + panel_bytes,
                context - first, memory.grad_keys_ptr + offset_bytes, row_bytes,
            )  # fmt: skip
            panel_ptr = memory.keys_ptr + column * keys * WORD_BYTES
            out_ptr = memory.grad_queries_ptr + first * row_bytes + offset_bytes
            add_causal_matmul(
                grad_block_ptr, scores_row_bytes, keys, panel_ptr, 0, out_ptr, row_bytes
            )
            add_matmul(
                grad_block_ptr + keys * WORD_BYTES, scores_row_bytes, later, panel_ptr, keys,
                out_ptr + keys * row_bytes, row_bytes,
            )  # fmt: skip
        grad_key_ptr = record.grad_qkv_ptr + key_offset_bytes
        grad_value_ptr = grad_key_ptr + d_model_bytes
        write_rows(memory.grad_values_ptr, row_bytes, keys, head_dim, grad_value_ptr, qkv_row_bytes)
        write_rows(memory.grad_keys_ptr, row_bytes, keys, head_dim, grad_key_ptr, qkv_row_bytes)

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
    differentiate = kernel(target, _differentiate)
    lanes = target.lanes

    @compiled
    def differentiate_row(
        record: Any, scores_ptr: int, grad_scores_ptr: int, key: int, lse_ptr: int,
        dots_ptr: int, number: int,
    ) -> None:  # fmt: skip
        context = record.context
        first = key // lanes * lanes
        offset_bytes = first * WORD_BYTES
        differentiate(
            context - first, scores_ptr + offset_bytes, grad_scores_ptr + offset_bytes,
            lse_ptr + offset_bytes, dots_ptr + offset_bytes, record.scale_bits,
            (number * context + first) * context + key, context,
            load_int(record.key_ptr, 0), record.threshold, record.factor_bits,
        )  # fmt: skip

    return differentiate_row


def _differentiate(
    v: Vectors, count: Value, scores_ptr: Value, grad_scores_ptr: Value, lse_ptr: Value,
    dots_ptr: Value, scale_bits: Value, first_index: Value, index_step: Value, key: Value,
    threshold: Value, factor_bits: Value,
) -> None:  # fmt: skip
    """Emit P * M and scale * P * (M * grad - D), in whole vectors."""
    scale = v.float_argument(scale_bits)
    mask = Mask(v, key, threshold, factor_bits)

    def differentiate_all(*, drops: bool) -> None:
        with v.range(count, v.lanes) as i:
            score, grad = (v.load(v.element(base, i)) for base in (scores_ptr, grad_scores_ptr))
            lse, dot = (v.load(v.element(base, i)) for base in (lse_ptr, dots_ptr))
            weight = v.exp(score * scale - lse)
            dropped = weight
            if drops:
                factors = mask.factors(first_index + i * index_step, index_step)
                dropped, grad = weight * factors, grad * factors
            grad_score = weight * (grad - dot) * scale
            v.store(dropped, v.element(scores_ptr, i))
            v.store(grad_score, v.element(grad_scores_ptr, i))

    with v.when_else(threshold != 0) as (drops, keeps):
        with drops:
            differentiate_all(drops=True)
        with keeps:
            differentiate_all(drops=False)


def _dot(v: Vectors, a_ptr: Value, b_ptr: Value, count: Value, out_ptr: Value) -> None:
    """Emit out = the dot product of `count` float32."""
    products = sum_elements(v, count, (a_ptr, b_ptr), 1, lambda a, b: [a * b])
    v.store(products[0], out_ptr)
