"""Runs on prompts and completions: they learn the answers, on both backends, and are resumed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanovllm.errors import TrainingError
from nanovllm.llm import LLM
from nanovllm.sampling_params import SamplingParams
from nanovllm.trainer import Trainer
from nanovllm.training.config import TrainingConfig
from nanovllm.training.metrics import Update
from nanovllm.training.network.operations import IGNORED
from tests.support.training_runs import assert_same_weights

SETTINGS: dict[str, Any] = {
    "layers": 1,
    "heads": 2,
    "width": 32,
    "context": 16,
    "tokenizer": "bpe",
    "batch_size": 6,
    "sample_tokens": 8,
    "eval_every": 100,
    "num_threads": 1,
}
ANIMALS = {"cat": " meow", "dog": " woof", "cow": " moo", "owl": " hoot"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "animals.jsonl"
    pairs = [{"prompt": f"The {name} says", "completion": sound} for name, sound in ANIMALS.items()]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs * 12), encoding="utf-8")
    return path


def test_a_run_learns_completions_and_their_end(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = TrainingConfig(data=data, output=folder, steps=200, lr=1e-2, **SETTINGS)
    with Trainer(config) as trainer:
        result = trainer.train()
    assert result.best_val_loss is not None
    assert result.best_val_loss < 0.3
    sample = json.loads((folder / "samples.jsonl").read_text().splitlines()[-1])
    assert sample["prompt"].startswith("The ")
    assert sample["prompt"].endswith(" says")
    prompts = [f"The {name} says" for name in ANIMALS]
    with LLM(str(folder)) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=9), use_tqdm=False)
    assert [one.outputs[0].text for one in outputs] == list(ANIMALS.values())
    assert {one.outputs[0].finish_reason for one in outputs} == {"stop"}


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_a_resumed_run_ends_with_the_same_bits(data: Path, tmp_path: Path, backend: str) -> None:
    settings = {**SETTINGS, "steps": 6, "backend": backend, "grad_accumulation": 2, "dropout": 0.1}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with Trainer(TrainingConfig(data=data, output=whole, **settings)) as trainer:
        trainer.train()
    with Trainer(TrainingConfig(data=data, output=parts, stop_after=2, **settings)) as trainer:
        trainer.train()
    with Trainer.resume(parts) as trainer:
        trainer.train()
    assert_same_weights(whole, parts)
    text = data.read_text(encoding="utf-8")  # the same tokens, of which others have a loss
    first = json.dumps({"prompt": "The cat", "completion": " says meow"})
    data.write_text(f"{first}\n{text.split(chr(10), 1)[1]}", encoding="utf-8")
    with pytest.raises(TrainingError, match="the data is not that of the run"):
        Trainer.resume(parts)


def test_the_loss_of_a_step_is_the_mean_over_its_targets(data: Path, tmp_path: Path) -> None:
    """Of two batches with different numbers of targets; by the losses of one target at a time."""
    settings = {**SETTINGS, "steps": 1, "backend": "numpy", "grad_accumulation": 2}
    records: list[Update] = []
    trainer = Trainer(TrainingConfig(data=data, output=tmp_path / "run", **settings))
    batches = [trainer.setup.train.batch(number, 6, seed=0) for number in range(2)]
    each = []
    for batch in batches:
        for row, column in np.argwhere(batch.targets != IGNORED):
            one = np.full_like(batch.targets[row : row + 1], IGNORED)
            one[0, column] = batch.targets[row, column]
            each.append(trainer.model.loss(batch.inputs[row : row + 1], one))
    assert len(each) < 2 * 6 * 16 / 2
    for batch in batches:
        trainer.model.backward(batch.inputs, batch.targets, scale=batch.num_targets / len(each))
    squares = sum(float(np.square(one).sum()) for one in trainer.model.gradients.values())
    trainer.train(on_step=records.append)
    assert records[0].train_loss == pytest.approx(np.mean(each), rel=1e-6)
    assert records[0].grad_norm == pytest.approx(np.sqrt(squares), rel=1e-5)
