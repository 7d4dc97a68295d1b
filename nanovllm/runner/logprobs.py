"""Log-probabilities to report: of one token a row, and of the most likely ones.

They are those of the model itself, before temperature, penalties and filters, as vLLM and transformers report them.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int64


class TokenLogprobs(NamedTuple):
    """One position: the token that stands there first, then the most likely ones in order. Ranks count from 1."""

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]


def log_softmax(logits: Float32[np.ndarray, "rows vocab"]) -> Float32[np.ndarray, "rows vocab"]:
    """Natural log-probabilities, row by row."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float32))


def token_logprobs(
    logits: Float32[np.ndarray, "rows vocab"], token_ids: Int64[np.ndarray, " rows"], num_logprobs: Int64[np.ndarray, " rows"]
) -> list[TokenLogprobs]:
    """For each row the log-probability and rank of its token, and of its `num_logprobs` most likely tokens; ties go by id."""
    logprobs = log_softmax(logits)
    own = logprobs[np.arange(len(token_ids)), token_ids]
    ranks = 1 + (logprobs > own[:, None]).sum(axis=1)
    found = []
    for row, count in enumerate(num_logprobs.tolist()):
        best = _most_likely(logprobs[row], count)
        found.append(
            TokenLogprobs(
                [int(token_ids[row]), *best.tolist()], [float(own[row]), *logprobs[row, best].tolist()], [int(ranks[row]), *range(1, len(best) + 1)]
            )
        )
    return found


def _most_likely(logprobs: Float32[np.ndarray, " vocab"], count: int) -> Int64[np.ndarray, " best"]:
    """Ids of the `count` largest values, largest first, the lower id first among equals."""
    count = min(count, logprobs.size)
    if count == 0:
        return np.empty(0, dtype=np.int64)
    threshold = np.partition(logprobs, logprobs.size - count)[logprobs.size - count]
    candidates = np.flatnonzero(logprobs >= threshold)
    return candidates[np.argsort(-logprobs[candidates], kind="stable")][:count]
