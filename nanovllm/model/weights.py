"""The network's weights as a frozen tree of arrays, in the order in which the forward pass uses them.

GPT-2 stores its linear layers as [in, out] (the "Conv1D" of the original code), so the products read `rows @ weight`, and query, key
and value lie side by side in the columns of one matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32


@dataclass(frozen=True, slots=True)
class Linear:
    """weight [in, out], bias [out]."""

    weight: Float32[np.ndarray, "d_in d_out"]
    bias: Float32[np.ndarray, " d_out"]


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """gain [d_model], bias [d_model]."""

    gain: Float32[np.ndarray, " d_model"]
    bias: Float32[np.ndarray, " d_model"]


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """qkv: d_model to 3 d_model (queries, keys, values); out: d_model to d_model."""

    qkv: Linear
    out: Linear


@dataclass(frozen=True, slots=True)
class FeedForwardWeights:
    """up: d_model to d_ff; down: d_ff to d_model."""

    up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class Layer:
    """One transformer block: norm, attention, norm, feed-forward."""

    attention_norm: LayerNorm
    attention: AttentionWeights
    ffn_norm: LayerNorm
    ffn: FeedForwardWeights


@dataclass(frozen=True, slots=True)
class GPT2Weights:
    """The whole network. `head` [vocab, d_model] is `token_embedding` itself where the two are tied."""

    token_embedding: Float32[np.ndarray, "vocab d_model"]
    position_embedding: Float32[np.ndarray, "positions d_model"]
    layers: Sequence[Layer]
    final_norm: LayerNorm
    head: Float32[np.ndarray, "vocab d_model"]
