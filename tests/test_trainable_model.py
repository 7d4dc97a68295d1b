"""A training loop of one's own: loss, gradients and optimizer of TrainableModel."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanovllm.errors import ModelNotFoundError, TrainingError
from nanovllm.llm import LLM
from nanovllm.sampling_params import SamplingParams
from nanovllm.trainable_model import TrainableModel
from nanovllm.trainer import Trainer
from nanovllm.training.config import TrainingConfig
from nanovllm.training.network.schedule import Schedule
from tests.support.training_runs import weights

TEXT = "she sells sea shells on the sea shore. " * 20
SETTINGS: dict[str, Any] = {
    "layers": 1,
    "heads": 2,
    "width": 16,
    "context": 8,
    "tokenizer": "char",
    "steps": 4,
    "lr": 1e-2,
    "sample_tokens": 0,
    "backend": "numpy",
}


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    return Trainer(TrainingConfig(data=text, output=tmp_path / "run", **SETTINGS))


def test_a_loop_of_ones_own_makes_the_updates_of_the_trainer(
    trainer: Trainer, tmp_path: Path
) -> None:
    with Trainer(trainer.config) as own:
        optimizer = own.model.optimizer()
        schedule = Schedule(peak=1e-2, floor=1e-3, warmup_steps=0, steps=4)
        for step in range(4):
            batch = own.setup.train.batch(step, batch_size=12, seed=0)
            own.model.backward(batch.inputs, batch.targets)
            optimizer.update(schedule.learning_rate(step))
        own.model.save(tmp_path / "own")
        trainer.train()
        for name, array in weights(tmp_path / "run").items():
            np.testing.assert_array_equal(
                own.model.weights[name.removeprefix("transformer.")], array
            )
    sampling = SamplingParams(temperature=0, max_tokens=4)
    prompts = ["she", "sea"]
    with LLM(str(tmp_path / "own")) as llm, LLM(str(tmp_path / "run" / "last")) as whole:
        found, expected = (one.generate(prompts, sampling, use_tqdm=False) for one in (llm, whole))
    assert [one.outputs[0].token_ids for one in found] == [
        one.outputs[0].token_ids for one in expected
    ]


def test_gradients_are_those_of_finite_differences(trainer: Trainer) -> None:
    model = trainer.model
    tokens = [[1, 2, 3, 4], [5, 4, 3, 2]]
    loss = model.backward(tokens)
    assert loss == model.loss(tokens) == pytest.approx(math.log(model.config.vocab), rel=0.1)
    place = (3, 5)
    gradient = float(model.gradients["wte.weight"][place])
    losses = []
    for step in (1e-2, -1e-2):
        model.weights["wte.weight"][place] += step
        losses.append(model.loss(tokens))
        model.weights["wte.weight"][place] -= step
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(gradient, rel=1e-2)


def test_gradients_of_batches_add_up_and_can_be_changed(trainer: Trainer) -> None:
    model = trainer.model
    first, second = [[1, 2, 3]], [[4, 5, 6]]
    model.backward([*first, *second])
    whole = {name: array.copy() for name, array in model.gradients.items()}
    model.zero_gradients()
    for batch in (first, second):
        model.backward(batch, scale=0.5)
    for name, array in model.gradients.items():
        np.testing.assert_allclose(array, whole[name], atol=1e-7)
        array.fill(0.0)
    before = model.weights["wpe.weight"].copy()
    assert model.optimizer(weight_decay=0.0).update(0.1) == 0.0
    np.testing.assert_array_equal(model.weights["wpe.weight"], before)


def test_the_backends_agree_on_a_model_by_name() -> None:
    tokens = [[5, 6, 7, 8, 9], [100, 200, 300, 400, 500]]
    losses, gradients = [], []
    for backend in ("numba", "numpy"):
        with TrainableModel.load("tiny-books", backend=backend, num_threads=1) as model:
            losses.append(model.backward(tokens))
            gradients.append(model.gradients["h.0.attn.c_attn.weight"].copy())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    np.testing.assert_allclose(gradients[0], gradients[1], atol=1e-5)
    with pytest.raises(ModelNotFoundError):
        TrainableModel.load("no-such-model")


@pytest.mark.parametrize(
    ("token_ids", "targets", "message"),
    [
        ([1, 2, 3], None, r"token_ids are int64 \[3\], but must be integers \[batch, context\]"),
        ([[1.5, 2.0]], None, r"token_ids are float64 \[1, 2\]"),
        ([[1]], None, r"shape \(1, 0\) and targets \(1, 0\)"),
        ([[1, 2]], [[3]], r"shape \(1, 2\) and targets \(1, 1\)"),
        ([[1, -2]], None, r"token_ids have -2, but the vocabulary has the tokens 0 to \d+"),
        ([[1, 2]], [[3, 999]], r"targets have 999"),
        ([[1, 2]], [[3, -2]], r"targets have -2, .* 0 to \d+, and -1 ignores a target"),
        ([[1, 2], [3]], None, r"token_ids have rows of different lengths, .* pad the rows"),
        ([[1, 2]], [[3, 4], [5]], r"targets have rows of different lengths"),
        ([list(range(10))], None, r"a sequence has 9 tokens, .* end at 8"),
    ],
)
def test_arrays_that_cannot_be_used_are_named(
    trainer: Trainer, token_ids: Any, targets: Any, message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        trainer.model.backward(token_ids, targets)
    assert not any(array.any() for array in trainer.model.gradients.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "x"}, "backend is 'x' but must be one of numba, numpy"),
        ({"num_threads": 0}, "num_threads is 0 but must be an integer, from 1 to 1024"),
    ],
)
def test_a_backend_that_cannot_be_used_is_named(settings: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        TrainableModel.load("tiny-books", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta1": 2.0}, "beta1 is 2.0 but must be a number, at least 0 and below 1"),
        ({"beta2": 1.0}, "beta2 is 1.0 but"),
        ({"grad_clip": -1.0}, "grad_clip is -1.0 but must be a number, at least 0"),
        ({"weight_decay": math.nan}, "weight_decay is nan but"),
        ({"epsilon": 0.0}, "epsilon is 0.0 but must be a number, above 0"),
    ],
)
def test_settings_of_the_optimizer_out_of_range_are_named(
    trainer: Trainer, settings: Any, message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        trainer.model.optimizer(**settings)
    trainer.model.optimizer(beta1=0.0, grad_clip=0.0)


@pytest.mark.parametrize("learning_rate", [math.nan, math.inf, -0.1])
def test_a_learning_rate_that_is_no_factor_changes_nothing(
    trainer: Trainer, learning_rate: float
) -> None:
    model = trainer.model
    before = model.weights["wte.weight"].copy()
    model.backward([[1, 2, 3]])
    with pytest.raises(TrainingError, match=f"learning_rate is {learning_rate} but must be finite"):
        model.optimizer().update(learning_rate)
    np.testing.assert_array_equal(model.weights["wte.weight"], before)
    assert model.gradients["wte.weight"].any()


def test_weights_that_are_not_finite_are_not_saved(trainer: Trainer, tmp_path: Path) -> None:
    trainer.model.weights["wpe.weight"][0, 0] = math.nan
    with pytest.raises(TrainingError, match=r"wpe\.weight has a value that is not finite"):
        trainer.model.save(tmp_path / "own")
    assert not (tmp_path / "own").exists()


def test_targets_of_minus_one_are_ignored(trainer: Trainer) -> None:
    """The loss is the mean of the others; a batch without any has the loss 0 and no gradient."""
    model = trainer.model
    tokens, targets = np.array([[1, 2, 3, 4], [5, 6, 7, 8]]), np.full((2, 4), -1)
    losses = [model.loss(tokens[:1, :2], [[-1, 3]]), model.loss(tokens[1:, :1], [[6]])]
    targets[0, 1], targets[1, 0] = 3, 6
    assert model.backward(tokens, targets) == pytest.approx(sum(losses) / 2, rel=1e-6)
    assert not model.gradients["wpe.weight"][2:].any()
    assert model.gradients["wpe.weight"][:2].any()
    model.zero_gradients()
    assert model.backward(tokens, np.full((2, 4), -1)) == 0.0
    assert not any(array.any() for array in model.gradients.values())
