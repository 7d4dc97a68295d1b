"""Folders of training runs as `nanovllm train` writes them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from nanovllm.trainer import Trainer
from nanovllm.training.config import TrainingConfig
from nanovllm.training.metrics import TrainingResult

TEXT = "she sells sea shells on the sea shore. " * 60
SMALL: Mapping[str, Any] = {
    "layers": 2, "heads": 2, "width": 16, "context": 16, "batch_size": 4, "steps": 12,
    "eval_every": 4, "lr": 1e-2, "warmup_steps": 2, "tokenizer": "char", "sample_tokens": 6,
    "backend": "numpy",
}  # fmt: skip
"""Settings of a run on TEXT that takes a moment."""
INFO: Mapping[str, Any] = {
    "config": {"steps": 40, "lr": 1e-3, "tokenizer": "char"},
    "model": {"layers": 2, "width": 32, "parameters": 123_456},
    "data": {"validation_tokens": 500, "validation_bytes": 1000, "files": ["a.txt", "b.txt"]},
    "state": "finished",
}


def metrics(steps: Iterable[int], **changes: Any) -> list[dict[str, Any]]:
    """Return evaluations whose validation loss is 4 - step / 20."""
    return [
        {
            "step": step,
            "train_loss": 3.9 - step / 20,
            "val_loss": 4.0 - step / 20,
            "lr": 1e-3,
            "grad_norm": 1.5,
            "tokens_per_s": 1000.0,
            "elapsed_s": step / 10,
            "tokens": step * 100,
            **changes,
        }
        for step in steps
    ]


def write_run(
    folder: Path,
    rows: Iterable[Mapping[str, Any]] = (),
    samples: Iterable[Mapping[str, Any]] = (),
    info: Mapping[str, Any] | None = INFO,
    updates: Iterable[Mapping[str, Any]] = (),
) -> Path:
    """Write the files of a run, without run.json if `info` is None, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"metrics.jsonl": rows, "samples.jsonl": samples, "steps.jsonl": updates}
    for name, lines in files.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        if text:
            (folder / name).write_text(text, encoding="utf-8")
    if info is not None:
        (folder / "run.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


def weights(folder: Path) -> dict[str, np.ndarray]:
    """Return the last weights of a run."""
    return dict(load_file(folder / "last" / "model.safetensors"))


def assert_same_weights(first: Path, second: Path) -> None:
    """Compare the last weights of two runs bit for bit."""
    expected = weights(first)
    for name, array in weights(second).items():
        np.testing.assert_array_equal(array, expected[name])


def config(text: Path, output: Path, **changes: Any) -> TrainingConfig:
    """Return the settings of a small run."""
    return TrainingConfig.from_dict({"data": text, "output": output, **SMALL, **changes})


def train(text: Path, output: Path, **changes: Any) -> TrainingResult:
    """Run it."""
    return Trainer(config(text, output, **changes)).train()


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
