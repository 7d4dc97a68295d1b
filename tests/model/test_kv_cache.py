"""The cache returns what was written, through any block table, and nothing else."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.model.config import ModelConfig
from nanovllm.model.kv_cache import KVCache

LAYERS, BLOCKS, HEADS, HEAD_DIM = 4, 9, 2, 3
CONFIG = ModelConfig(
    vocab=1, max_positions=1, d_model=HEADS * HEAD_DIM, layers=LAYERS, heads=HEADS, d_ff=1
)


def make_cache(block_size: int, fill: float = np.nan) -> KVCache:
    cache = KVCache.allocate(CONFIG, blocks=BLOCKS, block_size=block_size)
    cache.keys[:] = cache.values[:] = fill
    return cache


def numbers(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    keys, values = (
        np.random.default_rng(seed).normal(0, 1, (2, count, HEADS, HEAD_DIM)).astype(np.float32)
    )
    return keys, values


def slots_of(table: list[int], block_size: int, positions: range) -> np.ndarray:
    return np.array(
        [table[place // block_size] * block_size + place % block_size for place in positions],
        dtype=np.int64,
    )


def test_a_new_cache_is_empty_float32() -> None:
    cache = KVCache.allocate(CONFIG, blocks=5, block_size=4)
    assert cache.keys.shape == cache.values.shape == (LAYERS, 5, 4, HEADS, HEAD_DIM)
    assert cache.keys.dtype == cache.values.dtype == np.float32
    assert cache.block_size == 4
    assert not cache.keys.any()
    assert not cache.values.any()


@given(data=st.data(), block_size=st.integers(1, 5), cuts=st.sets(st.integers(1, 30), max_size=3))
def test_what_was_written_in_pieces_is_gathered_in_order(
    data: st.DataObject, block_size: int, cuts: set[int]
) -> None:
    """Two sequences share the blocks; what neither has written is NaN and must not be read."""
    cache = make_cache(block_size)
    ids = data.draw(st.permutations(range(BLOCKS)))
    tables = [ids[:4], ids[4:8]]
    lengths = [data.draw(st.integers(1, 4 * block_size)) for _ in tables]
    written = [
        [numbers(10 * seq + layer, lengths[seq]) for layer in range(LAYERS)] for seq in range(2)
    ]
    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), 10**9], strict=True):
        for seq, table in enumerate(tables):
            part = range(start, min(stop, lengths[seq]))
            for layer in range(LAYERS):
                keys, values = written[seq][layer]
                cache.write(
                    layer,
                    slots_of(table, block_size, part),
                    keys[part.start : part.stop],
                    values[part.start : part.stop],
                )
    for seq, table in enumerate(tables):
        unread = [10**9] * data.draw(
            st.integers(0, 2)
        )  # past the context a table may hold anything
        block_table = np.array(table[: -(-lengths[seq] // block_size)] + unread, dtype=np.int64)
        for layer in range(LAYERS):
            keys, values = cache.gather(layer, block_table, lengths[seq])
            np.testing.assert_array_equal(keys, written[seq][layer][0])
            np.testing.assert_array_equal(values, written[seq][layer][1])


def test_a_write_changes_its_slots_and_no_others() -> None:
    cache = make_cache(4, fill=0.0)
    keys, values = numbers(1, 3)
    cache.write(1, np.array([7, 4, 30], dtype=np.int64), keys, values)
    assert np.count_nonzero(cache.keys.any(axis=(3, 4))) == 3
    assert not cache.keys[0].any()
    np.testing.assert_array_equal(cache.keys[1, [1, 1, 7], [3, 0, 2]], keys)
    np.testing.assert_array_equal(cache.values[1, [1, 1, 7], [3, 0, 2]], values)


@pytest.mark.parametrize(
    ("table", "is_view"),
    [
        ([3], True),
        ([2, 3, 4], True),
        ([0, 1, 2, 3], True),
        ([3, 2, 1], False),
        ([1, 3, 2, 4], False),
        ([2, 2, 4], False),
        ([5, 7], False),
    ],
)
def test_blocks_side_by_side_are_not_copied_and_others_are_put_in_order(
    table: list[int], is_view: bool
) -> None:
    cache = make_cache(4, fill=0.0)
    cache.keys[:] = np.arange(BLOCKS, dtype=np.float32)[None, :, None, None, None]
    keys, values = cache.gather(0, np.array(table, dtype=np.int64), len(table) * 4 - 1)
    assert keys[:, 0, 0].tolist() == [float(block) for block in table for _ in range(4)][:-1]
    assert np.shares_memory(keys, cache.keys) is is_view
    assert np.shares_memory(values, cache.values) is is_view
