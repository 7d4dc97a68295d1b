"""The cost model: rows are added while they make tokens cheaper."""

from itertools import accumulate, chain, product, repeat
from operator import mul

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.engine.speculation.cost_model import (
    MARGIN,
    ModelCosts,
    Offer,
    Slowness,
    StepTimes,
    best_counts,
    best_depth,
)

CHEAP = StepTimes((1, 8, 64), (1.0, 1.0, 8.0))
"""Up to 8 rows cost as much as one; beyond, a row costs an eighth of it."""
CHANCES = st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0])


def test_times_between_the_measured_numbers_are_linear() -> None:
    times = StepTimes((1, 2, 4), (1.0, 2.0, 6.0))
    assert [times.of(rows) for rows in (1, 2, 3, 4, 6)] == [1.0, 2.0, 4.0, 6.0, 10.0]
    assert StepTimes((1,), (2.0,)).of(3) == 6.0


def test_the_shortest_round_counts_and_more_rows_never_take_less() -> None:
    durations = chain([3.0, 5.0, 4.0, 2.0, 1.0, 6.0], repeat(4.0))
    assert StepTimes.measure(lambda _: next(durations), 3).seconds == (1.0, 1.0, 4.0)


def test_steps_are_measured_until_they_get_no_faster() -> None:
    numbers = iter(range(1000))
    times = StepTimes.measure(lambda rows: rows + max(0.0, 5.0 - 0.1 * next(numbers)), 2)
    assert times.seconds == (1.0, 2.0)
    assert 50 < next(numbers) < 60
    assert StepTimes.measure(lambda _: 0.5 ** next(numbers), 2).seconds[0] > 0
    assert next(numbers) < 200, "steps that never settle are measured no longer"


def test_a_clock_that_measures_nothing_gives_positive_times() -> None:
    times = StepTimes.measure(lambda _: 0.0, 3)
    assert times.of(1) > 0
    assert best_counts({"a": Offer(0.5, 5)}, 1, times.of)[0] == {"a": 5}


def test_free_rows_are_used_and_dear_ones_are_not() -> None:
    assert best_counts({"a": Offer(0.5, 5)}, 1, CHEAP.of)[0] == {"a": 5}
    linear = StepTimes((1, 64), (1.0, 64.0))
    assert best_counts({"a": Offer(0.9, 5)}, 1, linear.of) == ({}, 1.0)
    assert best_counts({"a": Offer(0.9, 5)}, 8, CHEAP.of) == ({}, 1.0)


def test_a_draft_ends_after_its_forced_tokens_where_the_others_do_not_pay() -> None:
    rows = StepTimes((1, 64), (1.0, 10.0))
    assert best_counts({"a": Offer(0.1, 5, 3, 0.99)}, 1, rows.of)[0] == {"a": 3}
    assert best_counts({"a": Offer(0.8, 5, 3, 0.99)}, 1, rows.of)[0] == {"a": 5}


def test_the_likelier_draft_gets_the_rows() -> None:
    counts, _ = best_counts(
        {"a": Offer(0.9, 9), "b": Offer(0.7, 9), "c": Offer(0.5, 0)}, 3, CHEAP.of
    )
    assert counts.keys() == {"a", "b"}
    assert counts["a"] > counts["b"]
    assert sum(counts.values()) == 5


@given(
    offers=st.lists(
        st.builds(Offer, CHANCES, st.integers(0, 3), st.integers(0, 3), CHANCES), max_size=3
    ),
    others=st.integers(0, 3),
    slopes=st.lists(st.sampled_from([0.0, 0.05, 0.3, 1.0]), min_size=3, max_size=3),
)
def test_no_other_counts_give_more_tokens_a_second(
    offers: list[Offer], others: int, slopes: list[float]
) -> None:
    seconds = [1.0]
    for slope, width in zip(slopes, (1, 2, 8), strict=True):
        seconds.append(seconds[-1] + slope * width)
    times = StepTimes((1, 2, 4, 12), tuple(seconds))
    named = {str(number): offer for number, offer in enumerate(offers)}
    size = len(offers) + others
    if not size:
        return

    def rate(counts: tuple[int, ...]) -> float:
        tokens = float(size)
        for offer, count in zip(offers, counts, strict=True):
            tokens += sum(accumulate(map(offer.chance, range(count)), mul))
        return tokens / times.of(size + sum(counts))

    every = product(*(range(offer.count + 1) for offer in offers))
    best = max(map(rate, every), default=0.0)
    chosen, gain = best_counts(named, size, times.of)
    got = rate(tuple(chosen.get(str(number), 0) for number in range(len(offers))))
    plain = rate((0,) * len(offers))
    if chosen:
        assert got == pytest.approx(best)
        assert got > plain
        assert gain == pytest.approx(got / plain)
    else:
        assert best <= MARGIN * plain * (1 + 1e-9)
        assert gain == 1.0


