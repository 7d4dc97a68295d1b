"""The NumPy sampler against a slow twin, against the exact distribution, and by setting."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from nanovllm.model.numpy_sampler import draw_token, sample
from tests.support.sampling import EVERY_KIND, Row, make_sampling, rows_of
from tests.support.slow_sampler import RoundingDecidesError, edited, filtered, slow_token

VOCAB = 12
INF = math.inf
LOGITS = st.lists(
    st.integers(-24, 24).map(lambda quarter: quarter / 4), min_size=VOCAB, max_size=VOCAB
)  # coarse, so that many are equal
ROWS = rows_of(VOCAB, max_tokens=6, max_bias=4)


def run(
    logits: Sequence[Sequence[float]] | np.ndarray, rows: Sequence[Row]
) -> tuple[list[int | None], np.ndarray]:
    """The token of each row, None where there was none, and the logits as they were changed."""
    changed = np.array(logits, dtype=np.float32)
    tokens, has_token = sample(changed, make_sampling(rows))
    return [
        token if ok else None for token, ok in zip(tokens.tolist(), has_token.tolist(), strict=True)
    ], changed


def token_of(logits: Sequence[float], row: Row) -> int | None:
    return run([logits], [row])[0][0]


def possible(logits: Sequence[float], row: Row, *, draws: int = 300) -> set[int | None]:
    """Tokens that come up in so many draws."""
    return set(
        run([logits] * draws, [replace(row, position=position) for position in range(draws)])[0]
    )


@given(cases=st.lists(st.tuples(LOGITS, ROWS), min_size=1, max_size=6))
def test_every_row_gets_what_the_slow_twin_gives_it(cases: list[tuple[list[float], Row]]) -> None:
    try:
        expected = [slow_token(logits, row) for logits, row in cases]
    except RoundingDecidesError:
        reject()
    assert run([logits for logits, _ in cases], [row for _, row in cases])[0] == expected


@given(cases=st.lists(st.tuples(LOGITS, ROWS), min_size=1, max_size=6), data=st.data())
def test_every_row_gets_to_the_bit_what_it_gets_alone(
    cases: list[tuple[list[float], Row]], data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(cases))))
    tokens, changed = run(
        [cases[place][0] for place in order], [cases[place][1] for place in order]
    )
    for row, place in enumerate(order):
        alone, alone_changed = run([cases[place][0]], [cases[place][1]])
        assert alone == [tokens[row]]
        np.testing.assert_array_equal(alone_changed[0], changed[row])


def test_rows_do_not_influence_each_other_at_real_size() -> None:
    random = np.random.default_rng(5)
    logits = random.normal(-30, 4, (8, 50257)).astype(np.float32)
    rows = [
        Row(seed=1),
        Row(temperature=0.0),
        Row(top_k=50, seed=2),
        Row(top_p=0.95, seed=3),
        Row(min_p=0.05, temperature=0.8, seed=4),
        Row(repetition=1.2, output=range(100), seed=5),
        Row(top_k=40, top_p=0.9, temperature=1.3, seed=6),
        Row(allowed=range(5, 30000), seed=7),
    ]
    tokens, changed = run(logits, rows)
    for row in range(8):
        alone, alone_changed = run(logits[row : row + 1], rows[row : row + 1])
        assert alone == [tokens[row]]
        np.testing.assert_array_equal(alone_changed[0], changed[row])


# Distributions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        Row(),
        Row(temperature=0.6),
        Row(temperature=2.5),
        Row(top_k=4),
        Row(top_p=0.8),
        Row(min_p=0.1),
        Row(top_k=5, top_p=0.7, min_p=0.02),
        Row(temperature=1.5, top_k=6, top_p=0.9),
        Row(repetition=1.5, presence=0.5, frequency=0.3, prompt=[0], output=[1, 1, 9]),
        Row(bias={3: 2.0, 0: -INF}),
        Row(allowed=[1, 2, 7, 8]),
        Row(choice=3, seed=99),
    ],
)
def test_tokens_come_up_as_often_as_they_should(row: Row) -> None:
    logits = np.random.default_rng(11).normal(0, 1.5, VOCAB).astype(np.float32).tolist()
    draws = 6000
    expected = np.array(filtered(edited(logits, row), row)) * draws
    tokens, _ = run(
        [logits] * draws, [replace(row, position=position) for position in range(draws)]
    )
    counts = np.bincount([token for token in tokens if token is not None], minlength=VOCAB)
    assert counts[expected == 0].sum() == 0, "a token came up that the settings exclude"
    used = expected > 5
    freedom = int(used.sum()) - 1
    chi_square = float(((counts[used] - expected[used]) ** 2 / expected[used]).sum())
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom) + 8, (
        "so far off once in more than 10,000 times"
    )


def test_choices_of_one_seed_are_drawn_apart_from_each_other() -> None:
    logits = [0.0] * VOCAB
    first, second = (
        run([logits] * 500, [Row(seed=3, choice=choice, position=p) for p in range(500)])[0]
        for choice in (0, 1)
    )
    equal = sum(a == b for a, b in zip(first, second, strict=True))
    assert equal < 500 * 2 / VOCAB


# Greedy -------------------------------------------------------------------------------------------


def test_greedy_takes_the_best_and_of_equals_the_first() -> None:
    assert token_of([1, 5, 5, 2], Row(temperature=0.0)) == 1
    assert token_of([-5, -9, -5, -6], Row(temperature=0.0, top_p=0.1, seed=77)) == 0


def test_a_tiny_temperature_is_as_good_as_greedy() -> None:
    assert possible([1.0, 5.0, 4.99, 2.0], Row(temperature=1e-5)) == {1}
    assert possible([-90.0, -100.0, -90.0], Row(temperature=1e-5)) == {0, 2}


# Filters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("top_k", "expected"),
    [
        (1, {2}),
        (2, {1, 2}),
        (3, {0, 1, 2, 3}),
        (4, {0, 1, 2, 3}),
        (5, {0, 1, 2, 3, 4}),
        (6, {0, 1, 2, 3, 4}),
        (99, {0, 1, 2, 3, 4}),
    ],
)
def test_top_k_keeps_the_best_and_whatever_ties_with_the_last_of_them(
    top_k: int, expected: set[int]
) -> None:
    assert possible([1.0, 1.5, 2.0, 1.0, 0.0], Row(top_k=top_k)) == expected


def test_top_k_counts_what_the_other_settings_left() -> None:
    assert possible([3.0, 2.0, 1.0, 0.0], Row(top_k=2, bias={0: -INF})) == {1, 2}
    assert possible([3.0, 2.0, 1.0, 0.0], Row(top_k=3, allowed=[1, 3])) == {1, 3}


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (1e-30, {0}),
        (0.39, {0}),
        (0.41, {0, 1, 2}),
        (0.79, {0, 1, 2}),
        (0.81, {0, 1, 2, 3}),
        (0.97, {0, 1, 2, 3, 4}),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it_and_ties(
    top_p: float, expected: set[int]
) -> None:
    assert possible(np.log([0.4, 0.2, 0.2, 0.15, 0.05]).tolist(), Row(top_p=top_p)) == expected


@given(
    logits=LOGITS,
    top_p=st.floats(1e-40, 1.0, exclude_max=True, exclude_min=True),
    spread=st.sampled_from([0.0, 1.0, 50.0]),
    row=ROWS,
)
def test_filters_never_drop_everything(
    logits: list[float], top_p: float, spread: float, row: Row
) -> None:
    scaled = [value * spread for value in logits]
    token = token_of(
        scaled,
        replace(row, top_p=top_p, bias={}, allowed=None, temperature=max(row.temperature, 0.1)),
    )
    assert token is not None
    assert 0 <= token < VOCAB


def test_top_p_counts_what_top_k_left() -> None:
    """Of 0.4, 0.3, 0.2 and 0.1 the first two are 0.57 and 0.43 of what is left."""
    assert possible(np.log([0.4, 0.3, 0.2, 0.1]).tolist(), Row(top_k=2, top_p=0.5)) == {0}
    assert possible(np.log([0.4, 0.3, 0.2, 0.1]).tolist(), Row(top_p=0.5)) == {0, 1}


def test_min_p_is_relative_to_the_best_after_temperature() -> None:
    logits = np.log([0.5, 0.3, 0.15, 0.05]).tolist()
    assert possible(logits, Row(min_p=0.59)) == {0, 1}
    assert possible(logits, Row(min_p=0.61)) == {0}
    assert possible(logits, Row(min_p=0.61, temperature=2.0)) == {0, 1}
    assert possible([2.0, 2.0, 1.9], Row(min_p=1.0)) == {0, 1}


@pytest.mark.parametrize(
    ("scores", "noise", "token"),
    [
        ([1.0, 1.0], [0.1, 0.2], 0),
        ([1.0, 1.0], [0.2, 0.1], 1),
        ([1.0, 1.0], [0.1, 0.1], 0),
        ([math.log(2.0), 0.0], [1.9, 1.0], 0),
        ([math.log(2.0), 0.0], [2.1, 1.0], 1),
        ([-5000.0, 0.0, -5000.0], [1e-10, 22.0, 1e-10], 1),
        ([-INF, 2.0, 2.0, 2.0, 2.0, -INF], [1e-10, 3.0, 1.0, 2.0, 1.0, 1e-10], 2),
        ([-INF, 3.0, -INF], [1e-10, 22.0, 1e-10], 1),
    ],
)
def test_a_draw_is_the_smallest_noise_divided_by_the_probability(
    scores: list[float], noise: list[float], token: int
) -> None:
    assert draw_token(np.array(scores, dtype=np.float32), np.array(noise)) == token


def test_similar_rows_draw_the_same_token_as_often_as_a_race_says() -> None:
    """Token i wins both races with the probability 1 / sum_j max(p_j / p_i, q_j / q_i)."""
    random, draws = np.random.default_rng(12), 4000
    p, q = random.dirichlet(np.ones(VOCAB), 2)
    rows = [Row(position=position) for position in range(draws)]
    first, second = (run([np.log(weights).tolist()] * draws, rows)[0] for weights in (p, q))
    equal = sum(a == b for a, b in zip(first, second, strict=True)) / draws
    ratios = np.maximum(p / p[:, None], q / q[:, None])
    expected = float((1 / ratios.sum(axis=1)).sum())
    assert abs(equal - expected) < 4 * math.sqrt(expected * (1 - expected) / draws)


# Edits --------------------------------------------------------------------------------------------


def test_a_bias_of_100_decides() -> None:
    logits = [5.0, 0.0, -20.0]
    assert possible(logits, Row(bias={2: 100.0})) == {2}
    assert possible(logits, Row(bias={0: -100.0}, temperature=0.5)) == {1}
    assert token_of(logits, Row(bias={2: 24.0}, temperature=0.0)) == 0
    assert token_of(logits, Row(bias={2: 26.0}, temperature=0.0)) == 2


def test_only_allowed_tokens_come_up() -> None:
    assert possible([9.0, 0.0, 0.5, -4.0], Row(allowed=[1, 2])) == {1, 2}
    assert possible([9.0, 0.0, 0.5, -4.0], Row(allowed=[3])) == {3}
    assert token_of([9.0, 0.0, 0.5, -4.0], Row(allowed=[3, 1], temperature=0.0)) == 1
    assert possible([9.0, 0.0, 0.5, -4.0], Row(allowed=[1, 2], bias={1: -INF, 0: 100.0})) == {2}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "others", [{"bias": dict.fromkeys(range(4), -INF)}, {"allowed": [1], "bias": {1: -INF}}]
)
def test_where_everything_is_forbidden_there_is_no_token(
    temperature: float, others: dict[str, object]
) -> None:
    row = Row(temperature=temperature, top_k=2, top_p=0.5, min_p=0.1, **others)  # type: ignore[arg-type]
    assert run([[1.0, 2.0, 3.0, 4.0]] * 2, [row, Row(temperature=0.0)])[0] == [None, 3]


@pytest.mark.parametrize(
    "bad",
    [
        *([math.nan] * 4, [0.0, math.nan, 0.0, 0.0], [0.0, INF, 0.0, 0.0], [-INF] * 4),
        [INF, -INF, 0.0, math.nan],
    ],
)
@pytest.mark.parametrize("row", EVERY_KIND)
def test_a_row_of_a_network_that_overflowed_has_no_token_and_the_others_theirs(
    bad: list[float], row: Row
) -> None:
    sound = [0.5, 2.0, 1.0, -3.0]
    tokens, _ = run([sound, bad, sound], [row, row, row])
    assert tokens == [token_of(sound, row), None, token_of(sound, row)]


# Penalties ----------------------------------------------------------------------------------------


SIGNED = [2.0, -2.0, 2.0, -2.0, 0.0]


@pytest.mark.parametrize(
    ("logits", "row", "expected"),
    [
        (SIGNED, Row(repetition=2.0, prompt=[0], output=[1]), [1.0, -4.0, 2.0, -2.0, 0.0]),
        (SIGNED, Row(repetition=0.5, prompt=[0, 4], output=[1, 1]), [4.0, -1.0, 2.0, -2.0, 0.0]),
        ([1.0] * 4, Row(presence=0.5, prompt=[0, 1], output=[1, 2, 2, 2]), [1.0, 0.5, 0.5, 1.0]),
        (
            [1.0] * 4, Row(frequency=0.5, prompt=[0, 0, 1], output=[1, 2, 2, 2]),
            [1.0, 0.5, -0.5, 1.0],
        ),
        ([1.0] * 4, Row(frequency=-0.5, presence=0.25, output=[2, 2]), [1.0, 1.0, 1.75, 1.0]),
    ],
)  # fmt: skip
def test_penalties_change_the_logits_of_tokens_seen(
    logits: list[float], row: Row, expected: list[float]
) -> None:
    """A repetition makes a token less likely; presence and frequency count the answer only."""
    changed = run([logits], [replace(row, temperature=0.0)])[1][0]
    assert [round(value, 4) for value in changed.tolist()] == expected


def test_a_forbidden_token_stays_forbidden_under_penalties() -> None:
    for row in (Row(repetition=2.0), Row(repetition=0.5), Row(presence=-2.0, frequency=-2.0)):
        assert possible([1.0, 2.0, 0.5], replace(row, bias={1: -INF}, output=[1, 1])) <= {0, 2}


# Draws --------------------------------------------------------------------------------------------


def test_a_draw_depends_on_seed_choice_and_position() -> None:
    logits = [0.0] * 1000
    row = Row(seed=5, choice=1, position=9)
    assert token_of(logits, row) == token_of(logits, row)
    others = [
        *(replace(row, seed=6), replace(row, choice=2), replace(row, position=10)),
        replace(row, seed=5 + 2**32),
    ]
    assert len({token_of(logits, other) for other in [row, *others]}) == 5


def test_a_greedy_row_uses_up_no_draw() -> None:
    logits = [0.0] * 100
    rows = [Row(seed=seed) for seed in range(4)]
    mixed = [rows[0], Row(temperature=0.0), rows[1], Row(temperature=0.0), rows[2], rows[3]]
    assert [
        token
        for token, row in zip(run([logits] * 6, mixed)[0], mixed, strict=True)
        if row.temperature
    ] == run([logits] * 4, rows)[0]
