"""The forward pass of every family, in NumPy.

    hidden = embed(token_ids, positions)
    for each layer:
        hidden = hidden + self_attention(norm(hidden))
        hidden = hidden + feed_forward(norm(hidden))
    return norm(hidden[logit_rows])

What differs between families is in their network.py (embed, self_attention and feed_forward) and in
`ModelConfig.norm`. `logits` (layers.py) turns the final hidden states into scores of tokens. These
files are the specification: every other implementation is tested against them.
"""

import numpy as np
from jaxtyping import Float32

from nanovllm.model.batch import ForwardBatch
from nanovllm.model.config import ModelConfig
from nanovllm.model.families.registry import family_of
from nanovllm.model.kv_cache import KVCache
from nanovllm.model.layers import normalize
from nanovllm.model.observer import Observer, ignore
from nanovllm.model.weights import Layer, Linear, ModelWeights


@np.errstate(over="ignore", invalid="ignore")  # one sequence may overflow, others be sound
def forward(
    config: ModelConfig,
    weights: ModelWeights,
    batch: ForwardBatch,
    cache: KVCache,
    observe: Observer = ignore,
) -> Float32[np.ndarray, "rows d_model"]:
    """Return the final hidden state of each of `batch.logit_rows`.

    The keys and values of the batch's tokens are written to the cache.
    """
    hidden = embed(config, weights, batch)
    observe("embeddings", None, hidden)
    for layer, layer_weights in enumerate(weights.layers):
        hidden = block(config, layer_weights, layer, hidden, batch, cache, observe)
    final_hidden = normalize(config, hidden[batch.logit_rows], weights.final_norm)
    observe("final_hidden", None, final_hidden)
    return final_hidden


def embed(
    config: ModelConfig, weights: ModelWeights, batch: ForwardBatch
) -> Float32[np.ndarray, "tokens d_model"]:
    """Return the residual stream of a batch before the first layer."""
    return family_of(config).network.embed(weights, batch.token_ids, batch.positions)


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
    network = family_of(config).network
    normed = normalize(config, hidden, weights.attention_norm)
    hidden = hidden + network.self_attention(config, weights, layer, normed, batch, cache, observe)
    observe("hidden_after_attention", layer, hidden)
    normed = normalize(config, hidden, weights.ffn_norm)
    hidden = hidden + network.feed_forward(config, weights, layer, normed, observe)
    observe("hidden_after_ffn", layer, hidden)
    return hidden
