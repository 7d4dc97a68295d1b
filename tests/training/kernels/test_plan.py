"""Planned passes: the same bits as passes that run at once, and arrays that do not overlap."""

from collections.abc import Callable, Hashable, Iterator
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.model.checkpoint import expected_shapes
from nanovllm.model.config import ModelConfig
from nanovllm.model.kernels.record import KernelMemory
from nanovllm.training.kernels.operations import CompiledOperations
from nanovllm.training.kernels.plan import RUN_WORK, OperationCall, place, runs_of
from nanovllm.training.kernels.records import CALLS_PER_RUN, DTYPES, OPERATIONS, RECORDS
from nanovllm.training.network import model
from nanovllm.training.network.autograd import Tape
from nanovllm.training.network.model import Dropout, batch_loss
from nanovllm.training.network.operations import Operations
from nanovllm.training.network.parameters import Parameters
from tests.training.kernels.comparison import random

LIVES = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(0, 9)), max_size=12)


@given(LIVES)
def test_arrays_that_live_together_do_not_overlap(lives: list[tuple[int, int, int]]) -> None:
    sizes = np.array([size for size, _, _ in lives], dtype=np.int64)
    first = np.array([min(life) for _, *life in lives], dtype=np.int64)
    last = np.array([max(life) for _, *life in lives], dtype=np.int64)
    offsets, total = place(sizes, first, last)
    ends = offsets + sizes
    assert (offsets >= 0).all()
    assert total == ends.max(initial=0)
    for one, other in combinations(range(len(lives)), 2):
        if first[one] <= last[other] and first[other] <= last[one]:
            assert ends[one] <= offsets[other] or ends[other] <= offsets[one]


def test_memory_is_used_again_after_the_last_use() -> None:
    sizes, first, last = np.array([5, 5, 3, 2]), np.array([0, 1, 2, 2]), np.array([1, 2, 3, 3])
    offsets, total = place(sizes, first, last)
    assert total == 10
    assert sorted(offsets[[0, 2, 3]].tolist()) == [0, 0, 3]


def test_a_run_ends_after_so_many_calls_or_so_much_work() -> None:
    def calls_of(*works: int) -> list[OperationCall]:
        memory = KernelMemory(RECORDS["dropout"], DTYPES)
        return [OperationCall("dropout", work, memory) for work in works]

    many = calls_of(*[1] * (2 * CALLS_PER_RUN + 1))
    assert [len(run.calls) for run in runs_of(many)] == [CALLS_PER_RUN, CALLS_PER_RUN, 1]
    large = calls_of(1, RUN_WORK, 2, RUN_WORK - 2, 3)
    assert [run.work for run in runs_of(large)] == [RUN_WORK + 1, RUN_WORK, 3]
    run = runs_of(large)[1]
    number, address = run.memory.arrays["calls"][1]
    assert (OPERATIONS[number], address) == ("dropout", large[3].memory.address)
    assert runs_of([]) == []


class Unplanned(CompiledOperations):
    """Operations whose passes run at once, each on memory of its own."""

    def run_pass(self, key: Hashable, compute: Callable[..., float], *inputs: np.ndarray) -> float:
        return compute(*inputs)


@pytest.fixture(scope="module")
def unplanned() -> Iterator[Unplanned]:
    operations = Unplanned(2)
    yield operations
    operations.close()


