"""Training computes what torch and transformers compute: losses, gradients and updates.

They are recorded (tests/reference). Where both are installed, runs are also loaded by transformers.
"""

import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanovllm.hub.names import bundled_folder
from nanovllm.llm import LLM
from nanovllm.model.activation import ACTIVATIONS
from nanovllm.model.checkpoint import expected_shapes, load_arrays
from nanovllm.model.config import ModelConfig
from nanovllm.model.families.registry import load_config
from nanovllm.sampling_params import SamplingParams
from nanovllm.trainer import Trainer
from nanovllm.training.config import TrainingConfig
from nanovllm.training.network.model import batch_loss
from nanovllm.training.network.numpy_operations import NumpyOperations
from nanovllm.training.network.optimizer import AdamW
from nanovllm.training.network.parameters import Parameters
from tests.reference.cases import (
    TRAINING_CASES,
    UPDATE_CASE,
    UPDATE_CLIPS,
    UPDATE_DECAY,
    UPDATE_RATE,
    training_tokens,
)
from tests.support.checkpoints import write_checkpoint

REFERENCE = Path(__file__).parents[1] / "reference"
TEXT = "she sells sea shells on the sea shore. " * 60


@pytest.fixture(scope="module")
def recorded() -> Iterator[Mapping[str, np.ndarray]]:
    with np.load(REFERENCE / "recorded_training.npz", allow_pickle=False) as arrays:
        yield arrays


def load(folder: Path) -> tuple[ModelConfig, Parameters]:
    config = load_config(folder)
    parameters = Parameters(expected_shapes(config))
    for name, array in load_arrays(folder, config).items():
        parameters.tensors[name].data[...] = array
    return config, parameters


def mean_loss(
    config: ModelConfig, parameters: Parameters, tokens: np.ndarray, *, differentiate: bool = True
) -> float:
    """Return the mean loss of the next token, and leave its gradients in the parameters."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    scale = 1.0 / targets.size if differentiate else None
    total = batch_loss(NumpyOperations(), config, parameters, inputs, targets, scale=scale)
    return total / targets.size


def test_the_bundled_model_has_the_recorded_loss() -> None:
    recorded = json.loads((REFERENCE / "recorded_loss.json").read_text(encoding="utf-8"))
    config, parameters = load(bundled_folder())
    tokens = np.array([recorded["token_ids"]])
    ours = mean_loss(config, parameters, tokens, differentiate=False)
    assert ours == pytest.approx(recorded["loss"], abs=1e-5)


def test_every_activation_is_recorded() -> None:
    assert {name.removesuffix("-untied") for name in TRAINING_CASES} == set(ACTIVATIONS)


@pytest.mark.parametrize("name", TRAINING_CASES)
def test_loss_and_gradients_equal_those_of_torch(
    tmp_path: Path, recorded: Mapping[str, np.ndarray], name: str
) -> None:
    config, parameters = load(write_checkpoint(tmp_path, **TRAINING_CASES[name]))
    loss = mean_loss(config, parameters, training_tokens())
    assert loss == pytest.approx(float(recorded[f"{name}/loss"]), abs=1e-5)
    expected = np.split(recorded[f"{name}/gradients"], ends_of(parameters))
    ours = sorted(parameters.views(parameters.gradients).items())
    for (tensor, gradient), values in zip(ours, expected, strict=True):
        largest = np.abs(values).max()
        np.testing.assert_allclose(
            gradient.ravel(), values, rtol=1e-4, atol=1e-4 * largest, err_msg=tensor
        )


def ends_of(parameters: Parameters) -> np.ndarray:
    """Return where each tensor but the last ends when all are joined in the order of names."""
    return np.cumsum([tensor.data.size for _, tensor in sorted(parameters.tensors.items())])[:-1]


@pytest.mark.parametrize("grad_clip", UPDATE_CLIPS)
def test_updates_equal_those_of_torch(
    tmp_path: Path, recorded: Mapping[str, np.ndarray], grad_clip: float
) -> None:
    _, parameters = load(write_checkpoint(tmp_path, **TRAINING_CASES[UPDATE_CASE]))
    ends = ends_of(parameters)
    given = np.split(recorded[f"{UPDATE_CASE}/gradients"], ends)
    optimizer = AdamW(
        parameters,
        NumpyOperations(),
        weight_decay=UPDATE_DECAY,
        grad_clip=grad_clip,
        beta1=0.9,
        beta2=0.95,
    )
    expected = recorded[f"update-{grad_clip}/parameters"]
    for step in range(len(expected)):  # from the second on there are moments
        gradients = parameters.views(parameters.gradients)
        for values, name in zip(given, sorted(gradients), strict=True):
            gradients[name][...] = values.reshape(gradients[name].shape)
        norm = optimizer.update(UPDATE_RATE)
        assert norm == pytest.approx(float(recorded[f"update-{grad_clip}/norm"]), rel=1e-5)
        for values, (name, tensor) in zip(
            np.split(expected[step], ends), sorted(parameters.tensors.items()), strict=True
        ):
            np.testing.assert_allclose(
                tensor.data.ravel(), values, rtol=1e-4, atol=1e-6, err_msg=name
            )


@pytest.mark.parametrize(
    "changes",
    [{"tokenizer": "char"}, {"tokenizer": "bpe"}, {"tokenizer": "char", "positions": "sinusoidal"}],
    ids=["char", "bpe", "sinusoidal"],
)
def test_transformers_loads_a_run_and_generates_the_same_text(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, Any],
) -> None:
    transformers = pytest.importorskip("transformers", reason="reads a run with transformers")
    pytest.importorskip("torch", reason="generates with torch")
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    folder = tmp_path / "run"
    config = TrainingConfig(
        data=text,
        output=folder,
        layers=2,
        heads=2,
        width=16,
        context=32,
        batch_size=4,
        steps=20,
        lr=1e-2,
        sample_tokens=0,
        backend="numpy",
        **changes,
    )
    with Trainer(config) as trainer:
        trainer.train()
    transformers.utils.logging.enable_propagation()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        inputs = tokenizer("she sells", return_tensors="pt")
        drawn = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            max_new_tokens=12,
            pad_token_id=0,
        )
    assert not any(info.values()), info
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    with LLM(folder, backend="numpy") as llm:
        output = llm.generate("she sells", SamplingParams(max_tokens=12, temperature=0))[0]
    assert output.prompt_token_ids == inputs["input_ids"][0].tolist()
    expected = drawn[0, len(output.prompt_token_ids) :].tolist()
    assert output.outputs[0].token_ids == expected
    assert output.outputs[0].text == tokenizer.decode(expected)
