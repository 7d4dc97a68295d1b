"""Send the records of a training run to a logging service while it trains.

`log` appends JSON lines to a file. A service's client takes its place: `run.log(record)` of Weights
& Biases, or `mlflow.log_metrics(record, step=...)` of MLflow.

Run: python examples/log_training.py [FOLDER]
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nanovllm import Trainer, TrainingConfig

TEXT = "She sells sea shells on the sea shore. " * 100


def train(folder: Path) -> Path:
    """Train a small model and return the file of its log."""
    text, file = folder / "text.txt", folder / "log.jsonl"
    text.write_text(TEXT, encoding="utf-8")
    config = TrainingConfig(
        data=text, output=folder / "run", tokenizer="char", layers=1, width=32, steps=40, lr=3e-3
    )

    def log(record: Any, _sample: str | None = None) -> None:
        """Log an update, or an evaluation and its sample; None is a value that is not known."""
        values = {name: value for name, value in asdict(record).items() if value is not None}
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(values) + "\n")

    with Trainer(config) as trainer:
        trainer.train(on_step=log, on_evaluation=log)
    return file


def main() -> None:
    with TemporaryDirectory() as folder:
        file = train(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder))
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    print(f"{len(lines)} lines; the last update and the last evaluation:")
    print(lines[-2])
    print(lines[-1])


if __name__ == "__main__":
    main()
