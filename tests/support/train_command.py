"""`nanovllm train` in this process and in others, for tests."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nanovllm.cli.main import main

SIZES = {
    "layers": 1,
    "heads": 2,
    "width": 16,
    "context": 16,
    "batch-size": 2,
    "steps": 8,
    "eval-every": 4,
    "tokenizer": "char",
    "sample-tokens": 4,
    "backend": "numpy",
}
TIMEOUT_S = 120.0


def flags(text: Path, folder: Path, **changes: Any) -> list[str]:
    """Return the command line of a small run; a change of None leaves a flag out."""
    settings: dict[str, Any] = {"data": text, "output": folder, **SIZES}
    settings |= {name.replace("_", "-"): value for name, value in changes.items()}
    given = {name: value for name, value in settings.items() if value is not None}
    return ["train", *(part for name in given for part in (f"--{name}", str(given[name])))]


def refuse(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Run a command that fails, and return its message."""
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert message.startswith("nanovllm: ")
    assert "Traceback" not in message
    return message


def state(folder: Path) -> str:
    """Return the state of a run."""
    return str(json.loads((folder / "run.json").read_text(encoding="utf-8"))["state"])


def steps(folder: Path) -> list[int]:
    """Return the steps of its evaluations."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["step"] for line in lines]


def start(arguments: list[str], **options: Any) -> "subprocess.Popen[str]":
    """Run the command in another process, on one thread."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "nanovllm", *arguments]
    return subprocess.Popen(command, text=True, env=environment, **options)
