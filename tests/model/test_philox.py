"""The generator is Philox4x32-10, and a draw depends on its key alone."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.model.philox import philox4x32, uniform

SEEDS = st.integers(0, 2**64 - 1)
SMALL = st.integers(0, 2**31 - 1)


def one(seed: int, choice: int = 0, position: int = 0) -> float:
    draw = uniform(
        np.array([seed], dtype=np.uint64),
        np.array([choice], dtype=np.int64),
        np.array([position], dtype=np.int64),
    )
    return float(draw[0])


def many(count: int, *, seed: int = 1) -> np.ndarray:
    """Draws of one seed at positions 0, 1, ..."""
    return uniform(
        np.full(count, seed, dtype=np.uint64),
        np.zeros(count, dtype=np.int64),
        np.arange(count, dtype=np.int64),
    )


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


@given(seed=SEEDS, choice=SMALL, position=SMALL)
def test_a_draw_has_53_bits_of_its_key(seed: int, choice: int, position: int) -> None:
    first, second, _, _ = slow_philox([position, choice, 0, 0], [seed % 2**32, seed >> 32])
    draw = one(seed, choice, position)
    assert draw == (first * 2**32 + second >> 11) / 2**53
    assert 0 <= draw < 1


@given(keys=st.lists(st.tuples(SEEDS, SMALL, SMALL), max_size=6))
def test_a_draw_does_not_depend_on_the_draws_beside_it(keys: list[tuple[int, int, int]]) -> None:
    seeds, choices, positions = zip(*keys, strict=True) if keys else ((), (), ())
    together = uniform(
        np.array(seeds, dtype=np.uint64),
        np.array(choices, dtype=np.int64),
        np.array(positions, dtype=np.int64),
    )
    assert together.tolist() == [one(*key) for key in keys]


def test_seed_choice_and_position_all_count() -> None:
    keys = [
        (seed, choice, position)
        for seed in (0, 1, 2**32, 2**63)
        for choice in (0, 1, 2)
        for position in (0, 1, 2)
    ]
    assert len({one(*key) for key in keys}) == len(keys)


def test_draws_are_spread_evenly_and_follow_no_order() -> None:
    draws = many(100_000)
    counts = np.bincount((draws * 100).astype(np.int64), minlength=100)
    chi_square = float(((counts - 1000.0) ** 2 / 1000.0).sum())
    assert 52 < chi_square < 165, "99 degrees of freedom: outside once in about 10,000"
    assert abs(draws.mean() - 0.5) < 4 / math.sqrt(12 * len(draws))
    for other in (draws[1:], many(99_999, seed=2)):
        assert abs(np.corrcoef(draws[:99_999], other)[0, 1]) < 4 / math.sqrt(99_999)
