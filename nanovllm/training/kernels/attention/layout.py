"""The working memory of attention: fields of the records that Python computes. Needs no Numba."""

from itertools import accumulate
from typing import Any

from nanovllm.model.kernels.build.layout import LINE_BYTES, WORD_BYTES
from nanovllm.model.kernels.build.packing import round_up
from nanovllm.model.kernels.build.target import KernelTarget

QUERIES = 24
"""Queries that attention computes together."""
KEYS = 24
"""Keys that the backward pass computes together."""
PANEL_VECTORS = 2


def panel_width(target: KernelTarget) -> int:
    """Return the columns of a panel."""
    return PANEL_VECTORS * target.lanes


def count_heads(record: Any) -> int:
    """Return the items of attention, in compiled code: the heads of all sequences."""
    return int(record.batch * record.heads)


def forward_memory(context: int, head_dim: int, width: int) -> dict[str, int]:
    """Return the layout of a head's arrays, with panels `width` wide, by fields of the record.

    keys     K^T [panels of keys, head_dim, width]
    values   V [panels of columns, context, width]
    scores   [QUERIES, context], `scores_row_bytes` from one row to the next
    sums     [QUERIES, head_dim], `row_bytes` from one row to the next
    factors  [QUERIES]
    """
    columns_bytes, row_bytes, scores_row_bytes = _row_bytes(context, head_dim, width)
    return _layout(
        row_bytes,
        scores_row_bytes,
        keys=columns_bytes * head_dim,
        values=context * row_bytes,
        scores=QUERIES * scores_row_bytes,
        sums=QUERIES * row_bytes,
        factors=QUERIES * WORD_BYTES,
    )


def backward_memory(context: int, head_dim: int, width: int) -> dict[str, int]:
    """Return the layout of a head's arrays in the backward pass, as `forward_memory` does.

    queries_t, grads_t       Q^T and grad_out^T [panels of queries, head_dim, width]
    queries, grads           Q and grad_out [panels of columns, context, width]
    grad_queries             [context, head_dim]
    logsumexp, dots          [context]
    keys                     K [panels of columns, KEYS, width]
    scores, grad_scores      [KEYS, context]
    grad_values, grad_keys   [KEYS, head_dim]
    """
    columns_bytes, row_bytes, scores_row_bytes = _row_bytes(context, head_dim, width)
    return _layout(
        row_bytes,
        scores_row_bytes,
        queries_t=columns_bytes * head_dim,
        grads_t=columns_bytes * head_dim,
        queries=context * row_bytes,
        grads=context * row_bytes,
        grad_queries=context * row_bytes,
        logsumexp=columns_bytes,
        dots=columns_bytes,
        keys=KEYS * row_bytes,
        scores=KEYS * scores_row_bytes,
        grad_scores=KEYS * scores_row_bytes,
        grad_values=KEYS * row_bytes,
        grad_keys=KEYS * row_bytes,
    )


def _row_bytes(context: int, head_dim: int, width: int) -> tuple[int, int, int]:
    """Return the bytes of `context` columns in whole panels, of a row of a head, and of scores."""
    columns_bytes = round_up(context, width) * WORD_BYTES
    # Rows a power of two apart would share a set of the cache, and evict each other.
    return columns_bytes, round_up(head_dim, width) * WORD_BYTES, columns_bytes + LINE_BYTES


def _layout(row_bytes: int, scores_row_bytes: int, **sizes: int) -> dict[str, int]:
    """Return the offset of each array, one after another, and the bytes of all."""
    ends = list(accumulate(sizes.values()))
    offsets = {
        f"{name}_offset": end - size for (name, size), end in zip(sizes.items(), ends, strict=True)
    }
    return {
        **offsets,
        "row_bytes": row_bytes,
        "scores_row_bytes": scores_row_bytes,
        "scratch_bytes": round_up(ends[-1], LINE_BYTES),
    }
