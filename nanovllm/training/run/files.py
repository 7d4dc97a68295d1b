"""The records of a run: metrics.jsonl, steps.jsonl, samples.jsonl, run.json and report.html."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nanovllm.errors import TrainingError
from nanovllm.training.atomic_files import write_bytes, write_json
from nanovllm.training.commands import resume_command
from nanovllm.training.metrics import (
    RUN_FILE,
    Evaluation,
    Record,
    Sample,
    Update,
    parse_object,
    read_step,
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
        last_steps: dict[type[Record], int] = {
            Evaluation: evaluated_step,
            Sample: evaluated_step,
            Update: step - 1,
        }
        for kind, last_step in last_steps.items():
            path = self.folder / kind.FILE
            if path.exists():
                kept = [line for line in _read_lines(path) if _is_until(line, last_step)]
                write_bytes(path, b"".join(line + b"\n" for line in kept))

    def add(self, row: Record) -> None:
        """Append a record to its file."""
        path = self.folder / row.FILE
        try:
            with path.open("a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(asdict(row), ensure_ascii=False, allow_nan=False) + "\n")
        except OSError as error:
            raise TrainingError(f"{path} cannot be written: {error}") from None

    def write_summary(self, state: str, **facts: Any) -> None:
        """Write run.json and the report; `state` is running, stopped, finished or failed."""
        self._facts |= {"state": state, **facts}
        write_json(self.folder / RUN_FILE, self._facts)
        write_report(self.folder)


def _foreign_names(folder: Path) -> set[str]:
    """Return the names in a folder, except those of a run that has saved nothing yet."""
    try:
        names = {path.name for path in folder.iterdir()}
        last_is_foreign = (folder / LAST).is_file() or (folder / LAST / WEIGHTS_FILE).exists()
    except OSError as error:
        raise TrainingError(f"{folder} cannot be read: {error.strerror or error}") from None
    own = _UNFINISHED - {LAST} if last_is_foreign else _UNFINISHED
    return names - own if LOCK_FILE in names else names


def _read_lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().split(b"\n")
    except OSError as error:
        raise TrainingError(f"{path} cannot be read: {error.strerror or error}") from None


def _is_until(line: bytes, last_step: int) -> bool:
    """Return whether a line is readable, and its step at most `last_step`."""
    step = read_step(parse_object(line) or {})
    return step is not None and step <= last_step
