"""Learning rate schedules of runs whose number of steps changes when they are resumed."""

from pathlib import Path
from typing import Any

import pytest

from nanovllm.errors import TrainingError
from nanovllm.trainer import Trainer
from nanovllm.training.config import TrainingConfig
from tests.support.training_runs import assert_same_weights

SETTINGS: dict[str, Any] = {
    "layers": 1,
    "heads": 1,
    "width": 8,
    "context": 8,
    "batch_size": 2,
    "lr": 1e-2,
    "tokenizer": "char",
    "sample_tokens": 0,
    "eval_every": 50,
    "backend": "numpy",
}
WSD = {"schedule": "wsd", "decay_steps": 4}


def train(output: Path, **changes: Any) -> Path:
    """Train a new run, or continue that in `output`; return its folder."""
    text = output.parent / "text.txt"
    text.write_text("she sells sea shells on the sea shore. " * 20, encoding="utf-8")
    if output.exists():
        Trainer.resume(output, **changes).train()
    else:
        Trainer(TrainingConfig(data=text, output=output, **SETTINGS | changes)).train()
    return output


@pytest.mark.parametrize(
    ("first", "then", "whole"),
    [
        pytest.param(
            {"schedule": "constant", "steps": 6, "warmup_steps": 2},
            {"steps": 9},
            {"schedule": "constant", "steps": 9, "warmup_steps": 2},
            id="a finished constant run is continued",
        ),
        pytest.param(
            {**WSD, "steps": 30, "stop_after": 6},
            {"steps": 12},
            {**WSD, "steps": 12, "warmup_steps": 1},
            id="the decay begins early, and the warmup remains that of 30 steps",
        ),
        pytest.param(
            {"schedule": "constant", "steps": 5},
            {**WSD, "steps": 9},
            {**WSD, "steps": 9},
            id="a constant run gets a decay",
        ),
        pytest.param(
            {"schedule": "wsd", "epochs": 2, "stop_after": 6, "warmup_steps": 0},
            {"steps": 10, "decay_steps": 2, "min_lr": 0.0},
            {"schedule": "wsd", "steps": 10, "decay_steps": 2, "min_lr": 0.0, "warmup_steps": 0},
            id="steps instead of epochs",
        ),
    ],
)
def test_a_run_of_another_length_ends_with_the_bits_of_one_that_had_it_from_the_beginning(
    tmp_path: Path, first: dict[str, Any], then: dict[str, Any], whole: dict[str, Any]
) -> None:
    parts = train(tmp_path / "parts", **first)
    train(parts, **then)
    assert_same_weights(train(tmp_path / "whole", **whole), parts)


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        ({"steps": 8, "stop_after": 6}, {"steps": 20}, r"cosine schedule of 20 steps gives update"),
        ({**WSD, "steps": 8}, {"steps": 20}, r"gives update 5 the learning rate 0\.01, but the"),
        ({**WSD, "steps": 8, "stop_after": 6}, {"steps": 5}, r"5, but the run .* made 6 updates"),
        ({**WSD, "steps": 8, "stop_after": 6}, {"decay_steps": 7}, r"gives update 2 the learning"),
    ],
)
def test_a_change_of_learning_rates_that_were_used_is_refused(
    tmp_path: Path, first: dict[str, Any], then: dict[str, Any], message: str
) -> None:
    folder = train(tmp_path / "run", **first)
    with pytest.raises(TrainingError, match=message):
        Trainer.resume(folder, **then)
    train(folder)
