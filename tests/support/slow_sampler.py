"""The sampler's documented order in plain Python, the slow twin of the real ones."""

import math
from collections.abc import Sequence

import numpy as np

from tests.support.sampling import Row, noise_of

INF = math.inf


class RoundingDecidesError(Exception):
    """A sum is so close to a threshold that the last bit says on which side it is."""


def edited(logits: Sequence[float], row: Row) -> list[float]:
    """Return the logits after allowed tokens, biases and penalties; each step is rounded."""
    scores = [
        np.float32(value) if row.allowed is None or token in row.allowed else np.float32(-INF)
        for token, value in enumerate(logits)
    ]
    for token, value in row.bias.items():
        scores[token] = scores[token] + np.float32(value)
    for token in {*row.prompt, *row.output} if row.has_penalties else ():
        score, count = scores[token], list(row.output).count(token)
        score = (
            score / np.float32(row.repetition) if score > 0 else score * np.float32(row.repetition)
        )
        score = score - np.float32(row.frequency) * np.float32(count)
        scores[token] = score - np.float32(row.presence) * np.float32(count > 0)
    return [float(score) for score in scores]


def filtered(scores: list[float], row: Row) -> list[float]:
    """Return the probabilities after temperature, min_p, top_k and top_p."""
    scores = [float(np.float32(score) / np.float32(row.temperature)) for score in scores]
    if row.min_p > 0:
        least = float(np.float32(max(scores)) + np.float32(math.log(np.float32(row.min_p))))
        scores = [score if score >= least else -INF for score in scores]
    if 0 < row.top_k < len(scores):
        least = sorted(scores, reverse=True)[row.top_k - 1]
        scores = [score if score >= least else -INF for score in scores]
    best = max(scores)
    weights = [math.exp(score - best) for score in scores]
    if row.top_p < 1:
        goal = float(np.float32(row.top_p)) * sum(weights)
        reached, least = 0.0, best
        for score in sorted(scores, reverse=True):
            if reached < goal:
                least = score
                reached += math.exp(score - best)
                _refuse_if_close(reached, goal)
        weights = [
            weight if score >= least else 0.0 for weight, score in zip(weights, scores, strict=True)
        ]
    return [weight / sum(weights) for weight in weights]


def slow_token(logits: Sequence[float], row: Row) -> int | None:
    """Return the token of one row, None where there is none."""
    scores = edited(logits, row)
    if not math.isfinite(max(scores)):
        return None
    if row.temperature == 0:
        return scores.index(max(scores))
    noise = noise_of(row, len(logits)).tolist()
    race = [p / number for p, number in zip(filtered(scores, row), noise, strict=True)]
    first, second = sorted(race, reverse=True)[:2]
    _refuse_if_close(second, first)
    return race.index(first)


def _refuse_if_close(reached: float, goal: float) -> None:
    if abs(reached - goal) < 1e-6 * goal:
        raise RoundingDecidesError
