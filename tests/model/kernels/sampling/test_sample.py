"""Compiled sampling at every vector width gives NumPy's tokens, except where rounding decides."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.sampler import CompiledRowSampler
from nanovllm.model.kernels.threads.pool import ThreadPool
from nanovllm.model.logprobs import token_logprobs
from nanovllm.model.numpy_sampler import apply_filters, sample
from nanovllm.model.sampling import TokenLists, TokenLogprobs
from tests.support.sampling import EVERY_KIND, Row, make_sampling, noise_of, rows_of
from tests.support.targets import WHOLE_TARGETS, load_whole

GREEDY = Row(temperature=0.0)
VOCAB = 1000  # several groups of columns, the last one not full, at every width
INF = math.inf
TOKEN = st.integers(0, VOCAB - 1)
ROWS = rows_of(
    VOCAB,
    max_tokens=40,
    max_bias=10,
    top_k=[50, 70, 400],
    top_p=[1e-30, float(np.nextafter(np.float32(1), np.float32(0)))],
    min_p=[1e-30],
    logprobs=[None, 0, 1, 5, 20, VOCAB, VOCAB + 7],
)


@st.composite
def logits_of(draw: st.DrawFn, rows: int) -> np.ndarray:
    """Draw rows of several kinds: many ties, all equal, a wide spread, far from zero, one peak."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = random.standard_normal((rows, VOCAB), dtype=np.float32) * 3
    for row in logits:
        kind = draw(
            st.sampled_from(["normal", "coarse", "equal", "zeros", "wide", "far", "one", "flat"])
        )
        if kind == "coarse":
            row[:] = np.round(row)
        elif kind == "equal":
            row[:] = row[0]
        elif kind == "zeros":
            row[:] = np.where(row > 2, row, np.where(row > 0, np.float32(0.0), np.float32(-0.0)))
        elif kind == "wide":
            row[:] = row * np.float32(100)
        elif kind == "far":
            row[:] = row - np.float32(1000)
        elif kind == "one":
            row[draw(TOKEN)] = 200.0
        elif kind == "flat":
            row[:] = row * np.float32(1e-3)
    return logits


@pytest.fixture(scope="module", params=WHOLE_TARGETS)
def sampler(request: pytest.FixtureRequest) -> CompiledRowSampler:
    return make_sampler(VOCAB, request.param, threads=2)


def make_sampler(vocab: int, target: KernelTarget, *, threads: int) -> CompiledRowSampler:
    library = load_whole(target)
    return CompiledRowSampler(vocab, ThreadPool(threads, library), library, target)


def compiled(
    sampler: CompiledRowSampler, logits: np.ndarray, rows: Sequence[Row]
) -> tuple[list[int | None], list[TokenLogprobs | None]]:
    before = logits.copy()
    actual = sampler.sample(logits, make_sampling(rows))
    np.testing.assert_array_equal(logits, before)
    pairs = zip(actual.token_ids.tolist(), actual.has_token.tolist(), strict=True)
    return [token if has else None for token, has in pairs], actual.logprobs


def probabilities(changed: np.ndarray, row: Row) -> np.ndarray:
    """Return the tokens' probabilities from edited logits, by the NumPy filters in float64."""
    with np.errstate(over="ignore", invalid="ignore"):
        scores = changed / np.float32(row.temperature)
        apply_filters(
            scores,
            top_k=row.top_k,
            top_p=float(np.float32(row.top_p)),
            min_p=float(np.float32(row.min_p)),
        )
    weights = np.exp(scores.astype(np.float64) - scores.max())
    shares: np.ndarray = weights / weights.sum()
    return shares


def assert_same_token(actual: int, expected: int, changed: np.ndarray, row: Row) -> None:
    """Assert that tokens are equal, unless they tie or top_p is at a boundary within rounding."""
    if actual == expected:
        return
    race = probabilities(changed, row) / noise_of(row, VOCAB)[: changed.size]
    if math.isclose(race[actual], race[expected], rel_tol=1e-6):
        return
    assert row.top_p < 1, (actual, expected, race[actual], race[expected])
    whole = probabilities(changed, replace(row, top_p=1.0))
    by_likelihood = np.sort(whole)[::-1]
    assert np.abs(np.cumsum(by_likelihood) - np.float32(row.top_p)).min() < 1e-6, (
        actual,
        expected,
        race[actual],
        race[expected],
    )


