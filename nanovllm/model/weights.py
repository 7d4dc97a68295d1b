"""The weights of a network: a frozen tree of arrays, in the order of their use.

GPT-2 stores its linear layers as [in, out] (the "Conv1D" of the original code), so a layer computes
`rows @ weight`. Query, key and value are side by side in the columns of one matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer."""

    weight: Float32[np.ndarray, "d_in d_out"]
    bias: Float32[np.ndarray, " d_out"]


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """A layer normalization."""

    gain: Float32[np.ndarray, " d_model"]
    bias: Float32[np.ndarray, " d_model"]


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """`qkv` from d_model to 3 d_model (queries, keys, values); `out` from d_model to d_model."""

    qkv: Linear
    out: Linear


@dataclass(frozen=True, slots=True)
class FeedForwardWeights:
    """`up` from d_model to d_ff; `down` from d_ff to d_model."""

    up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class Layer:
    """A transformer block: norm, attention, norm, feed-forward."""

    attention_norm: LayerNorm
    attention: AttentionWeights
    ffn_norm: LayerNorm
    ffn: FeedForwardWeights


@dataclass(frozen=True, slots=True)
class GPT2Weights:
    """The whole network; a tied `head` is the same array as `token_embedding`."""

    token_embedding: Float32[np.ndarray, "vocab d_model"]
    position_embedding: Float32[np.ndarray, "positions d_model"]
    layers: Sequence[Layer]
    final_norm: LayerNorm
    head: Float32[np.ndarray, "vocab d_model"]
