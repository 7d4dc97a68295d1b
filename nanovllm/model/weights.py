"""The weights of a network: a frozen tree of arrays, in the order of their use.

A linear layer computes `rows @ weight + bias`. Queries, keys and values are side by side in the
columns of one matrix, and so are the gate and the inputs of a gated feed-forward block. Where a
family has no bias, it is zeros.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Float32


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer."""

    weight: Float32[np.ndarray, "d_in d_out"]
    bias: Float32[np.ndarray, " d_out"]


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """A layer normalization; the bias of an RMS norm is zeros."""

    gain: Float32[np.ndarray, " d_model"]
    bias: Float32[np.ndarray, " d_model"]


AnyLinear = TypeVar("AnyLinear")


@dataclass(frozen=True, slots=True)
class Layer(Generic[AnyLinear]):
    """A transformer block: norm, attention, norm, feed-forward; AnyLinear is a linear layer's type.

    Attributes:
        qkv: from d_model to queries, keys and values.
        out: from the queries' width to d_model, after attention.
        up: from d_model to d_ff, or to 2 d_ff: a gate and what it multiplies.
        down: from d_ff to d_model.
        query_gain, key_gain: of the RMS norms of each head's queries and keys; None without them.
    """

    attention_norm: LayerNorm
    qkv: AnyLinear
    out: AnyLinear
    ffn_norm: LayerNorm
    up: AnyLinear
    down: AnyLinear
    query_gain: Float32[np.ndarray, " head_dim"] | None = None
    key_gain: Float32[np.ndarray, " head_dim"] | None = None


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """The whole network; a tied `head` is the same array as `token_embedding`.

    With rotary positions, `position_embedding` has no rows.
    """

    token_embedding: Float32[np.ndarray, "vocab d_model"]
    position_embedding: Float32[np.ndarray, "positions d_model"]
    layers: Sequence[Layer[Linear]]
    final_norm: LayerNorm
    head: Float32[np.ndarray, "vocab d_model"]
