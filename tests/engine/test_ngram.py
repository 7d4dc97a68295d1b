"""NgramIndex: the index finds what a search through the whole text finds."""

from hypothesis import given
from hypothesis import strategies as st

from nanovllm.engine.ngram import NgramIndex


def found_by_search(
    tokens: list[int], shortest: int, longest: int, count: int, num_guessed: int = 0
) -> tuple[int, ...]:
    """Return what followed the longest n-gram at the end, where it last occurred before.

    The last `num_guessed` tokens are no occurrence.
    """
    for length in range(longest, shortest - 1, -1):
        ngram = tokens[-length:]
        for start in range(len(tokens) - length - max(num_guessed, 1), -1, -1):
            if len(ngram) == length and tokens[start : start + length] == ngram:
                period = tokens[start + length :]
                return tuple((period * count)[:count])
    return ()


@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=12),
    shortest=st.integers(1, 3),
    extra=st.integers(0, 2),
    count=st.integers(1, 6),
    step=st.integers(1, 4),
    guessed=st.lists(st.integers(0, 3), max_size=3),
)
def test_the_index_finds_what_a_search_finds(
    tokens: list[int], shortest: int, extra: int, count: int, step: int, guessed: list[int]
) -> None:
    """Up to 8 earlier positions, which texts of 12 tokens rarely exceed, are compared."""
    index = NgramIndex(shortest, shortest + extra)
    for end in range(1, len(tokens) + 1, step):
        known = [*tokens[:end], *guessed]
        expected = found_by_search(known, shortest, shortest + extra, count, len(guessed))
        drafted = index.draft(known, count, len(guessed))
        if sum(known[i : i + shortest] == known[-shortest:] for i in range(end)) <= 8:
            assert drafted == expected


def test_the_longest_match_counts_and_of_equal_ones_the_latest() -> None:
    index = NgramIndex(1, 3)
    assert index.draft([1, 2, 3, 9, 5, 3, 8, 1, 2, 3], 2) == (9, 5)
    assert index.matched == 3
    assert NgramIndex(1, 1).draft([1, 2, 3, 9, 5, 3, 8, 1, 2, 3], 2) == (8, 1)


def test_a_text_that_repeats_goes_on() -> None:
    assert NgramIndex(2, 4).draft([5, 6, 7, 5, 6, 7, 5, 6], 5) == (7, 5, 6, 7, 5)


def test_a_look_up_follows_few_positions() -> None:
    tokens = [0, 0, 7] + [0, 1] * 40 + [0, 0]  # the only other "0, 0" is far away
    assert NgramIndex(1, 2).draft(tokens, 1) == (0,)
    assert NgramIndex(2, 2).draft(tokens, 1) == (7,)
