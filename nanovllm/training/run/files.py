"""The records of a run: metrics.jsonl, steps.jsonl, samples.jsonl, run.json and report.html."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nanovllm.errors import TrainingError
from nanovllm.training.atomic_files import write_bytes, write_json
from nanovllm.training.commands import resume_command
from nanovllm.training.metrics import (
    METRICS_FILE,
    RUN_FILE,
    SAMPLES_FILE,
    STEPS_FILE,
    Evaluation,
    Sample,
    Update,
    parse_object,
)
from nanovllm.training.report import write_report
from nanovllm.training.run.checkpoint import LAST, RESUME_FILE, WEIGHTS_FILE
from nanovllm.training.run.lock import LOCK_FILE, OWNER_FILE

_UNFINISHED = {LOCK_FILE, OWNER_FILE, f".{RESUME_FILE}.tmp", LAST}
"""Files of a run that was killed before it had saved a state."""


class RunFiles:
    """Writes the records of one run to its folder."""

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """Take the folder and what run.json says of the whole run."""
        self.folder = folder
        self._facts = dict(facts)
        self._steps: list[Update] = []  # not written yet

    @staticmethod
    def check_is_new(folder: Path) -> None:
        """Raise TrainingError unless the folder is missing, empty, or of a run without a state."""
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not existing.is_dir():
            raise TrainingError(f"{existing} is a file; --output needs a folder")
        if (folder / RESUME_FILE).exists():
            raise TrainingError(
                f"{folder} holds a run already: continue it with `{resume_command(folder)}`, or "
                "choose another --output"
            )
        foreign = sorted(_foreign_names(folder)) if folder.exists() else []
        if foreign:
            more = f" and {len(foreign) - 3:,} more" if len(foreign) > 3 else ""
            raise TrainingError(
                f"{folder} is not empty and holds no run: it has {', '.join(foreign[:3])}{more}; "
                "choose a new folder (--output)"
            )
        if not os.access(existing, os.W_OK):
            raise TrainingError(f"{existing} is not writable; choose another --output")

    def drop_after(self, *, evaluated_step: int, step: int) -> None:
        """Drop the lines that a killed run wrote after its last saved state.

        Args:
            evaluated_step: step of the last evaluation that is kept.
            step: updates of the saved state.
        """
        self._steps.clear()
        last_steps = {METRICS_FILE: evaluated_step, SAMPLES_FILE: evaluated_step}
        for name, last_step in {**last_steps, STEPS_FILE: step - 1}.items():
            path = self.folder / name
            if path.exists():
                rows = map(parse_object, _read(path).split(b"\n"))
                kept = [row for row in rows if _is_until(row, last_step)]
                text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
                write_bytes(path, text.encode())

    def add_evaluation(self, evaluation: Evaluation, sample: Sample | None) -> None:
        """Append an evaluation and a sample."""
        self.write_steps()
        _append(self.folder / METRICS_FILE, [asdict(evaluation)])
        if sample is not None:
            _append(self.folder / SAMPLES_FILE, [asdict(sample)])

    def add_step(self, record: Update) -> None:
        """Keep the record of an update until `write_steps`."""
        self._steps.append(record)

    def write_steps(self) -> None:
        """Append the records of updates that are not written yet."""
        if self._steps:
            _append(self.folder / STEPS_FILE, list(map(asdict, self._steps)))
            self._steps.clear()

    def write_summary(self, state: str, **facts: Any) -> None:
        """Write run.json and the report; `state` is running, stopped, finished or failed."""
        self._facts |= {"state": state, **facts}
        write_json(self.folder / RUN_FILE, self._facts)
        write_report(self.folder)


def _foreign_names(folder: Path) -> set[str]:
    """Return the names in a folder, except those of a run that has saved nothing yet."""
    try:
        names = {path.name for path in folder.iterdir()}
        is_foreign = (folder / LAST).is_file() or (folder / LAST / WEIGHTS_FILE).exists()
    except OSError as error:
        raise TrainingError(f"{folder} cannot be read: {error.strerror or error}") from None
    own = _UNFINISHED - {LAST} if is_foreign else _UNFINISHED
    return names - own if LOCK_FILE in names else names


def _append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
    try:
        with path.open("a", encoding="utf-8", newline="\n") as file:
            file.write("".join(lines))
    except OSError as error:
        raise TrainingError(f"{path} cannot be written: {error}") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TrainingError(f"{path} cannot be read: {error.strerror or error}") from None


def _is_until(row: Mapping[str, Any] | None, step: int) -> bool:
    """Return whether a row is readable, and its step at most `step`."""
    value = None if row is None else row.get("step")
    return isinstance(value, int) and value <= step
