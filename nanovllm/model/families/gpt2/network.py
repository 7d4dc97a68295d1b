"""The GPT-2 forward pass (Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners").

    hidden = token_embedding[token_ids] + position_embedding[positions]
    for each layer:
        hidden = hidden + self_attention(layer_norm(hidden))
        hidden = hidden + feed_forward(layer_norm(hidden))
    return layer_norm(hidden[logit_rows])

`logits` (layers.py) turns these final hidden states into scores of tokens. This file is the
specification: every other implementation is tested against it.
"""

import numpy as np
from jaxtyping import Float32, Int64

from nanovllm.model.activation import ACTIVATIONS
from nanovllm.model.attention import paged_attention
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.config import ModelConfig
from nanovllm.model.kv_cache import KVCache
from nanovllm.model.layers import layer_norm, linear
from nanovllm.model.observer import Observer, ignore
from nanovllm.model.weights import Layer, Linear, ModelWeights


@np.errstate(over="ignore", invalid="ignore")  # one sequence may overflow, others be sound
def forward(
    config: ModelConfig,
    weights: ModelWeights,
    batch: ForwardBatch,
    cache: KVCache,
    observe: Observer | None = None,
) -> Float32[np.ndarray, "rows d_model"]:
    """Return the final hidden state of each of `batch.logit_rows`.

    The keys and values of the batch's tokens are written to the cache.
    """
    observe = ignore if observe is None else observe
    hidden = embed(weights, batch.token_ids, batch.positions)
    observe("embeddings", None, hidden)
    for layer, layer_weights in enumerate(weights.layers):
        hidden = block(config, layer_weights, layer, hidden, batch, cache, observe)
    final_hidden = layer_norm(hidden[batch.logit_rows], weights.final_norm, config.epsilon)
    observe("final_hidden", None, final_hidden)
    return final_hidden


def block(
    config: ModelConfig,
    weights: Layer[Linear],
    layer: int,
    hidden: Float32[np.ndarray, "tokens d_model"],
    batch: ForwardBatch,
    cache: KVCache,
    observe: Observer,
) -> Float32[np.ndarray, "tokens d_model"]:
    """Return the residual stream after attention and the feed-forward network of one layer."""
    normed = layer_norm(hidden, weights.attention_norm, config.epsilon)
    hidden = hidden + self_attention(config, weights, layer, normed, batch, cache, observe)
    observe("hidden_after_attention", layer, hidden)
    normed = layer_norm(hidden, weights.ffn_norm, config.epsilon)
    hidden = hidden + feed_forward(config, weights, layer, normed, observe)
    observe("hidden_after_ffn", layer, hidden)
    return hidden


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
