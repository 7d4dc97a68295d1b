"""The generator is Philox4x32-10; the numbers of a draw depend on its key and the token alone."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.model.philox import draw_keys, exponentials, philox4x32

SEEDS = st.integers(0, 2**64 - 1)
SMALL = st.integers(0, 2**31 - 1)


def keys_of(*keys: tuple[int, int, int]) -> np.ndarray:
    """Return the keys of draws given by (seed, choice, position)."""
    seeds, choices, positions = zip(*keys, strict=True) if keys else ((), (), ())
    return draw_keys(
        np.array(seeds, dtype=np.uint64),
        np.array(choices, dtype=np.int64),
        np.array(positions, dtype=np.int64),
    )


def many(count: int, vocab: int, *, seed: int = 1) -> np.ndarray:
    """Return exp(-noise), which is uniform, of one seed at positions 0, 1, ... [count, vocab]."""
    keys = keys_of(*((seed, 0, position) for position in range(count)))
    numbers: np.ndarray = np.exp(-np.array([exponentials(key, vocab) for key in keys]))
    return numbers


def slow_philox(counter: list[int], key: list[int]) -> list[int]:
    """The paper's definition in plain integers."""
    for _ in range(10):
        high0, low0 = divmod(counter[0] * 0xD2511F53, 2**32)
        high1, low1 = divmod(counter[2] * 0xCD9E8D57, 2**32)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        (
            "00000000 00000000 00000000 00000000",
            "00000000 00000000",
            "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_the_known_answers_of_random123(counter: str, key: str, expected: str) -> None:
    def words(text: str) -> np.ndarray:
        return np.array([[int(word, 16)] for word in text.split()], dtype=np.uint32)

    np.testing.assert_array_equal(philox4x32(words(counter), words(key)), words(expected))


@given(st.lists(st.tuples(*[st.integers(0, 2**32 - 1)] * 6), min_size=1, max_size=5))
def test_every_column_is_that_of_plain_integers(columns: list[tuple[int, ...]]) -> None:
    words = np.array(columns, dtype=np.uint32).T
    expected = [slow_philox(list(column[:4]), list(column[4:])) for column in columns]
    np.testing.assert_array_equal(
        philox4x32(words[:4], words[4:]).T, np.array(expected, dtype=np.uint32)
    )


def slow_noise(words: list[int], token: int) -> float:
    """The exponential number of a token in plain integers."""
    bits = token
    for word, shift, factor in zip(
        words, (17, 11, 15), (0xED5AD4BB, 0xAC4C1B51, 0x31848BAB), strict=True
    ):
        bits = (bits + word) % 2**32
        bits = (bits ^ bits >> shift) * factor % 2**32
    return -math.log(((bits ^ bits >> 14) + 0.5) / 2**32)


@given(seed=SEEDS, choice=SMALL, position=SMALL, token=st.integers(0, 999))
def test_noise_is_a_function_of_seed_choice_position_and_token(
    seed: int, choice: int, position: int, token: int
) -> None:
    words = slow_philox([position, choice, 0, 0], [seed % 2**32, seed >> 32])[:3]
    (key,) = keys_of((seed, choice, position))
    assert key.tolist() == words
    noise = exponentials(key, 1000)
    assert noise[token] == pytest.approx(slow_noise(words, token), rel=1e-12)
    assert 2.0**-34 < noise.min() < noise.max() < 23
    np.testing.assert_array_equal(noise[:token], exponentials(key, token))


@given(keys=st.lists(st.tuples(SEEDS, SMALL, SMALL), max_size=6))
def test_a_key_does_not_depend_on_the_keys_beside_it(keys: list[tuple[int, int, int]]) -> None:
    assert keys_of(*keys).tolist() == [keys_of(key)[0].tolist() for key in keys]


def test_seed_choice_and_position_all_count() -> None:
    keys = [
        (seed, choice, position)
        for seed in (0, 1, 2**32, 2**63)
        for choice in (0, 1, 2)
        for position in (0, 1, 2)
    ]
    assert len({exponentials(key, 1)[0] for key in keys_of(*keys)}) == len(keys)


def test_no_two_tokens_of_a_large_vocabulary_get_the_same_number() -> None:
    (key,) = keys_of((3, 1, 2))
    assert np.unique(exponentials(key, 200_000)).size == 200_000


def chi_square(numbers: np.ndarray) -> float:
    """Return how uneven numbers in (0, 1) are, with 99 degrees of freedom."""
    mean = numbers.size / 100
    counts = np.bincount((numbers.ravel() * 100).astype(np.int64), minlength=100)
    return float(((counts - mean) ** 2 / mean).sum())


def test_numbers_are_spread_evenly_and_follow_no_order() -> None:
    by_position, by_token = many(2000, 50), many(2, 50_000)
    other_seed = many(2000, 50, seed=2)
    for numbers in (by_position, by_token, by_position[:, 7], by_token[0]):
        assert 52 < chi_square(numbers) < 165, "outside once in about 10,000"
        assert abs(numbers.mean() - 0.5) < 4 / math.sqrt(12 * numbers.size)
    for a, b in (
        (by_position[1:], by_position[:-1]),  # neighbouring positions
        (by_position, other_seed),
        *((by_token[:, lag:], by_token[:, :-lag]) for lag in (1, 2, 16, 256, 4096)),
        (by_token[0], by_token[1]),
    ):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / math.sqrt(a.size)