def test_a_draft_model_pays_for_its_own_steps() -> None:
    assert best_depth([Offer(0.8, 5)], CHEAP.of, ModelCosts(0.1)) == 5
    assert best_depth([Offer(0.8, 5)], CHEAP.of, ModelCosts(0.9)) == 0
    assert best_depth([Offer(0.3, 5)], CHEAP.of, ModelCosts(0.1)) in (1, 2)
    assert best_depth([Offer(0.0, 5)], CHEAP.of, ModelCosts(0.1)) == 0
    assert best_depth([Offer(0.8, 5)] * 8, CHEAP.of, ModelCosts(0.1)) == 0


def test_a_draft_model_drafts_no_more_than_a_sequence_has_left() -> None:
    assert best_depth([Offer(0.8, 2)], CHEAP.of, ModelCosts(0.1)) == 2
    # With four of five sequences at their last tokens, deeper drafts would be for one alone.
    ending = [Offer(0.8, 5), *[Offer(0.8, 1)] * 4]
    assert best_depth(ending[:1], CHEAP.of, ModelCosts(0.3)) > 1
    assert best_depth(ending, CHEAP.of, ModelCosts(0.3)) == 1


def test_a_draft_model_drafts_only_where_it_gains_more_than_other_drafts() -> None:
    gain = sum(0.8**number for number in range(6)) / 1.5
    assert best_depth([Offer(0.8, 5)], CHEAP.of, ModelCosts(0.1), gain - 0.01) == 5
    assert best_depth([Offer(0.8, 5)], CHEAP.of, ModelCosts(0.1), gain + 0.01) == 0


def test_a_draft_model_catches_up_only_for_enough_tokens() -> None:
    assert (
        best_depth([Offer(0.8, 5)], CHEAP.of, ModelCosts(0.1, catch_up_s=20.0, tokens_left=10)) == 0
    )
    assert (
        best_depth([Offer(0.8, 5)], CHEAP.of, ModelCosts(0.1, catch_up_s=20.0, tokens_left=500))
        == 5
    )


def test_slowness_follows_the_steps_but_not_a_single_pause() -> None:
    slowness = Slowness()
    slowness.add(1, 1000.0, 1.0)
    assert slowness.of(1) < 1.2
    for _ in range(200):
        slowness.add(1, 3.0, 1.0)
    assert slowness.of(1) == pytest.approx(3.0, rel=0.01)


def test_slowness_of_other_rows_is_that_of_the_nearest() -> None:
    slowness = Slowness()
    assert slowness.of(5) == 1.0
    for _ in range(200):
        slowness.add(4, 2.0, 1.0)
        slowness.add(8, 3.0, 1.0)
    assert [round(slowness.of(rows)) for rows in (1, 4, 5, 7, 8, 99)] == [2, 2, 2, 3, 3, 3]


def test_a_step_that_was_slow_once_is_expected_to_be_as_slow_as_smaller_ones_in_the_end() -> None:
    slowness = Slowness()
    for _ in range(50):
        slowness.add(6, 2.0, 1.0)
    slowness.add(1, 1.0, 1.0)
    assert slowness.of(1) == pytest.approx(2.0, rel=0.1), "it begins as its neighbour"
    for _ in range(1000):
        slowness.add(1, 1.0, 1.0)
    assert slowness.of(6) == pytest.approx(1.0, rel=0.1)
    for _ in range(1000):
        slowness.add(6, 2.0, 1.0)
    assert slowness.of(1) == pytest.approx(1.0), "larger steps say nothing of it"
