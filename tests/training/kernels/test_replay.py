"""Replayed passes: the same bits as passes that run in Python, whatever comes between."""

from collections.abc import Iterator

import numpy as np
import pytest

from nanovllm.model.checkpoint import expected_shapes
from nanovllm.model.config import GPT2Config
from nanovllm.training.kernels.operations import CompiledOperations
from nanovllm.training.network import model
from nanovllm.training.network.autograd import Tape
from nanovllm.training.network.model import Dropout, batch_loss
from nanovllm.training.network.operations import NumpyOperations
from nanovllm.training.network.parameters import Parameters
from tests.training.kernels.comparison import random

pytestmark = pytest.mark.slow(25)


class Unreplayed(CompiledOperations):
    """Operations whose passes always run in Python."""

    run_pass = NumpyOperations.run_pass


@pytest.fixture(scope="module")
def unreplayed() -> Iterator[Unreplayed]:
    operations = Unreplayed(2)
    yield operations
    operations.close()


@pytest.fixture
def replayed() -> Iterator[CompiledOperations]:
    operations = CompiledOperations(2)
    yield operations
    operations.close()


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Return the list of all tapes, one for each pass that ran in Python."""
    made: list[Tape] = []

    class CountedTape(Tape):
        def __init__(self, operations: NumpyOperations, *, records: bool) -> None:
            super().__init__(operations, records=records)
            made.append(self)

    monkeypatch.setattr(model, "Tape", CountedTape)
    return made


def make_config(**changes: object) -> GPT2Config:
    sizes = {"vocab": 50, "max_positions": 24, "d_model": 32, "layers": 2, "heads": 4, "d_ff": 80}
    return GPT2Config(**{**sizes, **changes})  # type: ignore[arg-type]


def make_parameters(config: GPT2Config) -> Parameters:
    parameters = Parameters(
        expected_shapes(config), constant_positions=config.positions == "sinusoidal"
    )
    for seed, (_, tensor) in enumerate(parameters):
        tensor.data[...] = 0.2 * random(*tensor.data.shape, seed=seed)
    return parameters


def make_batch(config: GPT2Config, *shape: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(seed).integers(0, config.vocab, (2, *shape))
    return tokens[0], tokens[1]


@pytest.mark.parametrize(
    ("changes", "group_tokens"),
    [
        ({}, 1024),
        ({}, 60),  # groups of 2, 3 and 2 sequences
        ({"tied_head": False, "activation": "relu"}, 1024),
        ({"activation": "silu", "positions": "sinusoidal"}, 1024),
    ],
)
def test_replayed_passes_have_the_bits_of_others(
    replayed: CompiledOperations,
    unreplayed: Unreplayed,
    tapes: list[Tape],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    group_tokens: int,
) -> None:
    """In training and in evaluation, with batches of two shapes, after updates of the weights."""
    monkeypatch.setattr(model, "GROUP_TOKENS", group_tokens)
    config = make_config(**changes)
    results = []
    for operations in (unreplayed, replayed):
        parameters, losses = make_parameters(config), []
        counts = []
        for step in range(6):
            tapes.clear()
            for scale, shape in ((0.01, (7, 20)), (None, (7, 20)), (0.01, (2, 24))):
                batch = make_batch(config, *shape, seed=step)
                losses.append(batch_loss(operations, config, parameters, *batch, scale=scale))
            parameters.values -= 0.01 * parameters.gradients
            counts.append(len(tapes))
        results.append((losses, parameters.values, parameters.gradients))
        is_replayed = operations is replayed
        assert (counts[0] > 0, counts[-1] == 0) == (True, is_replayed)
    (losses, values, gradients), (replayed_losses, *replayed_arrays) = results
    assert losses == replayed_losses
    for expected, array in zip((values, gradients), replayed_arrays, strict=True):
        np.testing.assert_array_equal(array.view(np.int32), expected.view(np.int32))


def test_a_pass_beside_an_array_of_the_pool_runs_in_python(
    replayed: CompiledOperations, tapes: list[Tape]
) -> None:
    config = make_config()
    parameters = make_parameters(config)
    batch = make_batch(config, 3, 10, seed=0)
    losses = [batch_loss(replayed, config, parameters, *batch, scale=0.1) for _ in range(3)]
    assert len(tapes) == 2
    x = random(60, 32)
    held = replayed.layer_norm(x, np.ones(32, np.float32), np.zeros(32, np.float32), 1e-5)
    expected = [array.copy() for array in held]
    losses.append(batch_loss(replayed, config, parameters, *batch, scale=0.1))
    assert len(tapes) == 3
    for array, other in zip(held, expected, strict=True):
        np.testing.assert_array_equal(array, other)
    del held, array
    losses.append(batch_loss(replayed, config, parameters, *batch, scale=0.1))
    assert len(tapes) == 3
    assert losses == [losses[0]] * 5


def test_recorded_passes_end_with_the_working_memory_that_they_used(
    replayed: CompiledOperations, tapes: list[Tape]
) -> None:
    """Evaluation needs less of it than the training after it."""
    config = make_config()
    parameters = make_parameters(config)
    small, large = make_batch(config, 2, 8, seed=0), make_batch(config, 16, 24, seed=0)
    losses = [batch_loss(replayed, config, parameters, *small) for _ in range(3)]
    assert len(tapes) == 2
    batch_loss(replayed, config, parameters, *large, scale=0.1)
    losses += [batch_loss(replayed, config, parameters, *small) for _ in range(3)]
    assert len(tapes) == 4  # the larger pass, and one that is recorded again
    assert losses == [losses[0]] * 6


def test_tokens_are_checked_in_replayed_passes(replayed: CompiledOperations) -> None:
    config = make_config()
    parameters = make_parameters(config)
    token_ids, targets = make_batch(config, 2, 8, seed=0)
    losses = [batch_loss(replayed, config, parameters, token_ids, targets) for _ in range(3)]
    for wrong_ids, wrong_targets in ((token_ids + 50, targets), (token_ids, targets - 50)):
        with pytest.raises(IndexError, match="not in the vocabulary of 50 tokens"):
            batch_loss(replayed, config, parameters, wrong_ids, wrong_targets)
    assert batch_loss(replayed, config, parameters, token_ids, targets) == losses[0]


def test_an_interrupted_pass_is_not_replayed(
    replayed: CompiledOperations, tapes: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    parameters = make_parameters(config)
    batch = make_batch(config, 2, 8, seed=0)
    losses = [batch_loss(replayed, config, parameters, *batch)]
    with monkeypatch.context() as patch:
        patch.setattr(replayed, "attention", interrupt)
        with pytest.raises(KeyboardInterrupt):
            batch_loss(replayed, config, parameters, *batch)
    losses += [batch_loss(replayed, config, parameters, *batch) for _ in range(3)]
    assert losses == [losses[0]] * 4
    assert len(tapes) == 3


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_passes_with_dropout_run_in_python(replayed: CompiledOperations, tapes: list[Tape]) -> None:
    """Each has masks of its own."""
    config = make_config()
    parameters = make_parameters(config)
    batch = make_batch(config, 2, 8, seed=0)
    losses = {
        batch_loss(replayed, config, parameters, *batch, scale=0.1, dropout=Dropout(0.5, step=step))
        for step in range(4)
    }
    assert len(losses) == len(tapes) == 4


def test_many_networks_and_shapes(replayed: CompiledOperations, unreplayed: Unreplayed) -> None:
    """More kinds of passes than are kept."""
    config = make_config(layers=1)
    networks = [make_parameters(config) for _ in range(3)]
    for number, parameters in enumerate(networks):
        parameters.values *= 1 + number
    for _ in range(3):
        for parameters in networks:
            for context in range(1, 8):
                batch = make_batch(config, 2, context, seed=context)
                expected = batch_loss(unreplayed, config, parameters, *batch)
                assert batch_loss(replayed, config, parameters, *batch) == expected
