"""A run's folder as `nanovllm train` writes it: run.json and the files in JSON Lines.

A run may have been killed at any moment. A last line that is cut off is ignored; other lines that
cannot be read are counted in a notice.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

from nanovllm.errors import TrainingError, counted
from nanovllm.training.metrics import (
    RUN_FILE,
    Evaluation,
    Record,
    Sample,
    Update,
    parse_object,
    read_number,
    read_step,
)

_R = TypeVar("_R", bound=Record)
State = Literal["running", "finished", "stopped", "failed", "unknown"]

_MAX_RUN_BYTES = 4 << 20
_MAX_BYTES = 64 << 20  # of a file in JSON Lines: some 300,000 evaluations
_MIN_RISE = 0.01  # of the validation loss, in proportion to its lowest
_ROUNDING = 1e-3  # by which a loss in metrics.jsonl may differ from the one in run.json


@dataclass(frozen=True, slots=True)
class Run:
    """What the folder of a run contains. `notices` lists what could not be read."""

    folder: Path
    info: Mapping[str, Any]
    evaluations: tuple[Evaluation, ...]
    samples: tuple[Sample, ...]
    updates: tuple[Update, ...]
    notices: tuple[str, ...]

    @property
    def name(self) -> str:
        """Return the name of the folder."""
        return self.folder.resolve().name or str(self.folder)

    @property
    def state(self) -> State:
        """Return the state in run.json."""
        state = self.info.get("state")
        return cast("State", state) if state in get_args(State) else "unknown"

    @property
    def message(self) -> str:
        """Return the reason why the run stopped or failed; empty if there is none."""
        message = self.info.get("message")
        return message if isinstance(message, str) else ""

    def group(self, name: str) -> Mapping[str, Any]:
        """Return a group of run.json: "config", "model" or "data"."""
        group = self.info.get(name)
        return group if isinstance(group, dict) else {}

    def number(self, group: str, name: str) -> float | None:
        """Return a number of run.json; None if it is missing."""
        return read_number(self.group(group).get(name))

    @property
    def step(self) -> int:
        """Return the last known step: of run.json or of the last evaluation."""
        evaluated = self.evaluations[-1].step if self.evaluations else 0
        return max(evaluated, read_step(self.info) or 0)

    @property
    def total_steps(self) -> int | None:
        """Return the number of steps that the run will take; None if it is not known."""
        steps = self.number("config", "steps")
        return None if steps is None or steps < 1 else max(int(steps), self.step)

    @property
    def best(self) -> Evaluation | None:
        """Return the evaluation with the lowest validation loss; None before the first."""
        measured = [one for one in self.evaluations if one.val_loss is not None]
        best = min(measured, key=lambda one: one.val_loss or 0.0, default=None)
        step, loss = (read_number(self.info.get(name)) for name in ("best_step", "best_val_loss"))
        if step is None or loss is None:
            return best
        # run.json knows better only if lines of metrics.jsonl are missing.
        is_listed = best is not None and (best.val_loss or 0.0) <= loss + _ROUNDING
        return best if is_listed else Evaluation(int(step), val_loss=loss)

    @property
    def overfitting(self) -> str:
        """Return how the validation loss rose while the model was trained; empty if it did not."""
        best, last = self.best, self.evaluations[-1] if self.evaluations else None
        if best is None or last is None or None in (best.val_loss, last.val_loss):
            return ""
        if best.step == 0 < last.step:
            return (
                f"No step improved on the untrained model: its validation loss is "
                f"{best.val_loss:.4f}, that of step {last.step:,} is {last.val_loss:.4f}. The "
                "checkpoint is the untrained model; train on more text, or with a lower "
                "--learning-rate."
            )
        if None in (best.train_loss, last.train_loss):
            return ""
        losses = (best.train_loss, last.train_loss, best.val_loss, last.val_loss)
        train_before, train_now, lowest, now = (math.nan if one is None else one for one in losses)
        if not (now > lowest * (1 + _MIN_RISE) and train_now < train_before):
            return ""
        return (
            f"The model overfits: since step {best.step:,} the training loss fell from "
            f"{train_before:.4f} to {train_now:.4f}, but the validation loss rose from "
            f"{lowest:.4f} to {now:.4f}. The checkpoint is that of step {best.step:,}; more data, "
            "--dropout 0.1 or a smaller model can lower it, --patience 3 ends a run earlier."
        )

    @property
    def bits_per_byte_factor(self) -> float | None:
        """Return the factor from a loss in nats per token to bits per byte of validation text.

        It is tokens / bytes / ln 2. Bits per byte are comparable between tokenizers.
        """
        tokens = self.number("data", "validation_tokens")
        size_bytes = self.number("data", "validation_bytes")
        return tokens / size_bytes / math.log(2) if tokens and size_bytes else None

    @property
    def bits_per_byte(self) -> float | None:
        """Return the best validation loss in bits per byte."""
        factor, best = self.bits_per_byte_factor, self.best
        if factor is None or best is None or best.val_loss is None:
            return None
        return best.val_loss * factor

    @property
    def tokens_per_s(self) -> float | None:
        """Return the median throughput; None before it is measured."""
        rates = sorted(one.tokens_per_s for one in self.evaluations if one.tokens_per_s is not None)
        return rates[len(rates) // 2] if rates else None

    def last(self, name: str) -> float | None:
        """Return the last known value of a metric."""
        values = (getattr(one, name) for one in reversed(self.evaluations))
        return next((value for value in values if value is not None), None)


def is_run(folder: Path) -> bool:
    """Return whether a folder is the output folder of a run."""
    return any((folder / name).is_file() for name in (RUN_FILE, Evaluation.FILE))


def read_run(folder: Path) -> Run:
    """Read a run's folder; raises TrainingError if it is not one."""
    folder = Path(folder)
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "does not exist"
        raise TrainingError(f"{folder} {kind}; name the output folder of a `nanovllm train` run")
    if not is_run(folder):
        raise TrainingError(
            f"{folder} has neither {Evaluation.FILE} nor {RUN_FILE}; it is not the output folder "
            "of a `nanovllm train` run"
        )
    notices: list[str] = []
    return Run(
        folder,
        _read_info(folder / RUN_FILE, notices),
        tuple(_read_rows(folder, Evaluation, notices)),
        tuple(_read_rows(folder, Sample, notices)),
        tuple(_read_rows(folder, Update, notices)),
        tuple(notices),
    )


