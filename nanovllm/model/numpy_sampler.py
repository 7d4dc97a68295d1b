"""NumPy's sampler and the specification: edits, penalties, temperature, filters, draw.

The order is vLLM's: allowed tokens, bans and biases, penalties; then either the argmax, or
temperature, min_p, top_k, top_p and a draw. Every operation works on one row, so a row's token does
not depend on the rows beside it.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from nanovllm.model.logprobs import token_logprobs
from nanovllm.model.philox import draw_keys, exponentials
from nanovllm.model.sampling import SampledTokens, SamplingSettings, TokenLogprobs


class RowSampling(NamedTuple):
    """How a token is drawn: the settings of a row, and an exponential number for each token."""

    temperature: np.float32
    top_k: int
    top_p: float
    min_p: float
    noise: Float64[np.ndarray, " vocab"]


def choose_token(scores: Float32[np.ndarray, " vocab"], row: RowSampling) -> int:
    """Return the token that is drawn from a row after its edits; `scores` are overwritten."""
    scores /= row.temperature
    apply_filters(scores, top_k=row.top_k, top_p=row.top_p, min_p=row.min_p)
    return draw_token(scores, row.noise)


class NumpySampler:
    """The sampler of backend="numpy"."""

    choose = staticmethod(choose_token)

    def sample(
        self, logits: Float32[np.ndarray, "rows vocab"], settings: SamplingSettings
    ) -> SampledTokens:
        """Return a token for each row; `logits` are overwritten."""
        reported = np.flatnonzero(settings.num_logprobs >= 0)
        unchanged = logits[reported]  # a copy
        token_ids, has_token = sample(logits, settings, self.choose)
        logprobs: list[TokenLogprobs | None] = [None] * len(logits)
        if reported.size:
            reports = self.logprobs(unchanged, token_ids[reported], settings.num_logprobs[reported])
            for row, report in zip(reported.tolist(), reports, strict=True):
                logprobs[row] = report
        return SampledTokens(token_ids, has_token, logprobs)

    logprobs = staticmethod(token_logprobs)


@np.errstate(over="ignore", invalid="ignore")  # a row that overflowed may be beside sound ones
def sample(
    logits: Float32[np.ndarray, "rows vocab"],
    settings: SamplingSettings,
    choose: Callable[[np.ndarray, RowSampling], int] = choose_token,
) -> tuple[Int64[np.ndarray, " rows"], Bool[np.ndarray, " rows"]]:
    """Return a token for each row and whether the row has one; `logits` are overwritten.

    `choose` draws the token of a row.
    """
    _apply_edits(logits, settings)
    _apply_penalties(logits, settings)
    has_token = np.isfinite(logits.max(axis=1))
    tokens = logits.argmax(axis=1)
    drawn = np.flatnonzero((settings.temperature > 0) & has_token)
    if drawn.size:
        keys = draw_keys(settings.seeds[drawn], settings.choices[drawn], settings.positions[drawn])
        for row, key in zip(drawn.tolist(), keys, strict=True):
            sampling = RowSampling(
                settings.temperature[row],
                int(settings.top_k[row]),
                float(settings.top_p[row]),
                float(settings.min_p[row]),
                exponentials(key, logits.shape[1]),
            )
            tokens[row] = choose(logits[row], sampling)
    return tokens, has_token


def _apply_edits(logits: Float32[np.ndarray, "rows vocab"], settings: SamplingSettings) -> None:
    """Ban tokens that are not allowed; add biases."""
    allowed = settings.allowed
    for row in np.flatnonzero(np.diff(allowed.starts)).tolist():
        ids = allowed.token_ids[allowed.starts[row] : allowed.starts[row + 1]]
        kept = logits[row, ids]
        logits[row] = -np.inf
        logits[row, ids] = kept
    if settings.edits.token_ids.size:
        logits[settings.edits.rows, settings.edits.token_ids] += settings.edit_values


def _apply_penalties(logits: Float32[np.ndarray, "rows vocab"], settings: SamplingSettings) -> None:
    """Apply the repetition penalty to all tokens seen, the others to those of the output.

    The repetition penalty divides a positive logit and multiplies a negative one: both go down.
    """
    if not settings.history.token_ids.size:
        return
    rows, token_ids = settings.history.rows, settings.history.token_ids
    counts = settings.history_counts
    values = logits[rows, token_ids]
    repetition = settings.repetition_penalty[rows]
    values = np.where(values > 0, values / repetition, values * repetition)
    values -= settings.frequency_penalty[rows] * counts.astype(np.float32)
    values -= settings.presence_penalty[rows] * (counts > 0).astype(np.float32)
    logits[rows, token_ids] = values


def apply_filters(
    scores: Float32[np.ndarray, " vocab"], *, top_k: int, top_p: float, min_p: float
) -> None:
    """Set the scores of filtered tokens to minus infinity, in place.

    Tokens that tie with the last one kept are kept too.
    """
    if min_p > 0:
        scores[scores < scores.max() + np.float32(np.log(min_p))] = -np.inf
    if 0 < top_k < scores.size:
        scores[scores < np.partition(scores, scores.size - top_k)[scores.size - top_k]] = -np.inf
    if top_p < 1:
        scores[scores < _nucleus_threshold(scores, top_p)] = -np.inf


def _nucleus_threshold(scores: Float32[np.ndarray, " vocab"], top_p: float) -> float:
    """Return the lowest score in the nucleus, the smallest set of most likely tokens whose
    probabilities sum to top_p (Holtzman et al. 2020, arXiv:1904.09751).

    Tokens less likely than (1 - top_p) / vocab cannot sum to 1 - top_p, so none of them is in the
    nucleus. Only the others, usually few, are sorted.
    """
    weights = np.exp(scores - scores.max())
    total = weights.sum(dtype=np.float64)
    candidates = scores[weights >= np.float32((1.0 - top_p) * total / scores.size)]
    candidates[::-1].sort()
    cumulative = np.cumsum(np.exp(candidates - candidates[0]), dtype=np.float64)
    last = int(np.searchsorted(cumulative, top_p * total))
    return float(candidates[min(last, candidates.size - 1)])


def draw_token(scores: Float32[np.ndarray, " vocab"], noise: Float64[np.ndarray, " vocab"]) -> int:
    """Return the token with the smallest noise / probability; of equal ones the lowest id.

    Of independent exponential numbers with rates p_i, number i is the smallest with the probability
    p_i / sum(p); an exponential number of mean 1 divided by p_i has the rate p_i (Efraimidis and
    Spirakis 2006, "Weighted random sampling with a reservoir"; the Gumbel-max trick is the
    logarithm of it: Maddison et al. 2014, "A* Sampling", arXiv:1411.0030). Two models that give a
    token similar probabilities often draw the same token from the same noise.

    Args:
        scores: minus infinity for tokens that cannot be drawn; at least one is finite.
        noise: independent exponential random numbers of mean 1, above 0.
    """
    weights = np.exp((scores - scores.max()).astype(np.float64))
    return int((weights / noise).argmax())  # not noise / weights, because weights may be 0
