"""Causal multi-head attention over the paged KV cache (Vaswani et al. 2017, arXiv:1706.03762, section 3.2).

    scores  = scale * Q K^T           a query sees keys up to its own position
    weights = softmax(scores)
    output  = weights V

`attend` computes one sequence with whole-context products. `attend_in_tiles` computes the same with products of one fixed shape
(16 queries by one block of keys), so that its bits depend on nothing but the sequence itself.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float32

from nanovllm.model.batch import ForwardBatch
from nanovllm.model.kv_cache import KVCache
from nanovllm.model.linear import TILE_ROWS

QUERY_TILE = 64  # rows whose scores fit the cache together; a causal tile reads no key past its last query
KEY_TILE = 32

Queries = Float32[np.ndarray, "queries heads head_dim"]
Context = Float32[np.ndarray, "context heads head_dim"]
Attend = Callable[[Queries, Context, Context, float], Queries]


def paged_attention(
    queries: Float32[np.ndarray, "tokens heads head_dim"], cache: KVCache, layer: int, batch: ForwardBatch, scale: float, attend: Attend
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
        scores = queries[start:stop].transpose(1, 0, 2) @ keys[:visible].transpose(1, 2, 0)  # [heads, queries, visible]
        scores *= np.float32(scale)
        if stop - start > 1:
            _hide_future(scores)
        scores -= scores.max(axis=2, keepdims=True)
        weights = np.exp(scores, out=scores)
        total = weights.sum(axis=2, keepdims=True, dtype=np.float32)
        mixed = weights @ values[:visible].transpose(1, 0, 2)  # [heads, queries, head_dim]
        mixed /= total
        out[start:stop] = mixed.transpose(1, 0, 2)
    return out


def _hide_future(scores: Float32[np.ndarray, "heads queries visible"]) -> None:
    """Set scores of keys after each query to minus infinity, in place; only the last square of the tile has any."""
    count = scores.shape[1]
    future = np.triu(np.ones((count, count), dtype=np.bool_), k=1)
    scores[:, :, scores.shape[2] - count :][:, future] = -np.inf


def attend_in_tiles(queries: Queries, keys: Context, values: Context, scale: float) -> Queries:
    """`attend` with bits that do not depend on how many queries are asked at once, nor on what the batch holds besides.

    Scores are taken 16 queries by one block of keys at a time; sums over the context run block after block. A block that a query
    does not see adds exactly zero, so the length of the context beside it changes nothing.
    """
    count, heads, head_dim = queries.shape
    first = keys.shape[0] - count
    blocks = -(-keys.shape[0] // KEY_TILE)
    padding = ((0, blocks * KEY_TILE - keys.shape[0]), (0, 0), (0, 0))
    keys = np.ascontiguousarray(np.pad(keys, padding).reshape(blocks, KEY_TILE, heads, head_dim).transpose(0, 2, 3, 1))
    values = np.ascontiguousarray(np.pad(values, padding).reshape(blocks, KEY_TILE, heads, head_dim).transpose(0, 2, 1, 3))
    out = np.empty((count, heads, head_dim), dtype=np.float32)
    for start in range(0, count, TILE_ROWS):
        used = min(TILE_ROWS, count - start)
        tile = np.zeros((heads, TILE_ROWS, head_dim), dtype=np.float32)
        tile[:, :used] = queries[start : start + used].transpose(1, 0, 2)
        position = np.arange(first + start, first + start + TILE_ROWS, dtype=np.int64)
        mixed = _attend_tile(tile, position, keys, values, scale)
        out[start : start + used] = mixed[:, :used].transpose(1, 0, 2)
    return out


def _attend_tile(
    tile: Float32[np.ndarray, "heads rows head_dim"],
    position: np.ndarray,
    keys: Float32[np.ndarray, "blocks heads head_dim key_tile"],
    values: Float32[np.ndarray, "blocks heads key_tile head_dim"],
    scale: float,
) -> Float32[np.ndarray, "heads rows head_dim"]:
    """One tile of queries against every block in turn; `position` is each row's place in the sequence."""
    heads, rows, head_dim = tile.shape
    scores = np.empty((len(keys), heads, rows, KEY_TILE), dtype=np.float32)
    for block in range(len(keys)):
        np.matmul(tile, keys[block], out=scores[block])
        scores[block] *= np.float32(scale)
        place = block * KEY_TILE + np.arange(KEY_TILE, dtype=np.int64)
        scores[block][:, place[None, :] > position[:, None]] = -np.inf
    best = scores.max(axis=(0, 3))[:, :, None]
    total = np.zeros((heads, rows, 1), dtype=np.float32)
    mixed = np.zeros((heads, rows, head_dim), dtype=np.float32)
    for block in range(len(keys)):
        weights = np.exp(scores[block] - best)
        total += weights.sum(axis=2, keepdims=True, dtype=np.float32)
        mixed += weights @ values[block]
    mixed /= total
    return mixed
