"""The runs of docs/tutorials/training-dynamics.md, and their pictures.

Run: python tools/tutorials/dynamics.py --data shakespeare.txt

This trains with the commands of the page, which takes a few minutes, and keeps what the page shows
of their steps.jsonl and metrics.jsonl in dynamics.json. `python tools/make_tutorials.py` makes the
page from that file.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.tutorials.pages import Tutorial, table
from tools.tutorials.plot import Line, chart

PAGE = "training-dynamics.md"
RECORD = Path(__file__).with_suffix(".json")
SCENE_BYTES = 20_000
COMMANDS = {
    "good": "--data shakespeare.txt --tokenizer char --steps 500 --lr 1e-3",
    "low": "--data shakespeare.txt --tokenizer char --steps 500 --lr 1e-5",
    "high": "--data shakespeare.txt --tokenizer char --steps 500 --lr 1e-1",
    "exploding": "--data shakespeare.txt --tokenizer char --steps 500 --lr 1 --grad-clip 0",
    "clipped": "--data shakespeare.txt --tokenizer char --steps 500 --lr 1 --grad-clip 1",
    "memorized": "--data scene.txt --tokenizer char --steps 2000 --eval-every 100",
    "words": "--data shakespeare.txt --tokenizer bpe --steps 20",
}
"""The options of `nanovllm train` by the name of the output folder."""
_EXPLODING = (
    ("good", "0.001, clipped", "one"),
    ("clipped", "1, clipped", "three"),
    ("exploding", "1, not clipped", "two"),
)
"""Runs of the charts of losses and norms, with their labels and colours."""
_FIRST_STEPS, _EVERY = 20, 5  # steps that are kept: the first, then every fifth


@dataclass(frozen=True, slots=True)
class Run:
    """What a run wrote: a row for each evaluation and for each step that is kept.

    Attributes:
        evaluations: step, training loss (None at first) and validation loss.
        steps: step, training loss and norm of the gradient before clipping.
    """

    vocab: int
    evaluations: list[list[float | None]]
    steps: list[list[float | None]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trainings and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="tinyshakespeare")
    parser.add_argument("--only", choices=COMMANDS, action="append", help="run; repeatable")
    parsed = parser.parse_args(arguments)
    text = parsed.data.read_text(encoding="utf-8")
    runs = json.loads(RECORD.read_text(encoding="utf-8"))["runs"] if parsed.only else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "shakespeare.txt").write_text(text, encoding="utf-8")
        (folder / "scene.txt").write_bytes(text.encode()[:SCENE_BYTES])
        for run in parsed.only or COMMANDS:
            options = COMMANDS[run].split()
            command = [sys.executable, "-m", "nanovllm", "train", "--output", run, *options]
            subprocess.run(command, cwd=folder, check=True)
            runs[run] = asdict(read(folder / run))
    record = {"letter_entropy": letter_entropy(text), "runs": runs}
    lines = json.dumps(record, separators=(",", ":")).replace("]],", "]],\n")
    RECORD.write_text(lines + "\n", encoding="utf-8")
    return 0


def read(folder: Path) -> Run:
    """Read the files of a run."""
    metrics, steps = (_lines(folder / name) for name in ("metrics.jsonl", "steps.jsonl"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return Run(
        config["vocab_size"],
        [[row["step"], _round(row["train_loss"]), _round(row["val_loss"])] for row in metrics],
        [
            [row["step"], _round(row["train_loss"]), _round(row["grad_norm"])]
            for row in steps
            if row["step"] < _FIRST_STEPS or row["step"] % _EVERY == 0
        ],
    )


def letter_entropy(text: str) -> float:
    """Return the loss in nats per character of a model that knows only how frequent each is."""
    counts = Counter(text).values()
    return -sum(count * math.log(count / len(text)) for count in counts) / len(text)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def load() -> tuple[dict[str, Run], float]:
    """Return the recorded runs, and the entropy of the letters of their text."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    return {name: Run(**run) for name, run in record["runs"].items()}, record["letter_entropy"]


