"""The logit lens: what the network would predict after each layer.

The final layer norm and the output head are applied to the residual stream after every layer
(nostalgebraist 2020, "interpreting GPT: the logit lens",
https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru). The last row is the model's own prediction. The
head was trained for that row only, so early rows show a tendency. The tuned lens (Belrose et al.
2023, arXiv:2303.08112) trains a correction for each layer.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float32

from nanovllm.errors import InvalidRequestError
from nanovllm.inspection.observe import JSON, InspectedModel, rounded
from nanovllm.model.layers import logits, normalize

MAX_TOP = 20
DEFAULT_TOP = 5
CHUNK_ROWS = 64  # positions whose logits are in memory at a time


def logit_lens(model: InspectedModel, prompt: Sequence[int], top: int = DEFAULT_TOP) -> JSON:
    """Return the prediction of every layer at every position: the response of logit_lens.

    `cells` are the predictions [layers, positions], in the order of `layers`: after the embeddings,
    then after each layer.

    Raises InvalidRequestError unless `top` is 1 to MAX_TOP.
    """
    check_top(top)
    last = model.config.layers - 1
    names: list[str] = []
    rows: list[list[JSON]] = []

    def observe(name: str, layer: int | None, array: np.ndarray) -> None:
        if name in ("embeddings", "hidden_after_ffn"):
            suffix = " (output)" if layer == last else ""
            names.append("embeddings" if layer is None else f"after layer {layer}{suffix}")
            rows.append(list(predictions(model, array, prompt, top)))

    model.forward(prompt, observe)
    return {"tokens": [*map(model.token, prompt)], "layers": names, "cells": rows}


def check_top(top: int) -> None:
    """Raise InvalidRequestError unless `top` is 1 to MAX_TOP."""
    if not 1 <= top <= MAX_TOP:
        raise InvalidRequestError(f"top is {top} but must be 1 to {MAX_TOP}", param="top")


def predictions(
    model: InspectedModel,
    hidden: Float32[np.ndarray, "tokens d_model"],
    token_ids: Sequence[int],
    top: int,
) -> Iterator[JSON]:
    """Yield the prediction of the next token, read from the residual stream, at each position.

    `top` are the most probable tokens with their probabilities `p`, most probable first; `entropy`
    is in nats. `rank_of_next` and `p_of_next` are of the prompt's next token, None at the last
    position; rank 1 is the most probable.
    """
    next_ids = [*token_ids[1:], None]
    for start in range(0, len(hidden), CHUNK_ROWS):
        chunk = hidden[start : start + CHUNK_ROWS]
        for logprobs, next_id in zip(lens_logprobs(model, chunk), next_ids[start:], strict=False):
            yield _describe(model, logprobs, next_id, top)


def lens_logprobs(
    model: InspectedModel, hidden: Float32[np.ndarray, "tokens d_model"]
) -> Float32[np.ndarray, "tokens vocab"]:
    """Return log softmax(head(norm(hidden))) with the final norm."""
    weights = model.weights
    scores = logits(weights, normalize(model.config, hidden, weights.final_norm))
    scores -= scores.max(axis=1, keepdims=True)
    sums = np.exp(scores).sum(axis=1, keepdims=True, dtype=np.float64)
    scores -= np.log(sums).astype(np.float32)
    return scores


def _describe(
    model: InspectedModel, logprobs: Float32[np.ndarray, " vocab"], next_id: int | None, top: int
) -> JSON:
    count = min(top, len(logprobs))
    best = np.argpartition(-logprobs, count - 1)[:count]
    best = best[np.lexsort((best, -logprobs[best]))]
    entropy = -float((np.exp(logprobs) * logprobs).sum(dtype=np.float64))
    is_last = next_id is None
    return {
        "top": [
            {**model.token(token_id), "p": rounded(math.exp(logprobs[token_id]))}
            for token_id in best.tolist()
        ],
        "entropy": rounded(entropy),
        "rank_of_next": None if is_last else 1 + int((logprobs > logprobs[next_id]).sum()),
        "p_of_next": None if is_last else rounded(math.exp(logprobs[next_id])),
    }
