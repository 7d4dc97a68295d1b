"""Compare the greedy outputs of two contenders.

They must agree up to the first near tie of the top two tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

NEAR_TIE = 1e-3  # between log-probabilities: what float32 sums in another order may turn


@dataclass(frozen=True, slots=True)
class Agreement:
    """Number of requests with equal outputs, with a difference after a near tie, and without one.

    `equal_tokens` is the fraction of tokens before the first difference of their output.
    """

    requests: int
    equal: int
    near_tie: int
    different: int
    equal_tokens: float


def compare(
    ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]], gaps: Sequence[Sequence[float]]
) -> Agreement:
    """Compare outputs by token; `gaps` are our log-probability gaps of the top two tokens."""
    equal = near_tie = same_tokens = 0
    for mine, other, distances in zip(ours, theirs, gaps, strict=True):
        first = next(
            (
                index
                for index, pair in enumerate(zip(mine, other, strict=True))
                if pair[0] != pair[1]
            ),
            len(mine),
        )
        same_tokens += first
        if first == len(mine):
            equal += 1
        elif min(distances[: first + 1]) < NEAR_TIE:
            near_tie += 1
    tokens = sum(map(len, ours))
    return Agreement(
        len(ours),
        equal,
        near_tie,
        len(ours) - equal - near_tie,
        same_tokens / tokens if tokens else 1.0,
    )
