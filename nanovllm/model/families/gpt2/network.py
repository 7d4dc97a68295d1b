"""The parts of GPT-2's forward pass (Radford et al. 2019, "Language Models are Unsupervised
Multitask Learners"); families/forward.py composes them.

    embed           token_embedding[token_ids] + position_embedding[positions]
    self_attention  attention(queries, keys, values) @ out, all three of hidden @ qkv
    feed_forward    activation(hidden @ up) @ down

Every linear layer has a bias, and norms are layer norms.
"""

import numpy as np
from jaxtyping import Float32, Int64

from nanovllm.model.activation import ACTIVATIONS
from nanovllm.model.attention import paged_attention
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.config import ModelConfig
from nanovllm.model.kv_cache import KVCache
from nanovllm.model.layers import linear
from nanovllm.model.observer import Observer
from nanovllm.model.weights import Layer, Linear, ModelWeights


def embed(
    weights: ModelWeights,
    token_ids: Int64[np.ndarray, " tokens"],
    positions: Int64[np.ndarray, " tokens"],
) -> Float32[np.ndarray, "tokens d_model"]:
    """Return the sum of each token's embedding and its position's."""
    return weights.token_embedding[token_ids] + weights.position_embedding[positions]


def self_attention(
    config: ModelConfig,
    weights: Layer[Linear],
    layer: int,
    hidden: Float32[np.ndarray, "tokens d_model"],
    batch: ForwardBatch,
    cache: KVCache,
    observe: Observer,
) -> Float32[np.ndarray, "tokens d_model"]:
    """Project to queries, keys and values; store keys and values; attend; project back."""
    observe("attention_input", layer, hidden)
    qkv = linear(hidden, weights.qkv)  # [tokens, 3 * d_model]
    qkv = qkv.reshape(batch.tokens, 3, config.heads, config.head_dim)
    queries, keys, values = qkv.transpose(1, 0, 2, 3)  # each [tokens, heads, head_dim]
    observe("queries", layer, queries)
    observe("keys", layer, keys)
    observe("values", layer, values)
    cache.write(layer, batch.slots, keys, values)
    attn_out = paged_attention(queries, cache, layer, batch, config.attention_scale(layer), observe)
    attn_out = attn_out.reshape(batch.tokens, config.d_model)  # the heads side by side
    observe("attn_out", layer, attn_out)
    return linear(attn_out, weights.out)


def feed_forward(
    config: ModelConfig,
    weights: Layer[Linear],
    layer: int,
    hidden: Float32[np.ndarray, "tokens d_model"],
    observe: Observer,
) -> Float32[np.ndarray, "tokens d_model"]:
    """Return activation(hidden @ up + bias) @ down + bias."""
    observe("ffn_input", layer, hidden)
    activation = ACTIVATIONS[config.activation]
    ffn_hidden = activation(linear(hidden, weights.up))  # [tokens, d_ff]
    observe("ffn_hidden", layer, ffn_hidden)
    return linear(ffn_hidden, weights.down)
