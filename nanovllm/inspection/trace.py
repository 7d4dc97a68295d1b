"""Trace: every operation of a forward pass with its shapes, statistics and prediction so far.

The operations are those that model/families hands to an observer, in their order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nanovllm.inspection.attention import HeadStatistics, describe_heads
from nanovllm.inspection.logit_lens import check_top, predictions
from nanovllm.inspection.observe import JSON, InspectedModel
from nanovllm.model.layers import logits

_OPERATIONS = {
    "embeddings": "token embedding + position embedding",
    "attention_input": "layer norm",
    "queries": "queries Q, of the qkv projection",
    "keys": "keys K",
    "values": "values V",
    "attention_scores": "scores: scale Q K^T, causal",
    "attention_weights": "attention weights: softmax(scores)",
    "attn_out": "attention weights @ V",
    "hidden_after_attention": "residual + output projection",
    "ffn_input": "layer norm",
    "ffn_hidden": "{activation}(up projection)",
    "hidden_after_ffn": "residual + down projection",
    "final_hidden": "final layer norm",
    "logits": "output head",
}


@dataclass(frozen=True, slots=True)
class TraceStep:
    """The result of one operation.

    Attributes:
        name: of the array, as in model/observer.py; "logits" for the last operation.
        layer: from 0; None outside of the layers.
        operation: how it is computed.
        shape: of the result.
        mean, std, min, max: of all its entries; of the attention scores, of those of keys that
            their query sees.
        norm: mean Euclidean norm of its rows.
        heads: statistics of the heads, for "attention_weights"; otherwise empty.
        prediction: of the token after the prompt, read by the logit lens from the residual stream
            after the embeddings and after each layer, and from the logits; otherwise None. See
            `logit_lens.predictions`.
    """

    name: str
    layer: int | None
    operation: str
    shape: tuple[int, ...]
    mean: float
    std: float
    min: float
    max: float
    norm: float
    heads: tuple[HeadStatistics, ...] = ()
    prediction: JSON | None = None


def trace(model: InspectedModel, token_ids: Sequence[int], top: int = 5) -> list[TraceStep]:
    """Return the operations of a prompt's forward pass.

    Raises InvalidRequestError unless `top` is 1 to logit_lens.MAX_TOP.
    """
    check_top(top)
    steps: list[TraceStep] = []
    last: JSON | None = None

    def observe(name: str, layer: int | None, array: np.ndarray) -> None:
        nonlocal last
        heads: Sequence[HeadStatistics] = ()
        prediction = None
        if name == "attention_weights":
            assert layer is not None
            heads = describe_heads(layer, array, token_ids)
        elif name in ("embeddings", "hidden_after_ffn"):
            (prediction,) = predictions(model, array[-1:], token_ids[-1:], top)
            last = prediction
        steps.append(_step(model, name, layer, array, tuple(heads), prediction))

    hidden = model.forward(token_ids, observe)
    scores = logits(model.weights, hidden[-1:])
    steps.append(_step(model, "logits", None, scores, (), last))
    return steps


def _step(
    model: InspectedModel,
    name: str,
    layer: int | None,
    array: np.ndarray,
    heads: tuple[HeadStatistics, ...],
    prediction: JSON | None,
) -> TraceStep:
    entries = array
    if name == "attention_scores":
        queries, keys = np.tril_indices(array.shape[1])
        entries, array = array[:, queries, keys], np.tril(array)
    return TraceStep(
        name=name,
        layer=layer,
        operation=_OPERATIONS[name].format(activation=model.config.activation),
        shape=array.shape,
        mean=float(entries.mean(dtype=np.float64)),
        std=float(entries.std(dtype=np.float64)),
        min=float(entries.min()),
        max=float(entries.max()),
        norm=float(np.sqrt(np.square(array, dtype=np.float64).sum(axis=-1)).mean()),
        heads=heads,
        prediction=prediction,
    )
