"""A forward pass written head by head, which leaves out parts of the network."""

from collections.abc import Collection, Sequence

import numpy as np

from nanovllm.model.ablation import Part
from nanovllm.model.activation import ACTIVATIONS
from nanovllm.model.config import ModelConfig
from nanovllm.model.layers import layer_norm
from nanovllm.model.weights import ModelWeights


def forward_without(
    config: ModelConfig, weights: ModelWeights, token_ids: Sequence[int], off: Collection[Part]
) -> np.ndarray:
    """Return the final hidden states, one head after the other; the parts `off` add nothing."""

    def has(layer: int, kind: str, head: int | None = None) -> bool:
        return all((one.layer, one.kind, one.head) != (layer, kind, head) for one in off)

    count, dim = len(token_ids), config.head_dim
    hidden = weights.token_embedding[list(token_ids)] + weights.position_embedding[:count]
    for index, layer in enumerate(weights.layers):
        normed = layer_norm(hidden, layer.attention_norm, config.epsilon)
        qkv = normed @ layer.qkv.weight + layer.qkv.bias
        added = np.tile(layer.out.bias, (count, 1))
        for head in range(config.heads):
            own = slice(head * dim, (head + 1) * dim)
            q, k, v = (part[:, own] for part in np.split(qkv, 3, axis=1))
            scores = q @ k.T * np.float32(config.attention_scale(index))
            scores[np.triu_indices(count, 1)] = -np.inf
            shares = np.exp(scores - scores.max(axis=1, keepdims=True))
            shares /= shares.sum(axis=1, keepdims=True)
            if has(index, "head", head):
                added += shares @ v @ layer.out.weight[own]
        if has(index, "attention") and has(index, "block"):
            hidden = hidden + added
        normed = layer_norm(hidden, layer.ffn_norm, config.epsilon)
        inner = ACTIVATIONS[config.activation](normed @ layer.up.weight + layer.up.bias)
        if has(index, "ffn") and has(index, "block"):
            hidden = hidden + inner @ layer.down.weight + layer.down.bias
    return layer_norm(hidden, weights.final_norm, config.epsilon)
