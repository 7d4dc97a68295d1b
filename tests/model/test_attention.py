"""Attention against its formula in float64, and paged against contiguous."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.model.attention import attention_scores, paged_attention, softmax, weighted_sum
from nanovllm.model.config import ModelConfig
from nanovllm.model.kv_cache import KVCache
from nanovllm.model.observer import ignore
from tests.support.batches import make_batch
from tests.support.float32_only import float32_only

HEADS, HEAD_DIM, BLOCK_SIZE = 2, 5, 4
SCALE = HEAD_DIM**-0.5
CONFIG = ModelConfig(
    vocab=1, max_positions=1, d_model=HEADS * HEAD_DIM, layers=2, heads=HEADS, d_ff=1
)


def attend(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float) -> np.ndarray:
    return weighted_sum(softmax(attention_scores(queries, keys, scale)), values)


def naive(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float) -> np.ndarray:
    """The formula, one query and one head at a time, in float64."""
    count, heads, _ = queries.shape
    out = np.empty(queries.shape, dtype=np.float64)
    for row, head in itertools.product(range(count), range(heads)):
        visible = len(keys) - count + row + 1
        scores = [
            scale
            * float(queries[row, head].astype(np.float64) @ keys[key, head].astype(np.float64))
            for key in range(visible)
        ]
        weights = np.exp(np.array(scores, dtype=np.float64) - max(scores))
        out[row, head] = weights @ values[:visible, head].astype(np.float64) / weights.sum()
    return out


def random_sequence(
    seed: int, context: int, heads: int = HEADS, head_dim: int = HEAD_DIM, spread: float = 1.0
) -> np.ndarray:
    """Queries, keys and values [3, context, heads, head_dim], views of one array as in GPT-2."""
    qkv = (
        np.random.default_rng(seed)
        .normal(0, spread, (context, 3 * heads * head_dim))
        .astype(np.float32)
    )
    return qkv.reshape(context, 3, heads, head_dim).transpose(1, 0, 2, 3)


@given(
    seed=st.integers(0, 1000),
    context=st.integers(1, 40),
    count=st.integers(1, 40),
    heads=st.integers(1, 4),
    head_dim=st.integers(1, 9),
    scale=st.sampled_from([1.0, 0.125, 0.31]),
    spread=st.sampled_from([0.1, 1.0, 30.0]),
)
def test_attention_is_its_formula(
    seed: int,
    context: int,
    count: int,
    heads: int,
    head_dim: int,
    scale: float,
    spread: float,
) -> None:
    queries, keys, values = random_sequence(seed, context, heads, head_dim, spread)
    queries = queries[max(context - count, 0) :]
    actual = attend(queries, keys, values, scale)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(
        actual,
        naive(queries, keys, values, scale),
        rtol=1e-4,
        atol=1e-5 * spread * max(1.0, spread),
    )


@pytest.mark.parametrize(("count", "context"), [(1, 1), (65, 65), (131, 200)])
def test_attention_is_its_formula_in_long_prompts(count: int, context: int) -> None:
    queries, keys, values = random_sequence(1, context)
    actual = attend(queries[context - count :], keys, values, SCALE)
    np.testing.assert_allclose(
        actual, naive(queries[context - count :], keys, values, SCALE), rtol=1e-5, atol=1e-5
    )


def test_the_first_token_sees_itself_alone() -> None:
    queries, keys, values = random_sequence(2, 9)
    np.testing.assert_allclose(attend(queries, keys, values, SCALE)[0], values[0], rtol=1e-6)


def test_a_token_does_not_see_the_future() -> None:
    queries, keys, values = random_sequence(3, 80)
    expected = attend(queries, keys, values, SCALE)
    changed_keys, changed_values = keys.copy(), values.copy()
    changed_keys[50:], changed_values[50:] = 40.0, -1e6
    actual = attend(queries, changed_keys, changed_values, SCALE)
    np.testing.assert_allclose(actual[:50], expected[:50], rtol=1e-5, atol=1e-5)
    actual = attend(queries, keys, changed_values, SCALE)
    assert (np.abs(actual[50:] - expected[50:]).min(axis=(1, 2)) > 1).all(), "nor only the past"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [3, 70])
def test_a_value_that_is_not_finite_reaches_no_earlier_token(bad: float, place: int) -> None:
    """0 times a NaN is a NaN: a masked weight of 0 is not enough."""
    queries, keys, values = random_sequence(3, 80)
    expected = attend(queries, keys, values, SCALE)
    changed = values.copy()
    changed[place, 1, 2] = bad
    with np.errstate(invalid="ignore"):
        actual = attend(queries, keys, changed, SCALE)
    np.testing.assert_allclose(actual[:place], expected[:place], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(actual[:, 0], expected[:, 0], rtol=1e-5, atol=1e-6)
    assert not np.isfinite(actual[place:, 1, 2]).any()


def test_large_scores_neither_overflow_nor_lose_the_best_key() -> None:
    queries, keys, values = random_sequence(4, 20)
    keys = keys.copy()
    keys[7] = queries[19] * np.float32(1e5)
    queries = queries[19:] * np.float32(1e3)
    np.testing.assert_allclose(attend(queries, keys, values, 1.0)[0], values[7], rtol=1e-6)


# Through the cache --------------------------------------------------------------------------------


def paged(
    sequences: list[np.ndarray],
    computed: list[int],
    tables: list[list[int]],
    *,
    fill: float,
    guard: bool = False,
) -> np.ndarray:
    """Attention of each sequence's tokens from `computed` on; unwritten slots hold `fill`."""
    blocks = 1 + max(itertools.chain(*tables))
    cache = KVCache.allocate(CONFIG, blocks=blocks, block_size=BLOCK_SIZE)
    cache.keys[:] = cache.values[:] = fill
    lengths = [sequence.shape[1] for sequence in sequences]
    zeros = [0] * len(sequences)
    before = make_batch(
        [range(length) for length in lengths],
        block_size=BLOCK_SIZE,
        computed=zeros,
        block_tables=tables,
    )
    cache.write(
        1,
        before.slots,
        *(np.concatenate([sequence[part] for sequence in sequences]) for part in (1, 2)),
    )
    batch = make_batch(
        [range(length) for length in lengths],
        block_size=BLOCK_SIZE,
        computed=computed,
        block_tables=tables,
    )
    queries = np.concatenate(
        [sequence[0, start:] for sequence, start in zip(sequences, computed, strict=True)]
    )
    if guard:
        queries, cache = float32_only(queries), float32_only(cache)
    return paged_attention(queries, cache, 1, batch, SCALE, ignore)


