"""The NumPy backend with batch_invariant=True: a token's bits do not depend on its batch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.model.backend import LoadOptions
from nanovllm.model.numpy_backend import NumpyBackend
from tests.support.batches import make_batch
from tests.support.checkpoints import write_checkpoint

BLOCKS, BLOCK_SIZE = 40, 8
WIDE = {"n_embd": 768, "n_head": 12, "n_layer": 1}


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> NumpyBackend:
    """A layer and a head of real width, with odd numbers of columns."""
    config = {"n_embd": 330, "n_head": 5, "n_layer": 1, "vocab_size": 1001}
    folder = write_checkpoint(tmp_path_factory.mktemp("model"), config=config)
    return NumpyBackend.load(folder, LoadOptions(batch_invariant=True))


def empty_cache(backend: NumpyBackend) -> None:
    backend.allocate_cache(BLOCKS, BLOCK_SIZE)
    backend.fill_blocks(list(range(BLOCKS)), float("nan"))


@settings(max_examples=8)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    cut=st.integers(1, 19),
    data=st.data(),
)
def test_bits_depend_on_nothing_but_the_sequence(
    backend: NumpyBackend, lengths: list[int], cut: int, data: st.DataObject
) -> None:
    """Alone and whole; and beside others, in two chunks, from scattered blocks."""
    random = np.random.default_rng(sum(lengths))
    sequences = [random.integers(0, backend.config.vocab, length) for length in lengths]
    alone = []
    for sequence in sequences:
        empty_cache(backend)
        batch = make_batch([sequence], block_size=BLOCK_SIZE, all_rows=True)
        alone.append(backend.forward(batch))
    empty_cache(backend)
    ids = iter(data.draw(st.permutations(range(BLOCKS))))
    tables = [[next(ids) for _ in range(-(-length // BLOCK_SIZE))] for length in lengths]
    for start, stop in ((0, cut), (cut, 20)):
        chosen = [i for i, length in enumerate(lengths) if length > start]
        if chosen:
            batch = make_batch(
                [sequences[i][:stop] for i in chosen],
                block_size=BLOCK_SIZE,
                computed=[start] * len(chosen),
                block_tables=[tables[i][: -(-stop // BLOCK_SIZE)] for i in chosen],
            )
            for row, i in zip(backend.forward(batch), chosen, strict=True):
                np.testing.assert_array_equal(row, alone[i][min(stop, lengths[i]) - 1])


def test_the_bits_of_logits_depend_on_the_row_alone(backend: NumpyBackend) -> None:
    rows = np.random.default_rng(7).normal(0, 1, (19, backend.config.d_model)).astype(np.float32)
    together = backend.logits(rows)
    for part in (slice(0, 1), slice(3, 10), slice(18, None, -1)):
        actual = backend.logits(np.ascontiguousarray(rows[part]))
        np.testing.assert_array_equal(actual, together[part])
