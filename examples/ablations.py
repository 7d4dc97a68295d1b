"""Train small networks, each without one part, and compare their losses.

The runs are those of `nanovllm train --ablate PART`; a run that exists is resumed or kept. They
take about ten minutes on two cores. tools/ablation_chart.py draws their curves.

Run: python examples/ablations.py shakespeare.txt [FOLDER] [STEPS]
"""

import json
import sys
from pathlib import Path
from typing import Any

from nanovllm import Trainer, TrainingConfig, TrainingError

NUMPY: dict[str, Any] = {"backend": "numpy", "num_threads": 1}  # compiled attention is causal
PARTS = ("", "positions", "scaling", "ffn", "layer-norm", "residual", "causal-mask")


def train(text: Path, folder: Path, part: str, steps: int) -> None:
    """Train the network without `part`, or whole for ""."""
    if (folder / "resume.safetensors").exists():
        trainer = Trainer.resume(folder)
    else:
        config = TrainingConfig(
            data=text,
            output=folder,
            tokenizer="char",
            layers=4,
            heads=4,
            width=64,
            context=64,
            steps=steps,
            lr=2e-3,
            eval_every=max(1, steps // 20),
            max_eval_batches=40,
            ablate=part.split(),
            **(NUMPY if part == "causal-mask" else {}),
        )
        trainer = Trainer(config)
    try:
        with trainer:
            trainer.train()
    except TrainingError as error:  # such as a loss that is not finite: also a result
        print(f"{part}: {error}")


def last_line(file: Path) -> dict[str, object]:
    """Return the last record of a file in JSON Lines."""
    line: dict[str, object] = json.loads(file.read_text(encoding="utf-8").splitlines()[-1])
    return line


def main() -> None:
    text = Path(sys.argv[1])
    runs = Path(sys.argv[2] if len(sys.argv) > 2 else "ablations")
    steps = int(sys.argv[3]) if len(sys.argv) > 3 else 2000
    for part in PARTS:
        train(text, runs / (part or "whole"), part, steps)
    print(f"{'without':12} {'loss':>6}  what it writes")
    for part in PARTS:
        folder = runs / (part or "whole")
        loss = last_line(folder / "metrics.jsonl")["val_loss"]
        sample = str(last_line(folder / "samples.jsonl")["text"])
        print(f"{part or 'nothing':12} {loss:6.3f}  {sample[:40]!r}")


if __name__ == "__main__":
    main()
