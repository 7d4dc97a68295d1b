"""The logit lens: what the network would predict after each layer.

The final layer norm and the output head are applied to the residual stream after every layer
(nostalgebraist 2020, "interpreting GPT: the logit lens",
https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru). The last row is the model's own prediction. The
head was trained for that row only, so early rows show a tendency. The tuned lens (Belrose et al.
2023, arXiv:2303.08112) trains a correction for each layer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from nanovllm.errors import InvalidRequestError
from nanovllm.inspection.observe import InspectedModel
from nanovllm.model import gpt2

MAX_TOP = 20
DEFAULT_TOP = 5
CHUNK_ROWS = 64  # positions whose logits are in memory at a time


@dataclass(frozen=True, slots=True)
class Prediction:
    """The distribution of the token after one position, as read from one layer.

    Attributes:
        top: the most probable tokens with their log-probabilities, most probable first.
        entropy: of the distribution, in nats.
        next_rank: rank of the prompt's next token, 1 for the most probable; None at the last
            position.
        next_logprob: its log-probability.
    """

    top: tuple[tuple[int, float], ...]
    entropy: float
    next_rank: int | None
    next_logprob: float | None


@dataclass(frozen=True, slots=True)
class LogitLens:
    """Predictions [rows, positions]: after the embeddings, then after each layer."""

    rows: tuple[str, ...]
    predictions: tuple[tuple[Prediction, ...], ...]


def logit_lens(
    model: InspectedModel, token_ids: Sequence[int], top: int = DEFAULT_TOP
) -> LogitLens:
    """Return the prediction of every layer at every position.

    Raises InvalidRequestError unless `top` is 1 to MAX_TOP.
    """
    check_top(top)
    last = model.config.layers - 1
    names: list[str] = []
    rows: list[tuple[Prediction, ...]] = []

    def observe(name: str, layer: int | None, array: np.ndarray) -> None:
        if name in ("embeddings", "hidden_after_ffn"):
            suffix = " (output)" if layer == last else ""
            names.append("embeddings" if layer is None else f"after layer {layer}{suffix}")
            rows.append(tuple(predictions(model, array, token_ids, top)))

    model.forward(token_ids, observe)
    return LogitLens(tuple(names), tuple(rows))


def check_top(top: int) -> None:
    """Raise InvalidRequestError unless `top` is 1 to MAX_TOP."""
    if not 1 <= top <= MAX_TOP:
        raise InvalidRequestError(f"top is {top} but must be 1 to {MAX_TOP}", param="top")


def predictions(
    model: InspectedModel,
    hidden: Float32[np.ndarray, "tokens d_model"],
    token_ids: Sequence[int],
    top: int,
) -> Iterator[Prediction]:
    """Yield the prediction read from the residual stream at each position."""
    next_ids = [*token_ids[1:], None]
    for start in range(0, len(hidden), CHUNK_ROWS):
        chunk = hidden[start : start + CHUNK_ROWS]
        for logprobs, next_id in zip(lens_logprobs(model, chunk), next_ids[start:], strict=False):
            yield _describe(logprobs, next_id, top)


def lens_logprobs(
    model: InspectedModel, hidden: Float32[np.ndarray, "tokens d_model"]
) -> Float32[np.ndarray, "tokens vocab"]:
    """Return log softmax(head(layer_norm(hidden))) with the final layer norm."""
    weights = model.weights
    logits = gpt2.logits(weights, gpt2.layer_norm(hidden, weights.final_norm, model.config.epsilon))
    logits -= logits.max(axis=1, keepdims=True)
    sums = np.exp(logits).sum(axis=1, keepdims=True, dtype=np.float64)
    logits -= np.log(sums).astype(np.float32)
    return logits


def _describe(logprobs: Float32[np.ndarray, " vocab"], next_id: int | None, top: int) -> Prediction:
    count = min(top, len(logprobs))
    best = np.argpartition(-logprobs, count - 1)[:count]
    best = best[np.lexsort((best, -logprobs[best]))]
    entropy = -float((np.exp(logprobs) * logprobs).sum(dtype=np.float64))
    top_tokens = tuple(zip(best.tolist(), logprobs[best].tolist(), strict=True))
    if next_id is None:
        return Prediction(top_tokens, entropy, None, None)
    rank = 1 + int((logprobs > logprobs[next_id]).sum())
    return Prediction(top_tokens, entropy, rank, float(logprobs[next_id]))
