"""The GPT-2 forward pass (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"), whole, in the order in
which it happens. This is the specification; every other implementation is tested against it.

    hidden = token embedding + position embedding
    for each layer:
        hidden += attention(layer_norm(hidden))
        hidden += feed_forward(layer_norm(hidden))
    logits = layer_norm(hidden) @ head^T          only for the rows that are asked for
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from nanovllm.model.activation import ACTIVATIONS
from nanovllm.model.attention import Attend, attend, attend_by_rows, paged_attention
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.config import GPT2Config
from nanovllm.model.embedding import embed
from nanovllm.model.ffn import feed_forward
from nanovllm.model.kv_cache import KVCache
from nanovllm.model.layernorm import layer_norm
from nanovllm.model.linear import Product, linear, product, product_by_rows
from nanovllm.model.weights import AttentionWeights, GPT2Weights


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How products and attention are taken: the choice between speed and bits that never depend on the batch."""

    product: Product
    attend: Attend


FAST = Arithmetic(product, attend)
BATCH_INVARIANT = Arithmetic(product_by_rows, attend_by_rows)


@np.errstate(over="ignore", invalid="ignore")  # a sequence that overflows may be beside sound ones
def forward(
    config: GPT2Config,
    weights: GPT2Weights,
    batch: ForwardBatch,
    cache: KVCache,
    arithmetic: Arithmetic = FAST,
) -> Float32[np.ndarray, "rows d_model"]:
    """Compute a batch: writes its keys and values into the cache, returns the final hidden state of `batch.logit_rows`."""
    activation = ACTIVATIONS[config.activation]
    hidden = embed(weights, batch.token_ids, batch.positions)
    for index, layer in enumerate(weights.layers):
        normed = layer_norm(
            hidden, layer.attention_norm.gain, layer.attention_norm.bias, config.epsilon
        )
        hidden += self_attention(config, layer.attention, index, normed, batch, cache, arithmetic)
        normed = layer_norm(hidden, layer.ffn_norm.gain, layer.ffn_norm.bias, config.epsilon)
        hidden += feed_forward(normed, layer.ffn, activation, arithmetic.product)
    return layer_norm(
        hidden[batch.logit_rows], weights.final_norm.gain, weights.final_norm.bias, config.epsilon
    )


def self_attention(
    config: GPT2Config,
    weights: AttentionWeights,
    layer: int,
    hidden: Float32[np.ndarray, "tokens d_model"],
    batch: ForwardBatch,
    cache: KVCache,
    arithmetic: Arithmetic,
) -> Float32[np.ndarray, "tokens d_model"]:
    """One layer's attention: project, store keys and values, attend, project back."""
    qkv = linear(hidden, weights.qkv, arithmetic.product)
    queries, keys, values = qkv.reshape(batch.tokens, 3, config.heads, config.head_dim).transpose(
        1, 0, 2, 3
    )
    cache.write(layer, batch.slots, keys, values)
    mixed = paged_attention(
        queries, cache, layer, batch, config.attention_scale(layer), arithmetic.attend
    )
    return linear(mixed.reshape(batch.tokens, config.d_model), weights.out, arithmetic.product)


@np.errstate(over="ignore", invalid="ignore")
def logits(
    weights: GPT2Weights, hidden: Float32[np.ndarray, "rows d_model"], arithmetic: Arithmetic = FAST
) -> Float32[np.ndarray, "rows vocab"]:
    """Each word's score at each row of final hidden states."""
    return arithmetic.product(hidden, weights.head.T)
