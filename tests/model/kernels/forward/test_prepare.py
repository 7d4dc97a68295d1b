"""The compiled check of a batch against ForwardBatch.check, and the items of attention."""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.model.batch import ForwardBatch
from nanovllm.model.checkpoint import load_weights
from nanovllm.model.families.registry import load_config
from nanovllm.model.kernels.backend import NumbaBackend
from nanovllm.model.kernels.step_record import ITEM_FIELDS, PREFILL_QUERIES
from tests.support.batches import make_batch
from tests.support.checkpoints import write_checkpoint

BLOCKS, BLOCK_SIZE = 20, 4
FIELDS = tuple(field.name for field in fields(ForwardBatch))
LONG = list(range(PREFILL_QUERIES + 2))
BATCH = make_batch(
    [[1, 2, 3], [4], LONG, [5, 6]], computed=[1, 0, 0, 1], block_size=BLOCK_SIZE, all_rows=True
)


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> NumbaBackend:
    folder: Path = write_checkpoint(tmp_path_factory.mktemp("model"))
    config = load_config(folder)
    backend = NumbaBackend(config, load_weights(folder, config), num_threads=1)
    backend.allocate_cache(BLOCKS, BLOCK_SIZE)
    return backend


def is_sound(backend: NumbaBackend, batch: ForwardBatch) -> bool:
    config = backend.config
    try:
        batch.check(
            vocab=config.vocab,
            max_positions=config.max_positions,
            blocks=BLOCKS,
            block_size=BLOCK_SIZE,
        )
    except ValueError:
        return False
    return True


@given(data=st.data())
def test_what_one_check_refuses_the_other_refuses(
    backend: NumbaBackend, data: st.DataObject
) -> None:
    field = data.draw(st.sampled_from(FIELDS))
    values = getattr(BATCH, field).copy()
    place = data.draw(st.integers(0, values.size - 1))
    values.flat[place] += data.draw(
        st.one_of(st.integers(-9, 9), st.sampled_from([-(2**62), 2**62]))
    )
    changed = replace(BATCH, **{field: values})
    if is_sound(backend, changed):
        backend.forward(changed)
        return
    with pytest.raises(ValueError, match=r"run from|batch|context|positions|slots"):
        backend.forward(changed)


def test_arrays_of_other_lengths_are_refused(backend: NumbaBackend) -> None:
    with pytest.raises(ValueError, match="disagree"):
        backend.forward(replace(BATCH, query_starts=BATCH.query_starts[:-1]))


def test_single_tokens_and_pieces_of_prompts_become_items(backend: NumbaBackend) -> None:
    backend.forward(BATCH)
    memory = backend.memory
    decodes = memory.arrays["decode_items"][: memory["decodes"] * ITEM_FIELDS].reshape(
        -1, ITEM_FIELDS
    )
    chunks = memory.arrays["chunk_items"][: memory["chunks"] * ITEM_FIELDS].reshape(-1, ITEM_FIELDS)
    last = 3 + len(LONG)
    np.testing.assert_array_equal(decodes, [[1, 2, 1, 0], [3, last, 1, 1]])
    np.testing.assert_array_equal(
        chunks,
        [[0, 0, 2, 1], [2, 3, PREFILL_QUERIES, 0], [2, 3 + PREFILL_QUERIES, 2, PREFILL_QUERIES]],
    )
