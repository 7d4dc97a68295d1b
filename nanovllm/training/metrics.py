"""The records of a run: the names of its files, the lines of those in JSON Lines, how it ended."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
STEPS_FILE = "steps.jsonl"
SAMPLES_FILE = "samples.jsonl"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A line of metrics.jsonl. Losses are in nats per token; None is a value that is not known.

    Attributes:
        step: updates so far.
        train_loss: mean loss of the batches since the evaluation before; None before the first
            update.
        val_loss: mean loss of the validation split.
        lr: learning rate of the next update.
        grad_norm: mean norm of the gradient before clipping, of the same updates as train_loss.
        tokens_per_s: training tokens per second since the evaluation before.
        elapsed_s: time in the training loop, evaluations and interrupted parts of the run included.
        tokens: training tokens so far.
    """

    step: int
    train_loss: float | None = None
    val_loss: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    tokens_per_s: float | None = None
    elapsed_s: float | None = None
    tokens: int | float | None = None


@dataclass(frozen=True, slots=True)
class Update:
    """A line of steps.jsonl: one update. None is a value that is not known.

    Attributes:
        step: updates before this one.
        train_loss: loss of the update's batch, before the update, in nats per token.
        lr: learning rate of the update.
        grad_norm: norm of the gradient before clipping.
    """

    step: int
    train_loss: float | None = None
    lr: float | None = None
    grad_norm: float | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """A line of samples.jsonl: text that the model generated after `step` steps.

    Attributes:
        text: the prompt and the generated text.
        prompt: the beginning of `text` that is validation text.
    """

    step: int
    text: str
    prompt: str = ""


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """How a run ended.

    Attributes:
        state: "finished", or "stopped" if the run can be resumed.
        evaluations: those of this part of the run.
    """

    folder: Path
    state: str
    step: int
    best_step: int | None
    best_val_loss: float | None
    message: str
    evaluations: tuple[Evaluation, ...] = ()


def parse_object(text: bytes) -> dict[str, Any] | None:
    """Return the object that is JSON in `text`; None if it is damaged or cut off."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
