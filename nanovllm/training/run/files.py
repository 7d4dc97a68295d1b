"""The records of a run: metrics.jsonl, samples.jsonl, run.json and report.html."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nanovllm.errors import TrainingError
from nanovllm.training.atomic_files import write_bytes, write_json
from nanovllm.training.metrics import METRICS_FILE, RUN_FILE, SAMPLES_FILE, Evaluation, parse_object
from nanovllm.training.report import write_report
from nanovllm.training.run.checkpoint import RESUME_FILE


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
                rows = map(parse_object, path.read_bytes().split(b"\n"))
                kept = [row for row in rows if row is not None and row.get("step", 0) <= step]
                text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
                write_bytes(path, text.encode())

    def add_evaluation(self, evaluation: Evaluation, sample: str | None) -> None:
        """Append an evaluation and a sample."""
        _append(self.folder / METRICS_FILE, asdict(evaluation))
        if sample is not None:
            _append(self.folder / SAMPLES_FILE, {"step": evaluation.step, "text": sample})

    def write_summary(self, state: str, **facts: Any) -> None:
        """Write run.json and the report; `state` is running, stopped, finished or failed."""
        self._facts |= {"state": state, **facts}
        write_json(self.folder / RUN_FILE, self._facts)
        write_report(self.folder)


def _append(path: Path, value: Mapping[str, Any]) -> None:
    try:
        with path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
    except OSError as error:
        raise TrainingError(f"{path} cannot be written: {error}") from None
