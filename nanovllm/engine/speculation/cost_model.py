"""What drafted tokens cost and gain: how many to verify in a step, so that it should gain.

A step reads the weights once, whatever its number of rows, so a few rows more cost little; many
cost as much as they compute. The time of a step by its rows is measured when the engine starts, and
a drafted token is worth the probability that it and all before it are accepted.
"""

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

MARGIN = 1.04
"""Smallest gain that is taken: measured times are not exact."""
MEASURED_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)
_ROUNDS, _MAX_ROUNDS = 3, 40
_SETTLED = 0.97
_SHORTEST_S = 1e-9
"""Least time of a step, because rates divide by it: a coarse clock may measure none."""
_SLOWNESS_WEIGHT = 0.1


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Time of a step in seconds by its number of rows, ascending; linear between the numbers."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    @classmethod
    def measure(cls, run: Callable[[int], float], max_rows: int) -> "StepTimes":
        """Measure steps by `run`, which takes a number of rows and returns its time in seconds.

        Rounds follow until the last few brought nothing: caches fill and threads settle meanwhile.
        The shortest time counts. Other programs only lengthen times, and more rows never take less,
        so a number of rows takes no longer than a larger one did. Times are positive.
        """
        rows = tuple(count for count in MEASURED_ROWS if count <= max_rows)
        shortest = [math.inf] * len(rows)
        num_vain = num_rounds = 0
        while num_vain < _ROUNDS and num_rounds < _MAX_ROUNDS:
            before, num_rounds = sum(shortest), num_rounds + 1
            shortest = [min(time, run(count)) for time, count in zip(shortest, rows, strict=True)]
            num_vain = num_vain + 1 if sum(shortest) > _SETTLED * before else 0
        shortest = [max(time, _SHORTEST_S) for time in shortest]
        return cls(rows, tuple(min(shortest[index:]) for index in range(len(rows))))

    def of(self, rows: int) -> float:
        """Return the time of a step of `rows` rows, which has at least one."""
        assert rows > 0
        index = min(max(bisect_left(self.rows, rows), 1), len(self.rows) - 1)
        if index == 0:
            return self.seconds[0] * rows
        (left, right), (before, after) = (
            self.rows[index - 1 : index + 1],
            self.seconds[index - 1 : index + 1],
        )
        return before + (after - before) * (rows - left) / (right - left)


@dataclass(frozen=True, slots=True)
class Offer:
    """Tokens that could be drafted for a sequence.

    Attributes:
        acceptance: probability that a drafted token is accepted if those before it are.
        count: how many tokens there are at most.
        num_forced, forced_acceptance: the first ones, which a grammar forces, and their acceptance.
    """

    acceptance: float
    count: int
    num_forced: int = 0
    forced_acceptance: float = 1.0

    def chance(self, index: int) -> float:
        """Return the probability that the token of this index is accepted if those before are."""
        return self.forced_acceptance if index < self.num_forced else self.acceptance


class Slowness:
    """Running means of how much longer steps take than `StepTimes` says, by their rows.

    Attention over long texts, sampling and what surrounds the network are not in measured steps,
    nor is what other programs do meanwhile. Where a measured time was wrong, this corrects it.
    A step also says a little of steps with more rows, so that none is avoided forever because it
    was slow once. It says nothing of steps with fewer rows, against which drafts are weighed.
    """

    def __init__(self) -> None:
        """Begin with steps that take as long as expected."""
        self._means: dict[int, float] = {}
        self._rows: list[int] = []  # the keys of `_means`, ascending

    def of(self, rows: int) -> float:
        """Return the mean of steps of `rows` rows, or of the nearest number that has one."""
        index = bisect_left(self._rows, rows)
        neighbours = self._rows[max(index - 1, 0) : index + 1]
        if not neighbours:
            return 1.0
        return self._means[min(neighbours, key=lambda each: abs(each - rows))]

    def add(self, rows: int, duration_s: float, expected_s: float) -> None:
        """Add a step. One that took several times as long as expected counts as twice the mean."""
        mean = self.of(rows)
        ratio = min(duration_s / expected_s, 2 * mean)
        if rows not in self._means:
            insort(self._rows, rows)
            self._means[rows] = mean
        for more in self._rows[bisect_left(self._rows, rows) :]:
            weight = _SLOWNESS_WEIGHT / (1 + more - rows) ** 2
            self._means[more] += weight * (ratio - self._means[more])


def best_counts(
    offers: Mapping[str, Offer], num_sequences: int, times: Callable[[int], float]
) -> tuple[dict[str, int], float]:
    """Return how many drafted tokens to verify of each sequence, and the gain.

    Sequences that get none are left out. The gain is the expected number of tokens a second in
    proportion to that without drafts; 1.0 if there are none. Of `num_sequences` sequences, each
    with one row, those in `offers` may have more; `times` gives the time of a step by its rows.
    Rows are added in the order of their probability,
    and the number with the most expected tokens a second counts.
    """
    heap = [(-offer.chance(0), name, 1) for name, offer in offers.items() if offer.count]
    heapq.heapify(heap)
    tokens, rows = float(num_sequences), num_sequences
    plain_rate = tokens / times(rows)
    best_rate, best_size = MARGIN * plain_rate, 0
    added: list[str] = []
    while heap:
        negative, name, number = heap[0]
        offer = offers[name]
        added.append(name)
        tokens, rows = tokens - negative, rows + 1
        rate = tokens / times(rows)
        if rate > best_rate:
            best_rate, best_size = rate, len(added)
        if number < offer.count:
            heapq.heapreplace(heap, (negative * offer.chance(number), name, number + 1))
        else:
            heapq.heappop(heap)
    counts: dict[str, int] = {}
    for name in added[:best_size]:
        counts[name] = counts.get(name, 0) + 1
    return counts, best_rate / plain_rate if counts else 1.0


@dataclass(frozen=True, slots=True)
class ModelCosts:
    """Costs of a draft model in a step.

    Attributes:
        pass_s: time of one of its steps, which drafts a token for each sequence.
        catch_up_s: time in which it computes what it has missed.
        tokens_left: tokens over which this time is spread: at most so many follow.
    """

    pass_s: float
    catch_up_s: float = 0.0
    tokens_left: int = 1


def best_depth(
    offers: Sequence[Offer],
    times: Callable[[int], float],
    costs: ModelCosts,
    least_gain: float = 1.0,
) -> int:
    """Return how many tokens a draft model should draft for each sequence; 0 for none.

    Args:
        offers: acceptance and most tokens of each sequence; a sequence with fewer ends earlier.
        times: time of a step of the model by its rows, in seconds.
        costs: of the draft model.
        least_gain: the gain without the draft model, which it must exceed; see `best_counts`.
    """
    tokens, rows = float(len(offers)), len(offers)
    plain_rate = tokens / times(rows)
    best_rate, best = max(least_gain, MARGIN) * plain_rate, 0
    for depth in range(1, max(offer.count for offer in offers) + 1):
        drafting = [offer for offer in offers if offer.count >= depth]
        tokens += sum(offer.acceptance**depth for offer in drafting)
        rows += len(drafting)
        seconds = times(rows) + depth * costs.pass_s
        seconds += costs.catch_up_s * tokens / max(costs.tokens_left, tokens)
        if tokens / seconds > best_rate:
            best_rate, best = tokens / seconds, depth
    return best