def _read_rows(folder: Path, kind: type[_R], notices: list[str]) -> Iterator[_R]:
    """Yield the records of a kind, whose steps must rise."""
    path, unreadable, last_step = folder / kind.FILE, 0, -1
    for line in _read_lines(path, notices):
        row = kind.parse(parse_object(line) or {})
        if row is None or row.step <= last_step:
            unreadable += 1
        else:
            last_step = row.step
            yield row
    if unreadable:
        notices.append(f"{path.name}: {counted(unreadable, 'line')} could not be read.")


def _read_lines(path: Path, notices: list[str]) -> Iterator[bytes]:
    """Yield the complete lines in the last `_MAX_BYTES` of a file; none if it is missing.

    The last line is complete if it ends with a line break or is valid JSON.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        size_bytes = file.seek(0, 2)
        file.seek(max(0, size_bytes - _MAX_BYTES))
        lines = file.read(_MAX_BYTES).split(b"\n")
    if size_bytes > _MAX_BYTES:
        del lines[0]
        notices.append(f"{path.name}: only the last {_MAX_BYTES >> 20} MiB are shown.")
    yield from filter(bytes.strip, lines[:-1])
    if lines and lines[-1].rstrip().endswith(b"}"):
        yield lines[-1]


def _read_info(path: Path, notices: list[str]) -> dict[str, Any]:
    """Return run.json; empty, with a notice, if it is missing or damaged."""
    if not path.is_file():
        notices.append(f"{path.name} is missing: the settings are unknown.")
        return {}
    info = parse_object(path.read_bytes()) if path.stat().st_size <= _MAX_RUN_BYTES else None
    if info is not None:
        return info
    notices.append(f"{path.name} could not be read: the settings are unknown.")
    return {}
