"""Log-probabilities of one token of each row, and of the row's most likely tokens."""

from array import array

import numpy as np
from jaxtyping import Float32, Int64

from nanovllm.model.sampling import TokenLogprobs


def log_softmax(logits: Float32[np.ndarray, "rows vocab"]) -> Float32[np.ndarray, "rows vocab"]:
    """Return natural log-probabilities, row by row; a row with infinity or NaN is NaN."""
    with np.errstate(invalid="ignore"):
        shifted = logits - logits.max(axis=1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float32))


def token_logprobs(
    logits: Float32[np.ndarray, "rows vocab"],
    token_ids: Int64[np.ndarray, " rows"],
    num_logprobs: Int64[np.ndarray, " rows"],
) -> list[TokenLogprobs]:
    """Return log-probability and rank of each row's token and its top `num_logprobs`."""
    logprobs = log_softmax(logits)
    rows = []
    counts = num_logprobs.tolist()
    for row, (token_id, count) in enumerate(zip(token_ids.tolist(), counts, strict=True)):
        ids = [token_id, *_most_likely(logits[row], count).tolist()]
        reported = array("f", logprobs[row, ids].tobytes())
        rows.append(TokenLogprobs(array("q", ids), reported, _rank(logits[row], token_id)))
    return rows


def _rank(logits: Float32[np.ndarray, " vocab"], token_id: int) -> int:
    """Return 1 plus the number of tokens before this one in the order of the logits."""
    logit = logits[token_id]
    ties_before = np.count_nonzero(logits[:token_id] == logit)
    return 1 + int(np.count_nonzero(logits > logit)) + int(ties_before)


def _most_likely(logits: Float32[np.ndarray, " vocab"], count: int) -> Int64[np.ndarray, " best"]:
    """Return the ids of the `count` largest logits, largest first, on ties the lower id first."""
    count = min(count, logits.size)
    if count == 0:
        return np.empty(0, dtype=np.int64)
    threshold = np.partition(logits, logits.size - count)[logits.size - count]
    candidates = np.flatnonzero(logits >= threshold)
    return candidates[np.argsort(-logits[candidates], kind="stable")][:count]
