"""The working memory of attention, in bytes; computed alike by Python and by compiled code."""

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


def attention_layout(
    context: int, head_dim: int, width: int
) -> tuple[int, int, int, int, int, int, int]:
    """Return the offsets of the arrays of attention, their strides and their total size.

    The arrays are, in order and with panels `width` wide:

        K^T      [panels of keys, head_dim, width]
        V        [panels of columns, context, width]
        scores   [QUERIES, context]
        sums     [QUERIES, head_dim]
        factors  [QUERIES]

    Returns:
        Offsets of V, scores, sums and factors, strides of scores and of sums, total.
    """
    row_bytes = -(-head_dim // width) * width * WORD_BYTES
    # Rows a power of two apart would share a set of the cache, and evict each other.
    scores_stride_bytes = -(-context // width) * width * WORD_BYTES + LINE_BYTES
    values = -(-context // width) * width * head_dim * WORD_BYTES
    scores = values + context * row_bytes
    sums = scores + QUERIES * scores_stride_bytes
    factors = sums + QUERIES * row_bytes
    total = factors + -(-QUERIES * WORD_BYTES // LINE_BYTES) * LINE_BYTES
    return values, scores, sums, factors, scores_stride_bytes, row_bytes, total


def attention_backward_layout(
    context: int, head_dim: int, width: int
) -> tuple[int, int, int, int, int, int, int, int, int, int, int]:
    """Return the offsets of the arrays of the backward pass, two strides and the total size.

    The arrays are, in order:

        Q^T, grad_out^T      [panels of queries, head_dim, width]
        Q, grad_out          [panels of columns, context, width]
        grad_Q               [context, head_dim]
        logsumexp, dots      [context]
        K                    [panels of columns, KEYS, width]
        scores, grad_scores  [KEYS, context]
        grad_V, grad_K       [KEYS, head_dim]

    Returns:
        Offsets of grad_out^T, Q, grad_out, grad_Q, logsumexp, dots, K and scores, strides of
        scores and of gradients, total.
    """
    columns = -(-head_dim // width) * width
    queries = -(-context // width) * width
    row_bytes = columns * WORD_BYTES
    scores_stride_bytes = queries * WORD_BYTES + LINE_BYTES
    grads_t = queries * head_dim * WORD_BYTES
    first = 2 * grads_t
    second = first + context * row_bytes
    grad_queries = second + context * row_bytes
    lse = grad_queries + context * row_bytes
    dots = lse + queries * WORD_BYTES
    keys = dots + queries * WORD_BYTES
    scores = keys + KEYS * row_bytes
    total = scores + 2 * KEYS * (scores_stride_bytes + row_bytes)
    return (
        grads_t, first, second, grad_queries, lse, dots, keys, scores,
        scores_stride_bytes, row_bytes, -(-total // LINE_BYTES) * LINE_BYTES,
    )  # fmt: skip
