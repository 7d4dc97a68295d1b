"""Log-probabilities to report: of one token a row, and of the most likely ones.

They are those of the model itself, before temperature, penalties and filters, as vLLM and transformers report them.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int64


class TokenLogprobs(NamedTuple):
    """One position: the token that stands there first, then the most likely ones in order.

    Ranks count from 1 and follow the logits, the lower id first among equals: where no setting changes the logits, the greedy token has rank 1.
    """

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]


def log_softmax(logits: Float32[np.ndarray, "rows vocab"]) -> Float32[np.ndarray, "rows vocab"]:
    """Natural log-probabilities, row by row; a row with infinities or NaN is NaN."""
    with np.errstate(invalid="ignore"):
        shifted = logits - logits.max(axis=1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float32))


def token_logprobs(
    logits: Float32[np.ndarray, "rows vocab"],
    token_ids: Int64[np.ndarray, " rows"],
    num_logprobs: Int64[np.ndarray, " rows"],
) -> list[TokenLogprobs]:
    """For each row the log-probability and rank of its token, and of its `num_logprobs` most likely tokens."""
    logprobs = log_softmax(logits)
    found = []
    for row, (token_id, count) in enumerate(
        zip(token_ids.tolist(), num_logprobs.tolist(), strict=True)
    ):
        ids = [token_id, *_most_likely(logits[row], count).tolist()]
        ranks = [_rank(logits[row], token_id), *range(1, len(ids))]
        found.append(TokenLogprobs(ids, logprobs[row, ids].tolist(), ranks))
    return found


def _rank(logits: Float32[np.ndarray, " vocab"], token_id: int) -> int:
    own = logits[token_id]
    return 1 + int(np.count_nonzero(logits > own)) + int(np.count_nonzero(logits[:token_id] == own))


def _most_likely(logits: Float32[np.ndarray, " vocab"], count: int) -> Int64[np.ndarray, " best"]:
    """Ids of the `count` largest values, largest first, the lower id first among equals."""
    count = min(count, logits.size)
    if count == 0:
        return np.empty(0, dtype=np.int64)
    threshold = np.partition(logits, logits.size - count)[logits.size - count]
    candidates = np.flatnonzero(logits >= threshold)
    return candidates[np.argsort(-logits[candidates], kind="stable")][:count]
