"""The parts of the forward pass of Llama (Touvron et al. 2023, arXiv:2302.13971) and its relatives;
families/forward.py composes them.

    embed           token_embedding[token_ids]
    self_attention  attention(turn(queries), turn(keys), values) @ out, all three of hidden @ qkv
    feed_forward    (activation(hidden @ gate) * (hidden @ up)) @ down

What differs from GPT-2: positions that turn queries and keys instead of an embedding; keys and
values that several query heads share; a gate in the feed-forward block; norms without mean and
bias; and few biases or none.
"""

import numpy as np
from jaxtyping import Float32, Int64

from nanovllm.model.activation import ACTIVATIONS
from nanovllm.model.attention import paged_attention
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.config import ModelConfig
from nanovllm.model.kv_cache import KVCache
from nanovllm.model.layers import linear, rms_norm
from nanovllm.model.observer import Observer
from nanovllm.model.rotary import turn
from nanovllm.model.weights import Layer, Linear, ModelWeights


def embed(
    weights: ModelWeights,
    token_ids: Int64[np.ndarray, " tokens"],
    _positions: Int64[np.ndarray, " tokens"],
) -> Float32[np.ndarray, "tokens d_model"]:
    """Return each token's embedding; positions come in later (`self_attention`)."""
    return weights.token_embedding[token_ids]


def self_attention(
    config: ModelConfig,
    weights: Layer[Linear],
    layer: int,
    hidden: Float32[np.ndarray, "tokens d_model"],
    batch: ForwardBatch,
    cache: KVCache,
    observe: Observer,
) -> Float32[np.ndarray, "tokens d_model"]:
    """Project to queries, keys and values; turn queries and keys; attend; project back.

    Qwen3 normalizes each head's query and key before they are turned.
    """
    observe("attention_input", layer, hidden)
    qkv = linear(hidden, weights.qkv)
    ends = np.cumsum([config.queries_width, config.keys_width])
    queries, keys, values = (
        part.reshape(batch.tokens, -1, config.head_dim) for part in np.split(qkv, ends, axis=1)
    )
    if weights.query_gain is not None and weights.key_gain is not None:
        queries = rms_norm(queries, weights.query_gain, config.epsilon)
        keys = rms_norm(keys, weights.key_gain, config.epsilon)
    assert config.rotary is not None
    angles = config.rotary.angles(batch.positions, config.head_dim)
    queries, keys = turn(queries, angles), turn(keys, angles)
    observe("queries", layer, queries)
    observe("keys", layer, keys)
    observe("values", layer, values)
    cache.write(layer, batch.slots, keys, values)
    scale = config.attention_scale(layer)
    attn_out = paged_attention(queries, cache, layer, batch, scale, observe, config.window)
    attn_out = attn_out.reshape(batch.tokens, config.queries_width)  # the heads side by side
    observe("attn_out", layer, attn_out)
    return linear(attn_out, weights.out)


def feed_forward(
    config: ModelConfig,
    weights: Layer[Linear],
    layer: int,
    hidden: Float32[np.ndarray, "tokens d_model"],
    observe: Observer,
) -> Float32[np.ndarray, "tokens d_model"]:
    """Return (activation(hidden @ gate) * (hidden @ up)) @ down (arXiv:2002.05202)."""
    observe("ffn_input", layer, hidden)
    gate, up = np.split(linear(hidden, weights.up), 2, axis=1)  # each [tokens, d_ff]
    ffn_hidden = ACTIVATIONS[config.activation](gate) * up
    observe("ffn_hidden", layer, ffn_hidden)
    return linear(ffn_hidden, weights.down)
