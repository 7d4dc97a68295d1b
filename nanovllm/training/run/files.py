"""The records of a run: metrics.jsonl, samples.jsonl, run.json and report.html."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nanovllm.errors import TrainingError
from nanovllm.training.report import write_report
from nanovllm.training.report.run import METRICS_FILE, RUN_FILE, SAMPLES_FILE
from nanovllm.training.run.checkpoint import RESUME_FILE, write_atomically, write_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One line of metrics.jsonl.

    Attributes:
        step: updates so far.
        train_loss: mean loss of the batches since the evaluation before, in nats per token; None
            before the first update.
        val_loss: mean loss of the validation split.
        lr: learning rate of the next update.
        grad_norm: mean norm of the gradient before clipping, of the same updates as train_loss.
        tokens_per_s: training tokens per second since the evaluation before.
        elapsed_s: time in the training loop, evaluations and interrupted parts of the run included.
        tokens: training tokens so far.
    """

    step: int
    train_loss: float | None
    val_loss: float
    lr: float
    grad_norm: float | None
    tokens_per_s: float | None
    elapsed_s: float
    tokens: int


class RunFiles:
    """Writes the records of one run to its folder."""

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """Take the folder and what run.json says of the whole run."""
        self.folder = folder
        self._facts = dict(facts)

    @staticmethod
    def check_is_new(folder: Path) -> None:
        """Raise TrainingError if the folder holds a run, which a new one would overwrite."""
        if folder.exists() and not folder.is_dir():
            raise TrainingError(f"{folder} is a file; --output needs a folder")
        if (folder / RESUME_FILE).exists():
            raise TrainingError(
                f"{folder} holds a run already: continue it with --resume {folder}, or choose "
                "another --output"
            )
        for name in ("config.json", "model.safetensors", RUN_FILE, METRICS_FILE):
            if (folder / name).exists():
                raise TrainingError(
                    f"{folder} holds a checkpoint or a run that cannot be resumed ({name}), which "
                    "a run would overwrite; choose another --output"
                )
        parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not os.access(parent, os.W_OK):
            raise TrainingError(f"{parent} is not writable; choose another --output")

    def drop_after(self, step: int) -> None:
        """Drop evaluations of later steps, which a killed run wrote after its last saved state."""
        for name in (METRICS_FILE, SAMPLES_FILE):
            path = self.folder / name
            if path.exists():
                lines = [line for line in _read_lines(path) if line.get("step", 0) <= step]
                text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
                write_atomically(path, partial(Path.write_bytes, data=text.encode()))

    def add_evaluation(self, evaluation: Evaluation, sample: str | None) -> None:
        """Append an evaluation and a sample."""
        _append(self.folder / METRICS_FILE, asdict(evaluation))
        if sample is not None:
            _append(self.folder / SAMPLES_FILE, {"step": evaluation.step, "text": sample})

    def write_summary(self, state: str, **facts: Any) -> None:
        """Write run.json and the report; `state` is running, stopped, finished or failed."""
        self._facts |= {"state": state, **facts}
        write_json(self.folder / RUN_FILE, self._facts)
        try:
            write_report(self.folder)
        except OSError as error:
            raise TrainingError(f"the report cannot be written: {error}") from None


def _append(path: Path, value: Mapping[str, Any]) -> None:
    try:
        with path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
    except OSError as error:
        raise TrainingError(f"{path} cannot be written: {error}") from None


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON Lines file; a last line that was cut off is left out."""
    lines = []
    for line in path.read_bytes().split(b"\n"):  # text may have other line ends, such as U+2028
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            lines.append(value)
    return lines
