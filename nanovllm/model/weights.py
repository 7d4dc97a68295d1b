"""The weights of a network: a frozen tree of arrays, in the order of their use.

GPT-2 stores its linear layers as [in, out] (the "Conv1D" of the original code), so a layer computes
`rows @ weight`. Query, key and value are side by side in the columns of one matrix.
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
    """A layer normalization."""

    gain: Float32[np.ndarray, " d_model"]
    bias: Float32[np.ndarray, " d_model"]


AnyLinear = TypeVar("AnyLinear")


@dataclass(frozen=True, slots=True)
class Layer(Generic[AnyLinear]):
    """A transformer block: norm, attention, norm, feed-forward; AnyLinear is a linear layer's type.

    Attributes:
        qkv: from d_model to 3 d_model: queries, keys and values.
        out: from d_model to d_model, after attention.
        up: from d_model to d_ff.
        down: from d_ff to d_model.
    """

    attention_norm: LayerNorm
    qkv: AnyLinear
    out: AnyLinear
    ffn_norm: LayerNorm
    up: AnyLinear
    down: AnyLinear


@dataclass(frozen=True, slots=True)
class GPT2Weights:
    """The whole network; a tied `head` is the same array as `token_embedding`."""

    token_embedding: Float32[np.ndarray, "vocab d_model"]
    position_embedding: Float32[np.ndarray, "positions d_model"]
    layers: Sequence[Layer[Linear]]
    final_norm: LayerNorm
    head: Float32[np.ndarray, "vocab d_model"]