def tutorial() -> Tutorial:
    """Return the contents of the page."""
    runs, entropy = load()
    memorized = runs["memorized"].evaluations
    best = min(memorized, key=lambda row: row[2] or math.inf)
    parts = {
        "first": _first(runs),
        "rates": _rates(runs),
        "norms": _norms(runs),
        **{name: _command(name) for name in COMMANDS},
    }
    facts = (
        f"step {best[0]} at {best[2]:.2f}",
        f"rises to {memorized[-1][2]:.2f}",
        f"down to {memorized[-1][1]:.2f}",
        f"{entropy:.2f}",
        f"head -c {SCENE_BYTES} shakespeare.txt > scene.txt",
        f"only {SCENE_BYTES:,} characters",
        f"e^{memorized[-1][2]:.2f} = {math.exp(memorized[-1][2] or 0):.0f}",
    )
    pictures = {
        "learning-rates.svg": _rates_chart(runs, entropy),
        "exploding.svg": chart(
            "A learning rate of 1: the loss explodes", "training loss, logarithmic",
            [_steps(runs, name, label, kind, 1) for name, label, kind in _EXPLODING], is_log=True,
        ),
        "gradient-norms.svg": chart(
            "The norm of the gradient", "norm before clipping, logarithmic",
            [_steps(runs, name, label, kind, 2) for name, label, kind in _EXPLODING], is_log=True,
        ),
        "overfitting.svg": _memorized_chart(runs["memorized"]),
    }  # fmt: skip
    return Tutorial(PAGE, parts, facts, pictures)


def _command(name: str) -> str:
    data, others = COMMANDS[name].split(" --steps")
    return f"```sh\nnanovllm train {data} --output {name} \\\n  --steps{others}\n```"


def _first(runs: Mapping[str, Run]) -> str:
    rows = [
        [kind, f"{run.vocab:,}", f"{math.log(run.vocab):.3f}", f"{run.evaluations[0][2]:.3f}"]
        for kind, run in (("characters", runs["good"]), ("pieces of words", runs["words"]))
    ]
    return table(["tokens", "vocabulary V", "ln V", "validation loss at step 0"], rows)


def _rates(runs: Mapping[str, Run]) -> str:
    rows = []
    for name, rate in (("low", "0.00001"), ("good", "0.001"), ("high", "0.1")):
        losses = {int(row[0] or 0): row[2] for row in runs[name].evaluations}
        rows.append([f"`{name}`", rate, *(f"{losses[step]:.2f}" for step in (0, 50, 250, 500))])
    return table(["run", "learning rate", "step 0", "step 50", "step 250", "step 500"], rows)


def _norms(runs: Mapping[str, Run]) -> str:
    rows = []
    for name in ("good", "low", "high", "clipped", "exploding"):
        norms = {int(row[0] or 0): row[2] for row in runs[name].steps}
        rows.append([f"`{name}`", *(f"{norms[step]:.2f}" for step in (0, 10, 100, 495))])
    return table(["run", "norm at step 0", "10", "100", "495"], rows)


def _rates_chart(runs: Mapping[str, Run], entropy: float) -> str:
    lines = [
        Line(label, [(row[0] or 0, row[2] or 0) for row in runs[name].evaluations], kind)
        for name, label, kind in (
            ("low", "low: 0.00001", "two"),
            ("good", "good: 0.001", "one"),
            ("high", "high: 0.1", "three"),
        )
    ]
    lines.append(Line("knows only how frequent", [(0, entropy), (500, entropy)], "four dashed"))
    return chart("Three learning rates", "validation loss in nats per character", lines)


def _memorized_chart(run: Run) -> str:
    rows = [[value or 0.0 for value in row] for row in run.evaluations]
    lines = [
        Line("training text", [(row[0], row[1]) for row in rows[1:]], "one"),
        Line("other text", [(row[0], row[2]) for row in rows], "two"),
    ]
    return chart("A scene learned by heart", "loss in nats per character", lines)


def _steps(runs: Mapping[str, Run], name: str, label: str, kind: str, column: int) -> Line:
    return Line(label, [(row[0] or 0, row[column] or 0) for row in runs[name].steps], kind)


if __name__ == "__main__":
    sys.exit(main())
