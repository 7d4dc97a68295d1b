"""The records of a run: the lines of its files in JSON Lines, and how it ended."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

RUN_FILE = "run.json"
_MAX_STEP = 1 << 53
_MAX_NUMBER = 1e100  # so that sums and differences do not overflow


@dataclass(frozen=True, slots=True)
class Record:
    """A line of a file in JSON Lines, with rising steps. None is a value that is not known."""

    FILE: ClassVar[str]

    step: int

    @classmethod
    def parse(cls, row: Mapping[str, Any]) -> Any:
        """Return the record in a JSON object; None if it has no step."""
        step = read_step(row)
        values: Any = (read_number(row.get(field.name)) for field in fields(cls)[1:])
        return None if step is None else cls(step, *values)


@dataclass(frozen=True, slots=True)
class Evaluation(Record):
    """An evaluation. Losses are in nats per token.

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

    FILE: ClassVar[str] = "metrics.jsonl"

    train_loss: float | None = None
    val_loss: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    tokens_per_s: float | None = None
    elapsed_s: float | None = None
    tokens: int | float | None = None


@dataclass(frozen=True, slots=True)
class Update(Record):
    """An update.

    Attributes:
        step: updates before this one.
        train_loss: loss of the update's batch, before the update, in nats per token.
        lr: learning rate of the update.
        grad_norm: norm of the gradient before clipping.
        tokens_per_s: training tokens of the update per second.
    """

    FILE: ClassVar[str] = "steps.jsonl"

    train_loss: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    tokens_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class Sample(Record):
    """Text that the model generated after `step` updates.

    Attributes:
        text: the prompt and the generated text.
        prompt: the beginning of `text` that is validation text.
    """

    FILE: ClassVar[str] = "samples.jsonl"

    text: str
    prompt: str = ""

    @classmethod
    def parse(cls, row: Mapping[str, Any]) -> Any:
        """Return the sample in a JSON object; None if it has no step or no text."""
        step, text, prompt = read_step(row), row.get("text"), row.get("prompt")
        if step is None or not isinstance(text, str):
            return None
        is_known = isinstance(prompt, str) and text.startswith(prompt)
        return cls(step, text, str(prompt) if is_known else "")


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


def read_step(row: Mapping[str, Any]) -> int | None:
    """Return the step in a JSON object; None if it has none."""
    step = read_number(row.get("step"))
    return int(step) if step is not None and 0 <= step < _MAX_STEP else None


def read_number(value: object) -> float | None:
    """Return a JSON value as a number of at most `_MAX_NUMBER`, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) <= _MAX_NUMBER else None