@pytest.fixture
def planned() -> Iterator[CompiledOperations]:
    operations = CompiledOperations(2)
    yield operations
    operations.close()


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Return the list of all tapes, one for each pass that was traced."""
    made: list[Tape] = []

    class CountedTape(Tape):
        def __init__(self, operations: Operations, *, records: bool) -> None:
            super().__init__(operations, records=records)
            made.append(self)

    monkeypatch.setattr(model, "Tape", CountedTape)
    return made


def make_config(**changes: object) -> ModelConfig:
    sizes = {"vocab": 50, "max_positions": 24, "d_model": 32, "layers": 2, "heads": 4, "d_ff": 80}
    return ModelConfig(**{**sizes, **changes})  # type: ignore[arg-type]


def make_parameters(config: ModelConfig) -> Parameters:
    parameters = Parameters(
        expected_shapes(config), constant_positions=config.positions == "sinusoidal"
    )
    for seed, (_, tensor) in enumerate(parameters.tensors.items()):
        tensor.data[...] = 0.2 * random(*tensor.data.shape, seed=seed)
    return parameters


def make_batch(config: ModelConfig, *shape: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(seed).integers(0, config.vocab, (2, *shape))
    return tokens[0], tokens[1]


@pytest.mark.slow(25)
@pytest.mark.parametrize(
    ("changes", "group_tokens", "rate"),
    [
        ({}, 1024, 0.0),
        ({}, 60, 0.2),  # groups of 2, 3 and 2 sequences
        ({"tied_head": False, "activation": "relu", "layers": 5}, 1024, 0.0),  # two runs
        ({"activation": "silu", "positions": "sinusoidal"}, 1024, 0.1),
    ],
)
def test_planned_passes_have_the_bits_of_others(
    planned: CompiledOperations,
    unplanned: Unplanned,
    tapes: list[Tape],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    group_tokens: int,
    rate: float,
) -> None:
    """In training and in evaluation, with batches of two shapes, after updates of the weights."""
    monkeypatch.setattr(model, "GROUP_TOKENS", group_tokens)
    config = make_config(**changes)
    results = []
    for operations in (unplanned, planned):
        parameters, losses = make_parameters(config), []
        counts = []
        for step in range(4):
            tapes.clear()
            dropout = Dropout(rate, step=step)
            for scale, shape, drop in (
                (0.01, (7, 20), dropout),
                (None, (7, 20), model.NO_DROPOUT),
                (0.01, (2, 24), dropout),
            ):
                batch = make_batch(config, *shape, seed=step)
                losses.append(
                    batch_loss(operations, config, parameters, *batch, scale=scale, dropout=drop)
                )
            parameters.values -= 0.01 * parameters.gradients
            counts.append(len(tapes))
        results.append((losses, parameters.values, parameters.gradients))
        assert (counts[0] > 0, counts[-1] == 0) == (True, operations is planned)
    (losses, values, gradients), (planned_losses, *planned_arrays) = results
    assert np.isfinite(losses).all()
    assert losses == planned_losses
    for expected, array in zip((values, gradients), planned_arrays, strict=True):
        np.testing.assert_array_equal(array.view(np.int32), expected.view(np.int32))


def test_results_of_other_operations_stay(planned: CompiledOperations) -> None:
    config = make_config()
    parameters = make_parameters(config)
    batch = make_batch(config, 3, 10, seed=0)
    ones, zeros = np.ones(32, np.float32), np.zeros(32, np.float32)
    held = planned.layer_norm(random(60, 32), ones, zeros, 1e-5)
    expected = [array.copy() for array in held]
    losses = {batch_loss(planned, config, parameters, *batch, scale=0.1) for _ in range(2)}
    for array, other in zip(held, expected, strict=True):
        np.testing.assert_array_equal(array, other)
    assert len(losses) == 1


def test_plans_share_one_block_that_grows(planned: CompiledOperations, tapes: list[Tape]) -> None:
    """Evaluation needs less of it than the training after it."""
    config = make_config()
    parameters = make_parameters(config)
    small, large = make_batch(config, 2, 8, seed=0), make_batch(config, 16, 24, seed=0)
    losses = [batch_loss(planned, config, parameters, *small) for _ in range(2)]
    batch_loss(planned, config, parameters, *large, scale=0.1)
    losses += [batch_loss(planned, config, parameters, *small) for _ in range(2)]
    assert len(tapes) == 2
    assert losses == [losses[0]] * 4


def test_tokens_are_checked_in_planned_passes(planned: CompiledOperations) -> None:
    config = make_config()
    parameters = make_parameters(config)
    token_ids, targets = make_batch(config, 2, 8, seed=0)
    loss = batch_loss(planned, config, parameters, token_ids, targets)
    for wrong_ids, wrong_targets in ((token_ids + 50, targets), (token_ids, targets - 50)):
        with pytest.raises(IndexError, match="not in the vocabulary of 50 tokens"):
            batch_loss(planned, config, parameters, wrong_ids, wrong_targets, scale=1.0)
    assert not parameters.gradients.any()
    assert batch_loss(planned, config, parameters, token_ids, targets) == loss


def test_an_interrupted_trace_leaves_no_plan(
    planned: CompiledOperations, tapes: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    parameters = make_parameters(config)
    batch = make_batch(config, 2, 8, seed=0)
    with monkeypatch.context() as patch:
        patch.setattr(planned, "attention", interrupt)
        with pytest.raises(KeyboardInterrupt):
            batch_loss(planned, config, parameters, *batch)
    losses = {batch_loss(planned, config, parameters, *batch) for _ in range(3)}
    assert len(losses) == 1
    assert len(tapes) == 2


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_each_pass_has_dropout_masks_of_its_own(
    planned: CompiledOperations, tapes: list[Tape]
) -> None:
    config = make_config()
    parameters = make_parameters(config)
    batch = make_batch(config, 2, 8, seed=0)
    losses = {
        batch_loss(planned, config, parameters, *batch, scale=0.1, dropout=Dropout(0.5, step=step))
        for step in range(4)
    }
    assert len(losses) == 4
    assert len(tapes) == 1


def test_many_networks_and_shapes(planned: CompiledOperations, unplanned: Unplanned) -> None:
    """More kinds of passes than are kept."""
    config = make_config(layers=1)
    networks = [make_parameters(config) for _ in range(3)]
    for number, parameters in enumerate(networks):
        parameters.values *= 1 + number
    for _ in range(3):
        for parameters in networks:
            for context in range(1, 8):
                batch = make_batch(config, 2, context, seed=context)
                expected = batch_loss(unplanned, config, parameters, *batch)
                assert batch_loss(planned, config, parameters, *batch) == expected
