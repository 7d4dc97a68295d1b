"""Causal multi-head attention over the paged KV cache (Vaswani et al. 2017, arXiv:1706.03762, section 3.2).

    scores  = scale * Q K^T           a query sees keys up to its own position
    weights = softmax(scores)
    output  = weights V

`attend` takes the queries of a sequence in tiles. `attend_by_rows` takes them one by one, so that a query's bits do not depend on how
many are asked at once.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float32

from nanovllm.model.batch import ForwardBatch
from nanovllm.model.kv_cache import KVCache

QUERY_TILE = (
    64  # rows whose scores fit the cache together; a causal tile reads no key past its last query
)

Queries = Float32[np.ndarray, "queries heads head_dim"]
Context = Float32[np.ndarray, "context heads head_dim"]
Attend = Callable[[Queries, Context, Context, float], Queries]


def paged_attention(
    queries: Float32[np.ndarray, "tokens heads head_dim"],
    cache: KVCache,
    layer: int,
    batch: ForwardBatch,
    scale: float,
    attend: Attend,
) -> Float32[np.ndarray, "tokens heads head_dim"]:
    """Attention of every token of a batch to its own sequence, whose keys and values are found through its block table."""
    out = np.empty(queries.shape, dtype=np.float32)
    for seq in range(batch.seqs):
        rows = slice(batch.query_starts[seq], batch.query_starts[seq + 1])
        keys, values = cache.gather(layer, batch.block_tables[seq], int(batch.context_lens[seq]))
        out[rows] = attend(queries[rows], keys, values, scale)
    return out


def attend(queries: Queries, keys: Context, values: Context, scale: float) -> Queries:
    """Attention of a sequence's last tokens to all of its tokens; the last query stands at the last key."""
    count, context = queries.shape[0], keys.shape[0]
    out = np.empty(queries.shape, dtype=np.float32)
    for start in range(0, count, QUERY_TILE):
        stop = min(start + QUERY_TILE, count)
        visible = context - count + stop  # keys that the tile's last query sees
        scores = queries[start:stop].transpose(1, 0, 2) @ keys[:visible].transpose(
            1, 2, 0
        )  # [heads, queries, visible]
        scores *= np.float32(scale)
        if stop - start > 1:
            _hide_future(scores)
        scores -= scores.max(axis=2, keepdims=True)
        weights = np.exp(scores, out=scores)
        total = weights.sum(axis=2, keepdims=True, dtype=np.float32)
        mixed = weights @ values[:visible].transpose(1, 0, 2)  # [heads, queries, head_dim]
        if stop - start > 1 and not np.isfinite(mixed).all():
            mixed = _mix_alone(weights, values[:visible])
        mixed /= total
        out[start:stop] = mixed.transpose(1, 0, 2)
    return out


def _hide_future(scores: Float32[np.ndarray, "heads queries visible"]) -> None:
    """Set scores of keys after each query to minus infinity, in place; only the last square of the tile has any."""
    count = scores.shape[1]
    future = np.triu(np.ones((count, count), dtype=np.bool_), k=1)
    scores[:, :, scores.shape[2] - count :][:, future] = -np.inf


def _mix_alone(
    weights: Float32[np.ndarray, "heads queries visible"], values: Context
) -> Float32[np.ndarray, "heads queries head_dim"]:
    """weights V, each query over the values that it sees: a weight of 0 times a later NaN would be NaN."""
    heads, count, visible = weights.shape
    mixed = np.empty((heads, count, values.shape[2]), dtype=np.float32)
    for row in range(count):
        seen = visible - count + row + 1
        product = weights[:, row : row + 1, :seen] @ values[:seen].transpose(1, 0, 2)
        mixed[:, row] = product[:, 0]
    return mixed


def attend_by_rows(queries: Queries, keys: Context, values: Context, scale: float) -> Queries:
    """`attend` with bits that depend on nothing but the query and the tokens before it: one query at a time, over what it sees."""
    count, context = queries.shape[0], keys.shape[0]
    out = np.empty(queries.shape, dtype=np.float32)
    for row in range(count):
        visible = context - count + row + 1
        out[row] = attend(queries[row : row + 1], keys[:visible], values[:visible], scale)[0]
    return out
