"""Step 7: the KV cache, which keeps the keys and values of the tokens that are computed."""

import numpy as np

from nanovllm.learn.steps.step02_logits.solution import embed, logits
from nanovllm.learn.steps.step03_layer_norm.solution import layer_norm
from nanovllm.learn.steps.step04_attention.solution import attention, merge_heads, split_heads
from nanovllm.learn.steps.step05_forward.solution import feed_forward, linear
from nanovllm.learn.steps.step06_sampling.solution import greedy
from nanovllm.model.weights import Layer, Linear, ModelWeights


class KVCache:
    """Keys and values of one sequence, in the order of its tokens.

    Attributes:
        num_tokens: tokens whose keys and values every layer has.
    """

    def __init__(self, layers: int, heads: int, head_dim: int, max_tokens: int) -> None:
        """Start without tokens, with memory for `max_tokens` in float32."""
        shape = (layers, heads, max_tokens, head_dim)
        self._keys = np.zeros(shape, dtype=np.float32)
        self._values = np.zeros(shape, dtype=np.float32)
        self._lengths = [0] * layers  # tokens of each layer

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values every layer has."""
        return min(self._lengths)

    def append(self, layer: int, keys: np.ndarray, values: np.ndarray) -> None:
        """Store keys and values of new tokens behind those that the layer has.

        Args:
            layer: number of the layer, from 0.
            keys, values: [heads, new tokens, head_dim].

        Raises:
            ValueError: more than `max_tokens` tokens; nothing is stored.
        """
        start = self._lengths[layer]
        end = start + keys.shape[1]
        if end > self._keys.shape[2]:
            raise ValueError(f"{end} tokens do not fit; the cache has {self._keys.shape[2]}")
        self._keys[layer, :, start:end] = keys
        self._values[layer, :, start:end] = values
        self._lengths[layer] = end

    def read(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the layer's keys and values, each [heads, tokens, head_dim]."""
        end = self._lengths[layer]
        return self._keys[layer, :, :end], self._values[layer, :, :end]


def cached_attention(
    hidden: np.ndarray, layer: Layer[Linear], index: int, heads: int, cache: KVCache
) -> np.ndarray:
    """Return `self_attention` of new tokens, which also see the tokens of the cache.

    Store the keys and values of the new tokens, then attend to all that the layer has.

    Args:
        hidden: [new tokens, d_model], after the layer normalization.
        layer: `layer.qkv` and `layer.out` are used.
        index: number of the layer in the cache, from 0.
        heads: number of heads.
        cache: holds the tokens before these; the new ones are added.

    Returns:
        [new tokens, d_model].
    """
    queries, keys, values = np.split(linear(hidden, layer.qkv), 3, axis=1)
    cache.append(index, split_heads(keys, heads), split_heads(values, heads))
    all_keys, all_values = cache.read(index)
    heads_out = attention(split_heads(queries, heads), all_keys, all_values)
    return linear(merge_heads(heads_out), layer.out)


def forward(
    token_ids: np.ndarray, weights: ModelWeights, heads: int, epsilon: float, cache: KVCache
) -> np.ndarray:
    """Return the logits of the new tokens of a text, and add these tokens to the cache.

    Args:
        token_ids: [new tokens], integers; those that follow the tokens of the cache.
        weights: of the network.
        heads: number of heads.
        epsilon: of the layer normalizations.
        cache: holds the tokens before these; empty for the beginning of a text.

    Returns:
        [new tokens, vocab].
    """
    positions = cache.num_tokens + np.arange(len(token_ids))
    hidden = embed(token_ids, positions, weights.token_embedding, weights.position_embedding)
    for index, layer in enumerate(weights.layers):
        norm = layer.attention_norm
        normed = layer_norm(hidden, norm.gain, norm.bias, epsilon)
        hidden = hidden + cached_attention(normed, layer, index, heads, cache)
        normed = layer_norm(hidden, layer.ffn_norm.gain, layer.ffn_norm.bias, epsilon)
        hidden = hidden + feed_forward(normed, layer.up, layer.down)
    norm = weights.final_norm
    return logits(layer_norm(hidden, norm.gain, norm.bias, epsilon), weights.head)


def generate(
    prompt_ids: list[int],
    weights: ModelWeights,
    heads: int,
    epsilon: float,
    max_new_tokens: int,
) -> list[int]:
    """Return the tokens that follow a prompt, each the most probable one.

    The prompt is computed in one call of `forward`, every new token in one more. The last token is
    returned and not computed: nothing follows it.

    Args:
        prompt_ids: at least one token.
        weights: of the network.
        heads: number of heads.
        epsilon: of the layer normalizations.
        max_new_tokens: number of tokens to return.

    Returns:
        `max_new_tokens` tokens, without the prompt.
    """
    head_dim = weights.token_embedding.shape[1] // heads
    cache = KVCache(len(weights.layers), heads, head_dim, len(prompt_ids) + max_new_tokens)
    tokens: list[int] = []
    new = prompt_ids
    while len(tokens) < max_new_tokens:
        rows = forward(np.array(new), weights, heads, epsilon, cache)
        tokens.append(greedy(rows[-1]))
        new = tokens[-1:]
    return tokens
