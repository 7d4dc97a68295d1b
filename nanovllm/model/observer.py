"""Observing a forward pass: `forward(..., observe=...)` hands over every intermediate.

Attention maps, the logit lens and int8 calibration are built on it.
"""

from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Observer(Protocol):
    """Receives intermediates in the order in which the forward pass computes them.

    | name                   | array                                                       |
    |------------------------|-------------------------------------------------------------|
    | embeddings             | [tokens, d_model], tokens plus positions; layer None        |
    | attention_input        | [tokens, d_model], the input of the qkv projection          |
    | queries, keys, values  | [tokens, heads, head_dim] each, of the batch's tokens       |
    | attention_scores       | [heads, queries, context], once for each sequence; -inf for |
    |                        | keys after the query                                        |
    | attention_weights      | [heads, queries, context], once for each sequence           |
    | attn_out               | [tokens, d_model], the input of the output projection       |
    | hidden_after_attention | [tokens, d_model], the residual stream                      |
    | ffn_input              | [tokens, d_model], the input of the up projection           |
    | ffn_hidden             | [tokens, d_ff], activated, the input of the down projection |
    | hidden_after_ffn       | [tokens, d_model], the residual stream                      |
    | final_hidden           | [rows, d_model], what `forward` returns; layer None         |

    The arrays are not changed later: an observer may keep them, but must not write to them.
    """

    def __call__(self, name: str, layer: int | None, array: np.ndarray, /) -> None:
        """Take the array `name` of `layer`, counted from 0."""
        ...


def ignore(_name: str, _layer: int | None, _array: np.ndarray, /) -> None:
    """Observe nothing."""
