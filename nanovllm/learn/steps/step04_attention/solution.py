"""Step 4: causal multi-head attention (Vaswani et al. 2017, arXiv:1706.03762, section 3.2)."""

import math

import numpy as np

from nanovllm.model.weights import Linear


def split_heads(rows: np.ndarray, heads: int) -> np.ndarray:
    """Split the columns of each row into heads, the first columns to head 0.

    Args:
        rows: [tokens, d_model].
        heads: divides d_model.

    Returns:
        [heads, tokens, head_dim] with head_dim = d_model / heads.
    """
    tokens, d_model = rows.shape
    return rows.reshape(tokens, heads, d_model // heads).transpose(1, 0, 2)


def merge_heads(rows: np.ndarray) -> np.ndarray:
    """Put the heads side by side again: [heads, tokens, head_dim] to [tokens, d_model]."""
    heads, tokens, head_dim = rows.shape
    return rows.transpose(1, 0, 2).reshape(tokens, heads * head_dim)


def causal_mask(num_queries: int, num_keys: int) -> np.ndarray:
    """Return which keys a query must not see: [num_queries, num_keys], True for a later key.

    Query i is token num_keys - num_queries + i; key j is token j. In this step both numbers are
    equal, so query i is token i; with a KV cache (step 7) there are more keys than queries.
    """
    first = num_keys - num_queries
    return np.triu(np.ones((num_queries, num_keys), dtype=np.bool_), k=first + 1)


def attention_weights(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return softmax(queries keys^T / sqrt(head_dim)); the weight of a later key is 0.

    Subtract the largest score of each row before `np.exp`, so that it cannot overflow.

    Args:
        queries: [heads, queries, head_dim].
        keys: [heads, keys, head_dim].

    Returns:
        [heads, queries, keys], float32; each row sums to 1.
    """
    scores = queries @ keys.transpose(0, 2, 1)
    scores *= np.float32(1 / math.sqrt(queries.shape[2]))
    scores[:, causal_mask(scores.shape[1], scores.shape[2])] = -np.inf
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    return weights


def attention(queries: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the mean of the values by the attention weights of each query.

    Args:
        queries: [heads, queries, head_dim].
        keys, values: [heads, keys, head_dim].

    Returns:
        [heads, queries, head_dim].
    """
    return attention_weights(queries, keys) @ values


def self_attention(hidden: np.ndarray, qkv: Linear, out: Linear, heads: int) -> np.ndarray:
    """Project to queries, keys and values, attend with each head, and project back.

    A linear layer is `rows @ layer.weight + layer.bias`. The columns of `qkv` are the queries of
    all heads, then the keys of all heads, then the values.

    Args:
        hidden: [tokens, d_model], after the layer normalization.
        qkv: from d_model to 3 d_model.
        out: from d_model to d_model.
        heads: number of heads.

    Returns:
        [tokens, d_model].
    """
    queries, keys, values = np.split(hidden @ qkv.weight + qkv.bias, 3, axis=1)
    heads_out = attention(
        split_heads(queries, heads), split_heads(keys, heads), split_heads(values, heads)
    )
    return merge_heads(heads_out) @ out.weight + out.bias
