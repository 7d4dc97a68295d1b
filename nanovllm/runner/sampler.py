"""From logits to tokens: edits, penalties, temperature, filters, draw.

The order is vLLM's: allowed tokens, forbidden tokens and biases, penalties; then either the most likely token, or temperature, min_p,
top_k, top_p and a draw. Every operation works on a row by itself, so a row's token does not depend on the rows beside it.
"""

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from nanovllm.runner.philox import uniform
from nanovllm.runner.sampling_batch import SamplingBatch, TokenHistory


@np.errstate(
    over="ignore", invalid="ignore"
)  # a row whose network overflowed may be beside sound ones
def sample(
    logits: Float32[np.ndarray, "seqs vocab"], batch: SamplingBatch
) -> tuple[Int64[np.ndarray, " seqs"], Bool[np.ndarray, " seqs"]]:
    """One token a row, and whether the row had any to give.

    `logits` are changed in place. A row without a finite logit, because everything is forbidden or the network overflowed, has no
    token: its flag is False and its entry means nothing.
    """
    _apply_edits(logits, batch)
    if batch.history.rows.size:
        _apply_penalties(logits, batch, batch.history)
    has_token = np.isfinite(logits.max(axis=1))
    tokens = logits.argmax(axis=1)
    drawn = np.flatnonzero((batch.temperature > 0) & has_token)
    if drawn.size:
        draws = uniform(batch.seeds[drawn], batch.choices[drawn], batch.positions[drawn])
        for row, draw in zip(drawn.tolist(), draws.tolist(), strict=True):
            scores = logits[row]
            scores /= batch.temperature[row]
            apply_filters(
                scores,
                top_k=int(batch.top_k[row]),
                top_p=float(batch.top_p[row]),
                min_p=float(batch.min_p[row]),
            )
            tokens[row] = draw_token(scores, draw)
    return tokens, has_token


def _apply_edits(logits: Float32[np.ndarray, "seqs vocab"], batch: SamplingBatch) -> None:
    for row, ids in batch.allowed.items():
        kept = logits[row, ids]
        logits[row] = -np.inf
        logits[row, ids] = kept
    if batch.edits.rows.size:
        logits[batch.edits.rows, batch.edits.token_ids] += batch.edits.values


def _apply_penalties(
    logits: Float32[np.ndarray, "seqs vocab"], batch: SamplingBatch, seen: TokenHistory
) -> None:
    """Repetition penalty on every token seen, presence and frequency penalty on those of the answer.

    A positive logit is divided by the repetition penalty and a negative one multiplied, so that both go down.
    """
    values = logits[seen.rows, seen.token_ids]
    repetition = batch.repetition_penalty[seen.rows]
    values = np.where(values > 0, values / repetition, values * repetition)
    values -= batch.frequency_penalty[seen.rows] * seen.output_counts.astype(np.float32)
    values -= batch.presence_penalty[seen.rows] * (seen.output_counts > 0).astype(np.float32)
    logits[seen.rows, seen.token_ids] = values


def apply_filters(
    scores: Float32[np.ndarray, " vocab"], *, top_k: int, top_p: float, min_p: float
) -> None:
    """Set the scores of tokens that the filters drop to minus infinity, in place. Tokens that tie with the last one kept stay."""
    if min_p > 0:
        scores[scores < scores.max() + np.float32(np.log(min_p))] = -np.inf
    if 0 < top_k < scores.size:
        scores[scores < np.partition(scores, scores.size - top_k)[scores.size - top_k]] = -np.inf
    if top_p < 1:
        scores[scores < _nucleus_threshold(scores, top_p)] = -np.inf


def _nucleus_threshold(scores: Float32[np.ndarray, " vocab"], top_p: float) -> float:
    """Score of the last token of the smallest set of most likely tokens whose probabilities reach top_p (Holtzman et al. 2020).

    Tokens less likely than (1 - top_p) / vocab cannot reach 1 - top_p together, so they are never in that set: only the others,
    usually few, are sorted.
    """
    weights = np.exp(scores - scores.max())
    total = weights.sum(dtype=np.float64)
    candidates = scores[weights >= np.float32((1.0 - top_p) * total / scores.size)]
    candidates[::-1].sort()
    reached = np.cumsum(np.exp(candidates - candidates[0]), dtype=np.float64)
    last = int(np.searchsorted(reached, top_p * total))
    return float(candidates[min(last, candidates.size - 1)])


def draw_token(scores: Float32[np.ndarray, " vocab"], draw: float) -> int:
    """The token at which the running sum of probabilities, in order of ids, passes `draw` in [0, 1)."""
    candidates = np.flatnonzero(scores > -np.inf)
    weights: Float64[np.ndarray, " candidates"] = np.exp(
        (scores[candidates] - scores.max()).astype(np.float64)
    )
    reached = np.cumsum(weights)
    place = int(np.searchsorted(reached, draw * reached[-1], side="right"))
    return int(candidates[min(place, candidates.size - 1)])
