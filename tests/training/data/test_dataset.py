"""Batches of a dataset: an epoch, the order of the run, and the validation split."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.training.data.dataset import Batch, Dataset

sizes = st.integers(1, 9).flatmap(
    lambda context: st.tuples(st.just(context), st.integers(context + 1, 60))
)


def dataset(context: int, num_tokens: int) -> Dataset:
    """Return a dataset in which each token is its own position."""
    return Dataset(np.arange(num_tokens, dtype=np.uint16), context)


def check(batch: Batch) -> None:
    """Check that each target follows its input, and that a window is contiguous."""
    assert batch.inputs.dtype == batch.targets.dtype == np.int64
    np.testing.assert_array_equal(batch.targets, batch.inputs + 1)
    assert (np.diff(batch.inputs) == 1).all()


def test_a_batch_by_hand() -> None:
    """Four tokens have one window of three inputs, whatever the seed."""
    batch = Dataset(np.array([7, 5, 5, 9], np.uint16), 3).batch(3, 2, seed=1)
    np.testing.assert_array_equal(batch.inputs, [[7, 5, 5], [7, 5, 5]])
    np.testing.assert_array_equal(batch.targets, [[5, 5, 9], [5, 5, 9]])


@given(sizes, st.integers(0, 2**63 - 1), st.integers(0, 3))
def test_an_epoch_predicts_each_token_once_except_at_the_ends(
    size: tuple[int, int], seed: int, epoch: int
) -> None:
    context, num_tokens = size
    data = dataset(context, num_tokens)
    batch = data.batch(epoch, data.windows, seed)
    check(batch)
    targets = np.sort(batch.targets, axis=None)
    np.testing.assert_array_equal(targets, np.arange(targets[0], targets[0] + len(targets)))
    assert targets[-1] < num_tokens
    assert num_tokens - len(targets) < 2 * context


@given(sizes, st.integers(0, 99), st.integers(1, 7), st.lists(st.integers(0, 40), max_size=5))
def test_a_batch_depends_on_its_number_alone(
    size: tuple[int, int], seed: int, batch_size: int, before: list[int]
) -> None:
    used, fresh = dataset(*size), dataset(*size)
    for number in before:
        used.batch(number, batch_size, seed)
    one_by_one = [fresh.batch(number, 1, seed).inputs[0] for number in range(3 * batch_size)]
    for number in range(3):
        batch = used.batch(number, batch_size, seed)
        rows = one_by_one[number * batch_size : (number + 1) * batch_size]
        np.testing.assert_array_equal(batch.inputs, rows)


def test_seeds_and_epochs_differ_in_order_and_offset() -> None:
    data = dataset(8, 400)
    batches = [data.batch(epoch, data.windows, seed) for epoch in (0, 1) for seed in (0, 1)]
    orders = {tuple(batch.inputs[:, 0].tolist()) for batch in batches}
    assert len(orders) == 4
    offsets = {data.batch(i, data.windows, 0).inputs.min() for i in range(100)}
    assert offsets == set(range(8))


@given(sizes, st.integers(1, 7))
def test_validation_predicts_every_token_but_the_first_once(
    size: tuple[int, int], batch_size: int
) -> None:
    batches = list(dataset(*size).validation_batches(batch_size))
    for batch in batches:
        check(batch)
        assert batch.inputs.shape[0] <= batch_size
        assert batch.inputs.shape[1] <= size[0]
    targets = np.concatenate([batch.targets.ravel() for batch in batches])
    np.testing.assert_array_equal(targets, np.arange(1, size[1]))


@pytest.mark.parametrize(("limit", "expected"), [(1, [0]), (2, [0, 10]), (99, [0, 5, 10, 15])])
def test_a_limit_spreads_the_batches_over_the_split(limit: int, expected: list[int]) -> None:
    batches = dataset(5, 18).validation_batches(1, limit)
    assert [batch.inputs[0, 0] for batch in batches] == expected


def test_a_split_shorter_than_the_context_is_one_short_batch() -> None:
    (batch,) = dataset(64, 3).validation_batches(8)
    np.testing.assert_array_equal(batch.targets, [[1, 2]])
    assert list(dataset(64, 1).validation_batches(8)) == []