@settings(max_examples=60)
@given(data=st.data(), rows=st.lists(ROWS, min_size=1, max_size=6))
def test_every_row_gets_the_numpy_runners_token_and_report(
    sampler: CompiledRowSampler, data: st.DataObject, rows: list[Row]
) -> None:
    logits = data.draw(logits_of(len(rows)))
    actual, reports = compiled(sampler, logits, rows)
    changed = logits.copy()
    tokens, has_token = sample(
        changed, make_sampling([replace(row, temperature=0.0) for row in rows])
    )  # edits and penalties alone
    drawn, _ = sample(logits.copy(), make_sampling(rows))
    for i, row in enumerate(rows):
        token = actual[i]
        assert (token is not None) == has_token[i]
        if token is not None:
            assert_same_token(
                token, int(tokens[i] if row.temperature == 0 else drawn[i]), changed[i], row
            )
        report = reports[i]
        assert (report is None) == (row.logprobs is None)
        if report is not None and token is not None:
            check_report(report, logits[i], token, row.logprobs or 0)


def check_report(report: TokenLogprobs, logits: np.ndarray, token: int, count: int) -> None:
    (expected,) = token_logprobs(
        logits[None], np.array([token], dtype=np.int64), np.array([count], dtype=np.int64)
    )
    assert report.token_ids == expected.token_ids
    assert report.rank == expected.rank
    np.testing.assert_allclose(report.logprobs, expected.logprobs, rtol=1e-6, atol=2e-6)
    assert {type(value) for value in (*report.token_ids, *report.logprobs)} == {int, float}


@pytest.mark.parametrize(
    "row",
    [
        Row(),
        Row(temperature=0.7, top_p=0.9),
        Row(top_k=50),
        Row(min_p=0.05),
        Row(top_k=100, top_p=0.95, temperature=1.2),
    ],
)
def test_thousands_of_draws_are_those_of_numpy(sampler: CompiledRowSampler, row: Row) -> None:
    draws = 1500
    logits = np.random.default_rng(3).standard_normal((draws, VOCAB), dtype=np.float32) * 3
    rows = [replace(row, seed=i, position=i) for i in range(draws)]
    actual, _ = compiled(sampler, logits, rows)
    expected, _ = sample(logits.copy(), make_sampling(rows))
    for i in range(draws):
        token = actual[i]
        assert token is not None
        assert_same_token(token, int(expected[i]), logits[i], rows[i])
    assert sum(a == b for a, b in zip(actual, expected.tolist(), strict=True)) >= draws - 3


@given(data=st.data(), rows=st.lists(ROWS, min_size=2, max_size=9))
@settings(max_examples=40)
def test_bits_depend_neither_on_company_nor_on_threads(
    sampler: CompiledRowSampler, data: st.DataObject, rows: list[Row]
) -> None:
    logits = data.draw(logits_of(len(rows)))
    together = compiled(sampler, logits, rows)
    order = data.draw(st.permutations(range(len(rows))))
    tokens, reports = compiled(sampler, logits[order], [rows[i] for i in order])
    assert [tokens[order.index(i)] for i in range(len(rows))] == together[0]
    assert [reports[order.index(i)] for i in range(len(rows))] == together[1]
    for i, row in enumerate(rows):
        assert compiled(sampler, logits[i : i + 1], [row]) == (
            [together[0][i]],
            [together[1][i]],
        )


