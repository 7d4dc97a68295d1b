"""ForwardBatch.check refuses every index outside the model or the cache."""

import copy
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.model.batch import ForwardBatch
from tests.support.batches import make_batch

VOCAB, MAX_POSITIONS, BLOCKS, BLOCK_SIZE = 50, 24, 12, 4
FIELDS = tuple(field.name for field in fields(ForwardBatch))


def check(batch: ForwardBatch) -> None:
    batch.check(vocab=VOCAB, max_positions=MAX_POSITIONS, blocks=BLOCKS, block_size=BLOCK_SIZE)


def sound_batch() -> ForwardBatch:
    """Sequences of 9, 1 and 6 tokens; 5 tokens of the first are in the cache."""
    return make_batch(
        [range(9), [7], range(20, 26)],
        block_size=BLOCK_SIZE,
        computed=[5, 0, 0],
        block_tables=[[3, 1, 8], [0], [11, 4]],
    )


def changed(batch: ForwardBatch, name: str, value: object) -> ForwardBatch:
    """A copy with another array, made without the runtime checks of shapes."""
    other = copy.copy(batch)
    object.__setattr__(other, name, np.asarray(value, dtype=np.int64))
    return other


def leads_outside(batch: ForwardBatch) -> bool:
    """Whether a kernel would read or write outside its arrays or at another sequence's tokens."""
    tokens = batch.token_ids.tolist()
    if any(not 0 <= token < VOCAB for token in tokens) or any(
        not 0 <= row < len(tokens) for row in batch.logit_rows.tolist()
    ):
        return True
    starts = batch.query_starts.tolist()
    if (
        len(starts) != len(batch.context_lens) + 1
        or starts[0] != 0
        or starts[-1] != len(tokens)
        or len(batch.block_tables) != len(starts) - 1
    ):
        return True
    if len(batch.positions) != len(tokens) or len(batch.slots) != len(tokens):
        return True
    for seq, context in enumerate(batch.context_lens.tolist()):
        first, last = starts[seq], starts[seq + 1]
        table = batch.block_tables[seq].tolist()
        if last <= first or context > MAX_POSITIONS or -(-context // BLOCK_SIZE) > len(table):
            return True
        if any(not 0 <= block < BLOCKS for block in table[: -(-context // BLOCK_SIZE)]):
            return True
        for token in range(first, last):
            position = context - (last - token)
            if position < 0 or int(batch.positions[token]) != position:
                return True
            if (
                int(batch.slots[token])
                != table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
            ):
                return True
    return False


def test_a_sound_batch_passes() -> None:
    batch = sound_batch()
    check(batch)
    assert (batch.tokens, batch.seqs) == (11, 3)
    assert not leads_outside(batch)
    check(changed(batch, "logit_rows", []))
    check(make_batch([range(MAX_POSITIONS)], block_size=BLOCK_SIZE))


def test_a_batch_of_one_sequence_and_batches_of_one_token_pass() -> None:
    single = ForwardBatch.single([5, 6, 7], start=2)
    single.check(vocab=VOCAB, max_positions=MAX_POSITIONS, blocks=1, block_size=5)
    assert (single.positions.tolist(), single.logit_rows.tolist()) == ([2, 3, 4], [2])
    tokens = list(sound_batch().one_token_batches())
    for batch in tokens:
        check(batch)
    assert [batch.slots[0] for batch in tokens] == sound_batch().slots.tolist()
    rows = [token for token, batch in enumerate(tokens) if batch.logit_rows.size]
    assert rows == sound_batch().logit_rows.tolist()


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("token_ids", lambda a: a[:-1], "disagree about the number of tokens"),
        (
            "token_ids",
            lambda a: np.where(a == 7, VOCAB, a),
            "token_ids run from 5 to 50, outside 0 to 49",
        ),
        ("token_ids", lambda a: np.where(a == 7, -1, a), "token_ids run from -1"),
        ("positions", lambda a: a[1:], "disagree about the number of tokens"),
        (
            "positions",
            lambda a: np.where(a == 8, MAX_POSITIONS, a),
            "positions run from 0 to 24, outside 0 to 23",
        ),
        ("positions", lambda a: np.where(a == 8, 7, a), "positions do not run up to the end"),
        ("positions", lambda a: a[::-1], "positions do not run up to the end"),
        ("query_starts", lambda a: a[:0], "disagree about the number of tokens or sequences"),
        ("query_starts", lambda a: a[:-1], "disagree about the number of tokens or sequences"),
        (
            "query_starts",
            lambda a: [*a, a[-1] + 1],
            "disagree about the number of tokens or sequences",
        ),
        ("query_starts", lambda a: [1, *a[1:]], "at least one token in each"),
        ("query_starts", lambda a: [*a[:-1], a[-1] + 1], "at least one token in each"),
        ("query_starts", lambda a: [0, 4, 4, 11], "at least one token in each"),
        ("query_starts", lambda a: [0, 6, 5, 11], "at least one token in each"),
        ("query_starts", lambda a: [0, 2**63 - 1, 5, 11], "at least one token in each"),
        ("query_starts", lambda a: [0, 5, 6, 11], "positions do not run up to the end"),
        ("context_lens", lambda a: a[:-1], "disagree about the number of tokens or sequences"),
        ("context_lens", lambda a: [13, 1, 6], "longer than its block table"),
        ("context_lens", lambda a: [2, 1, 6], "shorter than its new tokens"),
        ("context_lens", lambda a: [9, 0, 6], "shorter than its new tokens"),
        ("context_lens", lambda a: [10, 1, 6], "positions do not run up to the end"),
        ("block_tables", lambda a: a[:-1], "disagree about the number of tokens or sequences"),
        ("block_tables", lambda a: a[:, :2], "longer than its block table"),
        (
            "block_tables",
            lambda a: np.where(a == 8, BLOCKS, a),
            "block_tables run from 0 to 12, outside 0 to 11",
        ),
        ("block_tables", lambda a: np.where(a == 3, -1, a), "block_tables run from -1"),
        (
            "block_tables",
            lambda a: np.where(a == 8, 2, a),
            "slots do not lie in the blocks of their own",
        ),
        ("slots", lambda a: a[:-1], "disagree about the number of tokens"),
        (
            "slots",
            lambda a: np.where(a == a[0], BLOCKS * BLOCK_SIZE, a),
            "slots run from 0 to 48, outside 0 to 47",
        ),
        ("slots", lambda a: np.where(a == a[0], -1, a), "slots run from -1"),
        (
            "slots",
            lambda a: np.where(a == a[0], a[-1], a),
            "slots do not lie in the blocks of their own",
        ),
        ("logit_rows", lambda a: [0, 11], "logit_rows run from 0 to 11, outside 0 to 10"),
        ("logit_rows", lambda a: [-1], "logit_rows run from -1"),
    ],
)
def test_each_kind_of_wrong_index_is_refused(
    name: str, change: Callable[[np.ndarray], Any], said: str
) -> None:
    wrong = changed(sound_batch(), name, change(getattr(sound_batch(), name)))
    with pytest.raises(ValueError, match=said):
        check(wrong)


def test_entries_behind_a_context_may_be_anything() -> None:
    batch = sound_batch()
    tables = batch.block_tables.copy()
    is_behind = np.arange(tables.shape[1]) * BLOCK_SIZE >= batch.context_lens[:, None]
    tables[is_behind] = -5
    assert is_behind.any()
    check(changed(batch, "block_tables", tables))


def test_a_batch_of_nothing_is_refused() -> None:
    empty = np.zeros(0, dtype=np.int64)
    nothing = ForwardBatch(
        empty,
        empty,
        np.zeros(1, dtype=np.int64),
        empty,
        np.zeros((0, 1), dtype=np.int64),
        empty,
        empty,
    )
    with pytest.raises(ValueError, match="at least one sequence"):
        check(nothing)


def test_a_sequence_longer_than_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="positions run from 0 to 24, outside 0 to 23"):
        check(make_batch([range(MAX_POSITIONS + 1)], block_size=BLOCK_SIZE))


@given(
    name=st.sampled_from(FIELDS),
    place=st.integers(0, 1000),
    value=st.one_of(st.integers(-3, 60), st.sampled_from([-(2**63), 2**63 - 1, 2**40])),
)
def test_one_wrong_number_is_refused_or_harmless(name: str, place: int, value: int) -> None:
    array = getattr(sound_batch(), name).copy()
    array.flat[place % array.size] = value
    batch = changed(sound_batch(), name, array)
    try:
        check(batch)
    except ValueError:
        return
    assert not leads_outside(batch)


@given(name=st.sampled_from(FIELDS), data=st.data())
def test_an_array_of_another_length_is_refused_or_harmless(name: str, data: st.DataObject) -> None:
    array = getattr(sound_batch(), name)
    batch = changed(
        sound_batch(), name, array[data.draw(st.lists(st.integers(0, len(array) - 1), max_size=14))]
    )
    try:
        check(batch)
    except ValueError:
        return
    assert not leads_outside(batch)