@given(
    data=st.data(),
    seed=st.integers(0, 1000),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4),
)
def test_through_scattered_blocks_it_is_the_same_and_stale_values_are_never_read(
    data: st.DataObject, seed: int, lengths: list[int]
) -> None:
    sequences = [random_sequence(seed + place, length) for place, length in enumerate(lengths)]
    computed = [data.draw(st.integers(0, length - 1)) for length in lengths]
    ids = iter(
        data.draw(st.permutations(range(4 + sum(-(-length // BLOCK_SIZE) for length in lengths))))
    )
    tables = [[next(ids) for _ in range(-(-length // BLOCK_SIZE))] for length in lengths]
    actual = paged(sequences, computed, tables, fill=np.nan)
    expected = np.concatenate(
        [
            attend(s[0, start:], s[1], s[2], SCALE)
            for s, start in zip(sequences, computed, strict=True)
        ]
    )
    assert np.isfinite(actual).all()
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(actual, paged(sequences, computed, tables, fill=0.0))


def test_attention_computes_in_float32() -> None:
    sequences = [random_sequence(seed, length) for seed, length in enumerate((70, 3))]
    tables = [list(range(18)), [20]]
    assert paged(sequences, [0, 2], tables, fill=np.nan, guard=True).dtype == np.float32