@pytest.mark.parametrize("threads", [1, 3, 5])
def test_any_number_of_threads_gives_the_same_bits(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanovllm.model.kernels.sampler._SHARED_SCORES", 0)
    logits = np.random.default_rng(4).standard_normal((23, VOCAB), dtype=np.float32) * 3
    rows = [Row(seed=i, top_p=0.9, top_k=i * 10, logprobs=i % 4) for i in range(23)]
    results = [
        compiled(make_sampler(VOCAB, WHOLE_TARGETS[0], threads=count), logits, rows)
        for count in (threads, 2)
    ]
    assert results[0] == results[1]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("index", [0, 500, VOCAB - 1])
@pytest.mark.parametrize("row", EVERY_KIND)
def test_a_row_that_is_not_finite_has_no_token_and_the_others_theirs(
    sampler: CompiledRowSampler, bad: float, index: int, row: Row
) -> None:
    logits = np.random.default_rng(5).standard_normal((3, VOCAB), dtype=np.float32)
    rows = [replace(row, logprobs=2)] * 3
    expected = compiled(sampler, logits, rows)
    logits[1, index] = bad
    tokens, reports = compiled(sampler, logits, rows)
    assert tokens == [expected[0][0], None, expected[0][2]]
    assert (reports[0], reports[2]) == (expected[1][0], expected[1][2])
    assert reports[1] is not None
    assert np.isnan(reports[1].logprobs).all()


def test_where_everything_is_forbidden_there_is_no_token(sampler: CompiledRowSampler) -> None:
    logits = np.zeros((3, VOCAB), dtype=np.float32)
    logits[2] = -INF
    rows = [
        Row(bias=dict.fromkeys(range(VOCAB), -INF)),
        Row(allowed=[4], bias={4: -INF}, temperature=0.0),
        Row(top_k=3),
    ]
    assert compiled(sampler, logits, rows)[0] == [None, None, None]


def test_padding_of_a_row_is_no_token(sampler: CompiledRowSampler) -> None:
    """Rows of logits are as long as all panels together, and undefined beyond the vocabulary."""
    padded = np.full((4, VOCAB + 56), np.nan, dtype=np.float32)
    padded[:, VOCAB:] = [[1e9], [np.inf], [np.nan], [0.0]]
    logits = padded[:, :VOCAB]
    logits[:] = np.random.default_rng(6).standard_normal((4, VOCAB), dtype=np.float32) - 50
    rows = [
        Row(temperature=0.0, logprobs=3),
        Row(top_p=0.5, logprobs=0),
        Row(top_k=7, logprobs=9),
        Row(logprobs=1),
    ]
    assert compiled(sampler, logits, rows) == compiled(sampler, np.array(logits), rows)


@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 255, 256, 257, 300])
def test_vocabularies_of_any_size(vocab: int) -> None:
    random = np.random.default_rng(vocab)
    logits = random.standard_normal((40, vocab), dtype=np.float32) * 2
    rows = [
        Row(
            seed=i,
            top_k=i % 7,
            top_p=[1.0, 0.9, 0.4][i % 3],
            logprobs=i % 5,
            temperature=[0.0, 1.0, 0.5, 2.0][i % 4],
        )
        for i in range(40)
    ]
    for target in WHOLE_TARGETS:
        tokens, reports = compiled(make_sampler(vocab, target, threads=1), logits, rows)
        expected, _ = sample(logits.copy(), make_sampling(rows))
        for i in range(40):
            token, report = tokens[i], reports[i]
            assert token is not None
            assert report is not None
            assert_same_token(token, int(expected[i]), logits[i], rows[i])
            check_report(report, logits[i], token, rows[i].logprobs or 0)


def test_plain_rows_are_argmax(sampler: CompiledRowSampler) -> None:
    logits = np.round(np.random.default_rng(7).standard_normal((50, VOCAB), dtype=np.float32) * 2)
    actual = sampler.sample(logits, make_sampling([GREEDY] * 50))
    np.testing.assert_array_equal(actual.token_ids, logits.argmax(axis=1))
    assert actual.has_token.all()


def test_reports_of_given_tokens_are_those_of_sampled_ones(sampler: CompiledRowSampler) -> None:
    """Scoring a text must give the bits that generating it gave."""
    logits = np.random.default_rng(8).standard_normal((12, VOCAB), dtype=np.float32) * 4
    rows = [Row(seed=i, temperature=0.8, logprobs=i % 4) for i in range(12)]
    tokens, reports = compiled(sampler, logits, rows)
    given = np.array(tokens, dtype=np.int64)
    assert sampler.logprobs(logits, given, np.arange(12, dtype=np.int64) % 4) == reports


def test_tokens_that_are_nearly_impossible_come_up_when_their_noise_says_so(
    sampler: CompiledRowSampler,
) -> None:
    """Of 1000 tokens, the first 999 have a probability of 7.6e-7 together; one has 8e-10 noise."""
    logits = np.full((1, VOCAB), -21.0, dtype=np.float32)
    logits[0, -1] = 0.0
    row = Row(seed=9, position=1059006)
    assert noise_of(row, VOCAB)[142] < 1e-9
    assert sample(logits.copy(), make_sampling([row]))[0] == [142]
    assert compiled(sampler, logits, [row])[0] == [142]


@pytest.mark.parametrize(
    ("name", "dtype"), [("edit_values", np.float64), ("history_counts", np.int32)]
)
def test_settings_of_another_type_are_refused(
    sampler: CompiledRowSampler, name: str, dtype: type
) -> None:
    """Compiled code would read their bits as something else."""
    logits, edits = (
        np.zeros((1, VOCAB), dtype=np.float32),
        TokenLists(*(np.array(i, dtype=np.int64) for i in ([0, 1], [3]))),
    )
    values = np.ones(1, dtype=np.float32)
    settings = replace(make_sampling([GREEDY]), edits=edits, edit_values=values)
    assert sampler.sample(logits, settings).token_ids[0] == 3
    object.__setattr__(settings, name, np.ones(1, dtype=dtype))
    with pytest.raises(TypeError, match=name):
        sampler.sample(logits, settings)
