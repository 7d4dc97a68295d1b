"""Step 6: choose the next token: temperature, top-k, top-p and a draw."""

import numpy as np


def greedy(logits: np.ndarray) -> int:
    """Return the id of the largest of the logits [vocab]; of equal ones the lowest id."""
    return int(logits.argmax())


def filter_top_k(logits: np.ndarray, k: int) -> np.ndarray:
    """Return logits with minus infinity for all but the k largest.

    Logits equal to the k-th largest are kept too.

    Args:
        logits: [vocab], float32. They must not be changed.
        k: number of tokens to keep; 0, or more than vocab, keeps all.

    Returns:
        [vocab].
    """
    if not 0 < k < logits.size:
        return logits.copy()
    threshold = np.sort(logits)[-k]
    return np.where(logits < threshold, np.float32(-np.inf), logits)


def filter_top_p(logits: np.ndarray, p: float) -> np.ndarray:
    """Return logits with minus infinity for all but the most likely tokens that sum to p.

    The tokens are taken in order of their probability until the sum is p or more, so the token that
    crosses p is kept. Logits equal to the last one kept are kept too. (Holtzman et al. 2020,
    arXiv:1904.09751.)

    Args:
        logits: [vocab], float32. They must not be changed.
        p: from above 0 to 1; 1 keeps all.

    Returns:
        [vocab].
    """
    if p >= 1:
        return logits.copy()
    ordered = -np.sort(-logits)  # the largest first
    total = np.exp(logits - logits.max()).sum(dtype=np.float64)
    cumulative = np.cumsum(np.exp(ordered - ordered[0]), dtype=np.float64)
    last = min(np.searchsorted(cumulative, p * total), logits.size - 1)
    return np.where(logits < ordered[last], np.float32(-np.inf), logits)


def draw(logits: np.ndarray, noise: np.ndarray) -> int:
    """Return the token with the smallest noise / probability; of equal ones the lowest id.

    A token with the logit minus infinity is never returned.

    Args:
        logits: [vocab], float32; at least one is finite. They must not be changed.
        noise: [vocab], float64; an exponential random number above 0 for each token.
    """
    weights = np.exp((logits - logits.max()).astype(np.float64))
    return int(np.argmax(weights / noise))


def sample(
    logits: np.ndarray, *, temperature: float, top_k: int, top_p: float, noise: np.ndarray
) -> int:
    """Return the next token: the greedy one at temperature 0, else one that is drawn.

    The logits are divided by the temperature, then filtered by top_k, then by top_p.

    Args:
        logits: [vocab], float32. They must not be changed.
        temperature: 0 or more.
        top_k: as in `filter_top_k`.
        top_p: as in `filter_top_p`.
        noise: as in `draw`.
    """
    if temperature == 0:
        return greedy(logits)
    scores = logits / np.float32(temperature)
    return draw(filter_top_p(filter_top_k(scores, top_k), top_p), noise)
