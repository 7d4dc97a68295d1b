"""Several greedy steps in one run against the loop of single steps, and NumPy's."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanovllm.model.backend import LoadOptions
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.kernels.backend import NumbaBackend
from nanovllm.model.kernels.step_record import MAX_STEPS, NO_TOKEN
from nanovllm.model.numpy_backend import NumpyBackend
from tests.support.batches import make_batch
from tests.support.checkpoints import write_checkpoint

BLOCK_SIZE, BLOCKS = 4, 40
SEQS = [[7], [9, 8, 7], list(range(1, 13)), list(range(90, 60, -1))]
FAMILIES: list[dict[str, Any]] = [
    {},
    {"model_type": "mistral", "sliding_window": 9, "num_key_value_heads": 2},
]


def first_batch(backend: Any, seqs: list[list[int]], steps: int) -> ForwardBatch:
    """Compute all tokens but the last of each sequence; return the batch of those."""
    backend.allocate_cache(BLOCKS, BLOCK_SIZE)
    backend.fill_blocks(list(range(BLOCKS)), np.nan)
    blocks = iter(np.random.default_rng(4).permutation(BLOCKS).tolist())
    tables = [[next(blocks) for _ in range(0, len(seq) + steps, BLOCK_SIZE)] for seq in seqs]
    cut = [(seq[:-1], table) for seq, table in zip(seqs, tables, strict=True) if len(seq) > 1]
    if cut:
        parts, their_tables = [part for part, _ in cut], [table for _, table in cut]
        backend.forward(make_batch(parts, block_size=BLOCK_SIZE, block_tables=their_tables))
    computed = [len(seq) - 1 for seq in seqs]
    return make_batch(seqs, computed=computed, block_size=BLOCK_SIZE, block_tables=tables)


def tokens_of_single_steps(backend: Any, batch: ForwardBatch, steps: int) -> list[list[int]]:
    rows = []
    for _ in range(steps):
        tokens, _ = backend.greedy(backend.forward(batch))
        rows.append(tokens.tolist())
        batch = batch.following(tokens, BLOCK_SIZE)
    return rows


@pytest.mark.parametrize("config", FAMILIES)
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_run_of_steps_gives_the_tokens_and_the_cache_of_single_steps(
    tmp_path: Path,
    config: dict[str, Any],
    quantization: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On any number of threads, also more than there are processors."""
    monkeypatch.setattr("nanovllm.model.kernels.backend._SHARED_MULTIPLY_ADDS", 0)
    folder = write_checkpoint(tmp_path, config=config)
    for threads in (1, 2, 5):
        options = LoadOptions(quantization=quantization, num_threads=threads)
        backend = NumbaBackend.load(folder, options)
        for seqs, steps in ((SEQS, MAX_STEPS), (SEQS[1:], 3), (SEQS[:1], 2)):
            batch = first_batch(backend, seqs, MAX_STEPS + 1)
            expected = tokens_of_single_steps(backend, batch, steps + 1)
            batch = first_batch(backend, seqs, MAX_STEPS + 1)
            tokens, has_token = backend.greedy_steps(batch, steps)
            assert tokens.tolist() == expected[:steps]
            assert has_token.all()
            for _ in range(steps):
                batch = batch.following(np.zeros(len(seqs), dtype=np.int64), BLOCK_SIZE)
            after, _ = backend.greedy(backend.forward(replace(batch, token_ids=tokens[-1])))
            assert after.tolist() == expected[steps]


def test_numpy_takes_the_same_steps(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    backends: list[Any] = [NumpyBackend.load(folder), NumbaBackend.load(folder)]
    ours, theirs = (
        [result.tolist() for result in backend.greedy_steps(first_batch(backend, SEQS, 5), 5)]
        for backend in backends
    )
    assert ours == theirs


def test_no_more_steps_than_a_run_has_room_for(tmp_path: Path) -> None:
    backend = NumbaBackend.load(write_checkpoint(tmp_path))
    tokens, _ = backend.greedy_steps(first_batch(backend, SEQS[:2], 30), 30)
    assert tokens.shape == (MAX_STEPS, 2)


@pytest.mark.parametrize("kind", [NumpyBackend, NumbaBackend])
def test_a_sequence_whose_values_are_not_finite_has_no_token_and_spoils_no_other(
    tmp_path: Path, kind: Any
) -> None:
    """The loop goes on with token 0, as whatever comes after is not used."""
    backend = kind.load(write_checkpoint(tmp_path))
    expected = backend.greedy_steps(first_batch(backend, SEQS, 4), 4)[0].copy()
    batch = first_batch(backend, SEQS, 4)
    backend.fill_blocks([int(batch.block_tables[2, 0])], np.nan)
    tokens, has_token = backend.greedy_steps(batch, 4)
    assert has_token.tolist() == [[True, True, False, True]] * 4
    others = [0, 1, 3]
    assert tokens[:, others].tolist() == expected[:, others].tolist()
    if kind is NumbaBackend:
        assert (tokens[:, 2] == NO_TOKEN).all()


def test_a_step_outside_the_cache_or_the_model_is_refused(tmp_path: Path) -> None:
    backend = NumbaBackend.load(write_checkpoint(tmp_path, config={"n_positions": 32}))
    batch = first_batch(backend, [[1, 2, 3]], 3)
    with pytest.raises(ValueError, match=r"7 steps after \[3\] tokens need more than the 32 pos"):
        backend.greedy_steps(batch, 7)
    batch = first_batch(backend, [list(range(30))], 8)
    assert backend.greedy_steps(batch, 3)[0].shape == (3, 1)
    with pytest.raises(ValueError, match=r"4 steps after \[30\] tokens"):
        backend.greedy_steps(batch, 4)
    with pytest.raises(ValueError, match="token_ids run from"):
        backend.greedy_steps(replace(batch, token_ids=np.array([10**6])), 4)
