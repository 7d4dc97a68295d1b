"""Causal multi-head attention over the paged KV cache (Vaswani et al. 2017, arXiv:1706.03762,
section 3.2).

    scores  = scale * Q K^T          a query sees the keys up to its own position
    weights = softmax(scores)
    output  = weights V

The queries of a sequence are its last tokens: the last query stands at the last key. A head of keys
and values may serve several query heads (Ainslie et al. 2023, arXiv:2305.13245), and a query may
see only a window of the last keys (Child et al. 2019, arXiv:1904.10509).
"""

import numpy as np
from jaxtyping import Float32

from nanovllm.model.batch import ForwardBatch
from nanovllm.model.kv_cache import KVCache
from nanovllm.model.observer import Observer


def paged_attention(
    queries: Float32[np.ndarray, "tokens heads head_dim"],
    cache: KVCache,
    layer: int,
    batch: ForwardBatch,
    scale: float,
    observe: Observer,
    window: int | None = None,
) -> Float32[np.ndarray, "tokens heads head_dim"]:
    """Attend from every token of a batch to its own sequence, found through its block table."""
    out = np.empty(queries.shape, dtype=np.float32)
    for seq in range(batch.seqs):
        rows = slice(batch.query_starts[seq], batch.query_starts[seq + 1])
        keys, values = cache.gather(layer, batch.block_tables[seq], int(batch.context_lens[seq]))
        sharing = queries.shape[1] // keys.shape[1]  # query heads to a head of keys and values
        if sharing > 1:
            keys, values = keys.repeat(sharing, axis=1), values.repeat(sharing, axis=1)
        scores = attention_scores(queries[rows], keys, scale, window)
        observe("attention_scores", layer, scores)
        weights = softmax(scores)
        observe("attention_weights", layer, weights)
        out[rows] = weighted_sum(weights, values, window)
    return out


def attention_scores(
    queries: Float32[np.ndarray, "queries heads head_dim"],
    keys: Float32[np.ndarray, "context heads head_dim"],
    scale: float,
    window: int | None = None,
) -> Float32[np.ndarray, "heads queries context"]:
    """Return scale * Q K^T; a key after its query, or before its window, has the score -inf."""
    scores = queries.transpose(1, 0, 2) @ keys.transpose(1, 2, 0)  # [heads, queries, context]
    scores *= np.float32(scale)
    first = len(keys) - len(queries)  # position of the first query
    is_future = np.triu(np.ones(scores.shape[1:], dtype=np.bool_), k=first + 1)
    np.copyto(scores, -np.inf, where=is_future)
    if window is not None and window < len(keys):
        is_past = np.tril(np.ones(scores.shape[1:], dtype=np.bool_), k=first - window)
        np.copyto(scores, -np.inf, where=is_past)
    return scores


def softmax(
    scores: Float32[np.ndarray, "heads queries context"],
) -> Float32[np.ndarray, "heads queries context"]:
    """Return exp(scores) divided by its sum over the keys: the weight of a score of -inf is 0.

    The largest score is subtracted first, so that no exp overflows.
    """
    weights = scores - scores.max(axis=2, keepdims=True)
    np.exp(weights, out=weights)
    weights /= weights.sum(axis=2, keepdims=True, dtype=np.float32)
    return weights


def weighted_sum(
    weights: Float32[np.ndarray, "heads queries context"],
    values: Float32[np.ndarray, "context heads head_dim"],
    window: int | None = None,
) -> Float32[np.ndarray, "queries heads head_dim"]:
    """Return weights V.

    A value that a query does not see has the weight 0, but 0 * NaN is NaN. Where the output is not
    finite, each query is therefore computed again from the values that it sees.
    """
    values = values.transpose(1, 0, 2)  # [heads, context, head_dim]
    out = weights @ values  # [heads, queries, head_dim]
    if not np.isfinite(out).all():
        first = weights.shape[2] - weights.shape[1]
        for query in range(weights.shape[1]):
            end = first + query + 1
            seen = slice(0 if window is None else max(0, end - window), end)
            out[:, [query]] = weights[:, [query], seen] @ values[:, seen]
    return out.transpose(1, 0, 2)  # [queries, heads, head_dim]
