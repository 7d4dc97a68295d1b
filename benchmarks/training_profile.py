"""Measure where the time of a training step goes: by operation, with waits and Python.

Run: python benchmarks/training_profile.py --settings small --json profile.json
     python benchmarks/table.py profile.json --write docs/maintainers/measurements.md

A step is that of training.py. Each thread notes when it begins a phase of an operation, ends its
last item, and passes the barrier. "launch" is what runs of the threads take outside of phases,
"Python" the rest of the step. Of several steps the median counts. The last line of the report is
JSON.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.options import finish, new_parser
from benchmarks.peers.train_ours import make_step
from benchmarks.training_worker import SETTINGS, Setting
from nanovllm.cli.argument_types import names_of
from nanovllm.cli.bench.machine import measure_peak
from nanovllm.cli.bench.step_times import seconds_of_phase
from nanovllm.training.kernels.operations import CompiledOperations
from nanovllm.training.kernels.plan import OperationCall, Run

PHASES = {
    "linear": ("pack", "matmul"),
    "linear_backward": ("pack", "matmuls"),
    "cross_entropy": ("logits", "softmax", "gradients"),
    "layer_norm_backward": ("rows", "sums"),
}
"""The phases of the operations that have several, in their order."""
_SHARES = {"matmul": 1.0, "matmuls": 1.0, "logits": 1 / 3, "gradients": 2 / 3}
"""Share of its operation's arithmetic that a phase of matmuls has."""
_FIGURES = ("seconds", "wait_s", "operations")
_WARM_UP = 3

Figures = dict[str, dict[str, float]]


class Recorder:
    """Keeps the times of a step's runs, and adds them up by phase afterwards."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.figures: Figures = {}
        self.runs: list[tuple[Run, float, np.ndarray]] = []

    def __call__(self, run: Run, seconds: float, times: np.ndarray) -> None:
        """Keep a run: its time, and the moments of its phases [phases, threads, MOMENTS]."""
        self.runs.append((run, seconds, times.copy()))

    def figures_of(self, step_s: float) -> Figures:
        """Return the time, wait and arithmetic of each operation of a step of so many seconds."""
        for run in self.runs:
            self._add_run(*run)
        self._add("Python", step_s - sum(seconds for _, seconds, _ in self.runs), 0.0, 0.0)
        return self.figures

    def _add_run(self, run: Run, seconds: float, times: np.ndarray) -> None:
        launch_s, phases = seconds, iter(times)
        for call in run.calls:
            for name in PHASES.get(call.name, ("",)):
                taken_s, wait_s = seconds_of_phase(next(phases))
                launch_s -= taken_s
                label = f"{label_of(call)}: {name}" if name else label_of(call)
                self._add(label, taken_s, wait_s, call.work * _SHARES.get(name, 0.0))
        self._add("launch", launch_s, 0.0, 0.0)

    def _add(self, name: str, seconds: float, wait_s: float, operations: float) -> None:
        figures = self.figures.setdefault(name, dict.fromkeys(_FIGURES, 0.0))
        for key, figure in zip(_FIGURES, (seconds, wait_s, operations), strict=True):
            figures[key] += figure


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser(__doc__, "rounds", rounds=9)
    parser.add_argument(
        "--settings",
        type=names_of(list(SETTINGS)),
        default=",".join(SETTINGS),
        help="networks and batches (%(default)s)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report."""
    parsed = parse(arguments)
    results = []
    for name in parsed.settings:
        peak = measure_peak("float32", parsed.threads)
        steps = profile(SETTINGS[name], parsed.threads, parsed.seed, parsed.rounds)
        results.append({"setting": name, "peak_operations_per_s": peak, **steps})
    finish({"benchmark": "training_profile", "results": results}, parsed)
    return 0


def profile(setting: Setting, threads: int, seed: int, rounds: int) -> dict[str, Any]:
    """Return the time of a step, and the time, wait and matmuls' arithmetic of its operations."""
    operations = CompiledOperations(threads)
    try:
        step = make_step(setting, operations, seed)
        steps: list[Figures] = []
        times: list[float] = []
        for number in range(_WARM_UP + rounds):
            recorder = Recorder()
            operations.time_runs(recorder)
            step_s, _ = step()
            if number >= _WARM_UP:
                steps.append(recorder.figures_of(step_s))
                times.append(step_s)
    finally:
        operations.close()
    return {
        "step_s": statistics.median(times),
        "operations": [
            {
                "name": name,
                **{key: statistics.median(one[name][key] for one in steps) for key in figures},
            }
            for name, figures in steps[0].items()
        ],
    }


def label_of(call: OperationCall) -> str:
    """Return the name of an operation, and of linear layers the sizes d_in and d_out."""
    name = call.name.replace("_", " ")
    if call.name in ("linear", "linear_backward"):
        return f"{name} {call.memory['d_in']}, {call.memory['d_out']}"
    return name


if __name__ == "__main__":
    sys.exit(main())
