"""Train nanoGPT's CPU setting with nanovllm and with PyTorch, and compare the validation losses.

Run: python benchmarks/nanogpt.py input.txt --torch-python /path/to/venv/bin/python \
         --json nanogpt.json
     python benchmarks/table.py nanogpt.json --write docs/maintainers/measurements.md
     python tools/loss_chart.py nanogpt.json

input.txt is tinyshakespeare, of https://github.com/karpathy/char-rnn. Both train a new network by
the recipe in examples/training/nanogpt-cpu.toml, each with its own random numbers. The losses are
means over the validation split of nanoGPT, the last tenth of the characters. The last line of the
report is JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.contenders import OURS, ROOT
from benchmarks.options import finish, new_parser, tell
from benchmarks.training import TORCH
from nanovllm.training.config import read_toml
from nanovllm.training.report import read_run

RECIPE = ROOT / "examples" / "training" / "nanogpt-cpu.toml"
TARGET_LOSS = 1.90
TARGET_DIFFERENCE = 0.02

Evaluations = list[dict[str, Any]]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser(__doc__, "torch-python")
    parser.add_argument("data", type=Path, metavar="FILE", help="text to train on")
    parser.add_argument("--config", type=Path, default=RECIPE, metavar="FILE", help="the recipe")
    parser.add_argument("--backend", default="numba", help="ours: numba or numpy (%(default)s)")
    parser.add_argument(
        "--output", type=Path, default=None, metavar="DIR", help="keep our run in this folder"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and report; return 1 if our loss misses both targets."""
    parsed = parse(arguments)
    settings = {**read_toml(parsed.config), "seed": parsed.seed}
    with tempfile.TemporaryDirectory() as temporary:
        runs = {OURS: train_ours(parsed, Path(temporary))}
    if parsed.torch_python is not None:
        runs[TORCH] = train_torch(parsed, settings)
    record = {"benchmark": "nanogpt", "settings": settings, "runs": runs}
    finish(record, parsed)
    return int(not reaches_target(runs))


def reaches_target(runs: Mapping[str, Evaluations]) -> bool:
    """Return whether our last loss is low enough, or as low as torch's."""
    losses = {name: evaluations[-1]["val_loss"] for name, evaluations in runs.items()}
    limit = max(TARGET_LOSS, losses.get(TORCH, 0.0) + TARGET_DIFFERENCE)
    return bool(losses[OURS] <= limit)


def train_ours(parsed: argparse.Namespace, temporary: Path) -> Evaluations:
    """Train with `nanovllm train` on the split of nanoGPT and return the evaluations."""
    tell(OURS)
    text = parsed.data.read_text(encoding="utf-8")
    boundary = int(0.9 * len(text))
    data, validation = temporary / "train.txt", temporary / "validation.txt"
    data.write_text(text[:boundary], encoding="utf-8")
    validation.write_text(text[boundary:], encoding="utf-8")
    folder = parsed.output or temporary / "run"
    command = [sys.executable, "-m", "nanovllm", "train", "--config", str(parsed.config)]
    command += ["--data", str(data), "--validation-data", str(validation)]
    command += ["--output", str(folder), "--seed", str(parsed.seed)]
    command += ["--num-threads", str(parsed.threads), "--backend", parsed.backend]
    subprocess.run(command, check=True, stdout=sys.stderr)
    names = ("step", "train_loss", "val_loss", "elapsed_s")
    return [
        {name: getattr(evaluation, name) for name in names}
        for evaluation in read_run(folder).evaluations
    ]


def train_torch(parsed: argparse.Namespace, settings: Mapping[str, Any]) -> Evaluations:
    """Train with torch and return the evaluations."""
    tell(TORCH)
    command = [parsed.torch_python, "-m", "benchmarks.peers.nanogpt_torch"]
    command += [str(parsed.data.resolve()), json.dumps(settings), "--threads", str(parsed.threads)]
    process = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in process.stdout.splitlines()]


if __name__ == "__main__":
    sys.exit(main())
