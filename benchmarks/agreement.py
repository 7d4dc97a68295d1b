"""Do two contenders compute the same network? Greedy answers must agree up to the first place where the two best tokens are nearly as likely."""

from collections.abc import Sequence
from dataclasses import dataclass

NEAR_TIE = 1e-3  # between log-probabilities: what float32 sums in another order may turn


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of some requests: those with equal answers, those that part at or after a near tie, and those that part without one.

    `equal_tokens` is the share of all tokens that come before an answer's first difference.
    """

    requests: int
    equal: int
    near_tie: int
    different: int
    equal_tokens: float


def compare(
    ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]], gaps: Sequence[Sequence[float]]
) -> Agreement:
    """Compare answers token by token; `gaps` has the distance between our two best log-probabilities at each token."""
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
