"""Acceptances: running means by source, of each sequence and of all."""

import pytest

from nanovllm.engine.speculation.acceptance import Acceptances


def test_a_sequence_begins_with_the_mean_of_all_and_goes_its_own_way() -> None:
    every = Acceptances()
    first, second = Acceptances(every), Acceptances(every)
    assert [first.of("2-gram"), first.of("forced")] == [0.6, 0.9]
    for _ in range(200):
        first.add("2-gram", 3, 3)
    assert first.of("2-gram") == pytest.approx(1.0, abs=1e-4)
    assert second.of("2-gram") == every.of("2-gram") == first.of("2-gram")
    second.add("2-gram", 0, 3)
    assert second.of("2-gram") < first.of("2-gram")
    assert first.of("3-gram") == 0.6


@pytest.mark.parametrize(
    ("num_accepted", "num_drafted", "outcomes"),
    [(2, 3, [1, 1, 0]), (0, 4, [0]), (3, 3, [1, 1, 1]), (0, 0, []), (-2, 3, [])],
)
def test_what_follows_the_first_rejected_token_says_nothing(
    num_accepted: int, num_drafted: int, outcomes: list[int]
) -> None:
    acceptances, expected = Acceptances(), Acceptances()
    acceptances.add("model", num_accepted, num_drafted)
    for outcome in outcomes:
        expected.add("model", outcome, 1)
    assert acceptances.of("model") == expected.of("model")
