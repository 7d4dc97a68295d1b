"""Step 5: a transformer block and GPT-2's forward pass (Radford et al. 2019)."""

import math

import numpy as np

from nanovllm.learn.steps.step02_logits.solution import embed, logits
from nanovllm.learn.steps.step03_layer_norm.solution import layer_norm
from nanovllm.learn.steps.step04_attention.solution import self_attention
from nanovllm.model.weights import Layer, Linear, ModelWeights


def linear(rows: np.ndarray, layer: Linear) -> np.ndarray:
    """Return rows @ weight + bias.

    Args:
        rows: [tokens, d_in].
        layer: `layer.weight` is [d_in, d_out], `layer.bias` is [d_out].

    Returns:
        [tokens, d_out].
    """
    return rows @ layer.weight + layer.bias


def gelu(rows: np.ndarray) -> np.ndarray:
    """Return 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) of each element x.

    It must not change `rows`.
    """
    inner = math.sqrt(2.0 / math.pi) * (rows + 0.044715 * rows * rows * rows)
    return (np.tanh(inner) + 1.0) * rows * 0.5


def feed_forward(hidden: np.ndarray, up: Linear, down: Linear) -> np.ndarray:
    """Return the linear layer `down` of the gelu of the linear layer `up`.

    Args:
        hidden: [tokens, d_model], after the layer normalization.
        up: from d_model to d_ff, which is 4 d_model in GPT-2.
        down: from d_ff to d_model.

    Returns:
        [tokens, d_model].
    """
    return linear(gelu(linear(hidden, up)), down)


def block(hidden: np.ndarray, layer: Layer[Linear], heads: int, epsilon: float) -> np.ndarray:
    """Add attention, then the feed-forward network, to the hidden states.

    Each of the two reads the hidden states through its own layer normalization.

    Args:
        hidden: [tokens, d_model]. It must not be changed.
        layer: attention_norm, qkv, out, ffn_norm, up and down; a norm has `gain` and `bias`.
        heads: number of heads.
        epsilon: of the layer normalizations.

    Returns:
        [tokens, d_model].
    """
    normed = layer_norm(hidden, layer.attention_norm.gain, layer.attention_norm.bias, epsilon)
    hidden = hidden + self_attention(normed, layer.qkv, layer.out, heads)
    normed = layer_norm(hidden, layer.ffn_norm.gain, layer.ffn_norm.bias, epsilon)
    return hidden + feed_forward(normed, layer.up, layer.down)


def forward(token_ids: np.ndarray, weights: ModelWeights, heads: int, epsilon: float) -> np.ndarray:
    """Return the logits of the next token at each token of a text.

    Embed tokens and positions, apply the blocks in order, normalize, and multiply by the head.

    Args:
        token_ids: [tokens], integers; the first token has the position 0.
        weights: token_embedding, position_embedding, layers, final_norm and head.
        heads: number of heads.
        epsilon: of the layer normalizations.

    Returns:
        [tokens, vocab]; row i scores what follows token i.
    """
    positions = np.arange(len(token_ids))
    hidden = embed(token_ids, positions, weights.token_embedding, weights.position_embedding)
    for layer in weights.layers:
        hidden = block(hidden, layer, heads, epsilon)
    norm = weights.final_norm
    return logits(layer_norm(hidden, norm.gain, norm.bias, epsilon), weights.head)
