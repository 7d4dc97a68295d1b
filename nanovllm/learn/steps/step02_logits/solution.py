"""Step 2: embedding, logits, softmax and cross-entropy."""

import numpy as np


def embed(
    token_ids: np.ndarray,
    positions: np.ndarray,
    token_embedding: np.ndarray,
    position_embedding: np.ndarray,
) -> np.ndarray:
    """Return the sum of each token's embedding and its position's.

    Args:
        token_ids: [tokens], integers from 0 to vocab - 1.
        positions: [tokens], integers; they need not begin at 0.
        token_embedding: [vocab, d_model].
        position_embedding: [max_positions, d_model].

    Returns:
        [tokens, d_model].
    """
    return token_embedding[token_ids] + position_embedding[positions]


def logits(hidden: np.ndarray, head: np.ndarray) -> np.ndarray:
    """Return the score of every token of the vocabulary at each row: a dot product each.

    Args:
        hidden: [rows, d_model].
        head: [vocab, d_model]; in GPT-2 the token embedding itself.

    Returns:
        [rows, vocab].
    """
    return hidden @ head.T


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return exp(logits) of each row divided by the row's sum.

    Subtract the largest logit of each row before `np.exp`, so that it cannot overflow.

    Args:
        logits: [rows, vocab]. They must not be changed.

    Returns:
        [rows, vocab]; each row sums to 1.
    """
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the natural logarithm of the softmax of each row, also where the softmax rounds to 0.

    Args:
        logits: [rows, vocab]. They must not be changed.

    Returns:
        [rows, vocab], all 0 or less.
    """
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    """Return the mean of -log p(target), in nats.

    Args:
        logits: [rows, vocab].
        targets: [rows], the id of the token that really follows at each row.
    """
    logprobs = log_softmax(logits)[np.arange(len(targets)), targets]
    return float(-logprobs.mean(dtype=np.float64))
