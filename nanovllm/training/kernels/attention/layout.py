"""The working memory of attention; laid out alike by Python and by compiled code. Needs no Numba.

Addresses begin at `start_ptr`, a multiple of LINE_BYTES. Python passes 0 to learn the size.
"""

from typing import NamedTuple

from nanovllm.model.kernels.build.layout import LINE_BYTES, WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget

QUERIES = 24
"""Queries that attention computes together."""
KEYS = 24
"""Keys that the backward pass computes together."""
PANEL_VECTORS = 2


def panel_width(target: KernelTarget) -> int:
    """Return the columns of a panel."""
    return PANEL_VECTORS * target.lanes


class ForwardMemory(NamedTuple):
    """Arrays of a head in attention, with panels `width` wide."""

    keys_ptr: int  # K^T [panels of keys, head_dim, width]
    values_ptr: int  # V [panels of columns, context, width]
    scores_ptr: int  # [QUERIES, context]
    sums_ptr: int  # [QUERIES, head_dim]
    factors_ptr: int  # [QUERIES]
    scores_row_bytes: int  # from one row of scores to the next
    row_bytes: int  # from one row of sums to the next
    end_ptr: int


def forward_memory(start_ptr: int, context: int, head_dim: int, width: int) -> ForwardMemory:
    """Return the memory of a thread."""
    row_bytes = -(-head_dim // width) * width * WORD_BYTES
    padded_bytes = -(-context // width) * width * WORD_BYTES
    # Rows a power of two apart would share a set of the cache, and evict each other.
    scores_row_bytes = padded_bytes + LINE_BYTES
    keys_ptr = start_ptr
    values_ptr = keys_ptr + padded_bytes * head_dim
    scores_ptr = values_ptr + context * row_bytes
    sums_ptr = scores_ptr + QUERIES * scores_row_bytes
    factors_ptr = sums_ptr + QUERIES * row_bytes
    end_ptr = -(-(factors_ptr + QUERIES * WORD_BYTES) // LINE_BYTES) * LINE_BYTES
    return ForwardMemory(
        keys_ptr, values_ptr, scores_ptr, sums_ptr, factors_ptr, scores_row_bytes, row_bytes,
        end_ptr,
    )  # fmt: skip


class BackwardMemory(NamedTuple):
    """Arrays of a head in the backward pass, with panels `width` wide."""

    queries_t_ptr: int  # Q^T [panels of queries, head_dim, width]
    grads_t_ptr: int  # grad_out^T, alike
    queries_ptr: int  # Q [panels of columns, context, width]
    grads_ptr: int  # grad_out, alike
    grad_queries_ptr: int  # [context, head_dim]
    logsumexp_ptr: int  # [context]
    dots_ptr: int  # [context]
    keys_ptr: int  # K [panels of columns, KEYS, width]
    scores_ptr: int  # [KEYS, context]
    grad_scores_ptr: int  # [KEYS, context]
    grad_values_ptr: int  # [KEYS, head_dim]
    grad_keys_ptr: int  # [KEYS, head_dim]
    scores_row_bytes: int  # from one row of scores, and of their gradients, to the next
    row_bytes: int  # from one row of the other gradients to the next
    end_ptr: int


def backward_memory(start_ptr: int, context: int, head_dim: int, width: int) -> BackwardMemory:
    """Return the memory of a thread."""
    row_bytes = -(-head_dim // width) * width * WORD_BYTES
    padded_bytes = -(-context // width) * width * WORD_BYTES
    scores_row_bytes = padded_bytes + LINE_BYTES
    queries_t_ptr = start_ptr
    grads_t_ptr = queries_t_ptr + padded_bytes * head_dim
    queries_ptr = grads_t_ptr + padded_bytes * head_dim
    grads_ptr = queries_ptr + context * row_bytes
    grad_queries_ptr = grads_ptr + context * row_bytes
    logsumexp_ptr = grad_queries_ptr + context * row_bytes
    dots_ptr = logsumexp_ptr + padded_bytes
    keys_ptr = dots_ptr + padded_bytes
    scores_ptr = keys_ptr + KEYS * row_bytes
    grad_scores_ptr = scores_ptr + KEYS * scores_row_bytes
    grad_values_ptr = grad_scores_ptr + KEYS * scores_row_bytes
    grad_keys_ptr = grad_values_ptr + KEYS * row_bytes
    end_ptr = -(-(grad_keys_ptr + KEYS * row_bytes) // LINE_BYTES) * LINE_BYTES
    return BackwardMemory(
        queries_t_ptr, grads_t_ptr, queries_ptr, grads_ptr, grad_queries_ptr, logsumexp_ptr,
        dots_ptr, keys_ptr, scores_ptr, grad_scores_ptr, grad_values_ptr, grad_keys_ptr,
        scores_row_bytes, row_bytes, end_ptr,
    )  # fmt: skip
