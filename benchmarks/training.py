"""Compare the training speed of nanovllm with PyTorch's.

Run: python benchmarks/training.py --torch-python /path/to/venv/bin/python --json training.json
     python benchmarks/table.py training.json --write docs/maintainers/measurements.md

Every contender trains the same network on random tokens, in its own process. In each round all take
a turn, in a new order, while the others are stopped. A step is the forward and the backward pass,
clipping and AdamW; its time is the median over a turn. Peak memory is that of the whole process.
The share of the peak counts 6 N operations a token, for N elements of the matrices, and attention
to the earlier tokens (Setting.operations). In bfloat16 the peak is that of the instruction which
our kernels use: of float32 where the CPU's dot products of bfloat16 are slower. The last line of
the report is JSON.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.contenders import OURS, Contender, Entry, WorkerError
from benchmarks.options import finish, in_turns, new_parser, tell
from benchmarks.peers.train_ours import make_operations
from benchmarks.training_worker import SETTINGS
from nanovllm.cli.argument_types import names_of, positive_number
from nanovllm.cli.bench.machine import measure_peak, peak_type
from nanovllm.config import BACKENDS

TORCH = "torch"


@dataclass(frozen=True, slots=True)
class Turn:
    """A contender's figures in one round: the median time of a step, its loss, and peak memory."""

    contender: str
    round: int
    step_s: float
    loss: float
    peak_bytes: int | None


@dataclass(slots=True)
class SettingResults:
    """The measurements of a setting; `peaks` are operations per second by type."""

    setting: str
    peaks: dict[str, float | None]
    turns: list[Turn] = field(default_factory=list)
    abouts: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    def steps_s(self, contender: str) -> dict[int, float]:
        """Return the time of a step by round."""
        return {turn.round: turn.step_s for turn in self.turns if turn.contender == contender}

    def ratio(self, contender: str) -> float | None:
        """Return the speed relative to eager float32 torch, the median over common rounds."""
        own, reference = self.steps_s(contender), self.steps_s(TORCH)
        rounds = own.keys() & reference.keys()
        return statistics.median(reference[one] / own[one] for one in rounds) if rounds else None

    def record(self) -> dict[str, Any]:
        """Return everything as JSON."""
        return {
            "setting": self.setting,
            "peak_operations_per_s": self.peaks,
            "contenders": {
                name: self._contender(name) for name in self.abouts if self.steps_s(name)
            },
            "problems": self.problems,
        }

    def _contender(self, name: str) -> dict[str, Any]:
        setting, turns = SETTINGS[self.setting], self.steps_s(name)
        step_s = statistics.median(turns.values())
        dtype = self.abouts[name]["dtype"]
        peak = self.peaks[dtype]
        memory = [turn.peak_bytes for turn in self.turns if turn.contender == name]
        losses = [turn.loss for turn in self.turns if turn.contender == name]
        return {
            **self.abouts[name],
            "tokens_per_s": setting.tokens / step_s,
            "step_s": {"median": step_s, "all": list(turns.values())},
            "peak_type": peak_type(dtype),
            "share_of_peak": None if peak is None else setting.operations / step_s / peak,
            "peak_bytes": memory[-1],
            "loss": losses[-1],
            "ratio_to_torch": self.ratio(name),
        }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser(__doc__, "torch-python", "rounds", "timeout-s")
    parser.add_argument(
        "--settings",
        type=names_of(list(SETTINGS)),
        default=",".join(SETTINGS),
        help="networks and batches (%(default)s)",
    )
    parser.add_argument(
        "--backend",
        type=names_of(BACKENDS),
        default="numba",
        help=f"ours: {','.join(BACKENDS)} or both (%(default)s)",
    )
    parser.add_argument("--compile", action="store_true", help="also torch.compile")
    parser.add_argument("--bfloat16", action="store_true", help="also torch with autocast")
    parser.add_argument(
        "--seconds",
        type=positive_number,
        default=10.0,
        help="seconds of a turn after its warm-up (%(default)s)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare and report; return 1 if ours failed."""
    parsed = parse(arguments)
    for backend in parsed.backend:
        make_operations(backend, 1).close()  # compile before memory and time are measured
    all_results = [run_setting(name, parsed) for name in parsed.settings]
    record = {
        "benchmark": "training",
        "rounds": parsed.rounds,
        "settings": [results.record() for results in all_results],
    }
    finish(record, parsed)
    return int(any(OURS in name for results in all_results for name in results.problems))


def entries(parsed: argparse.Namespace) -> dict[str, tuple[Entry, str]]:
    """Return each contender's process and type by name."""

    def entry(name: str, module: str, python: str, **options: Any) -> Entry:
        return Entry(name, module, json.dumps({"seed": parsed.seed, **options}), python)

    listed = [
        entry(name, "train_ours", sys.executable, backend=backend)
        for name, backend in ((OURS, "numba"), (f"{OURS} numpy", "numpy"))
        if backend in parsed.backend
    ]
    if parsed.torch_python is not None:
        variants = [{}, {"compile": True}, {"bfloat16": True}]
        listed += [
            entry(" ".join([TORCH, *options]), "train_torch", parsed.torch_python, **options)
            for options in variants
            if all(getattr(parsed, name) for name in options)
        ]
    dtypes = {f"{TORCH} bfloat16": "bfloat16"}
    return {one.name: (one, dtypes.get(one.name, "float32")) for one in listed}


def run_setting(name: str, parsed: argparse.Namespace) -> SettingResults:
    """Start the contenders of a setting, run the rounds, and stop them."""
    results = SettingResults(name, _peaks(parsed.threads))
    contenders: list[Contender] = []
    try:
        for entry, dtype in entries(parsed).values():
            tell(f"{name}: starting {entry.name}")
            try:
                contender = Contender.start(entry, name, parsed.threads, parsed.timeout_s)
            except WorkerError as error:
                results.problems[entry.name] = str(error)
                continue
            results.abouts[entry.name] = {"dtype": dtype, **contender.about}
            contenders.append(contender)
        for number, ordered in in_turns(contenders, parsed.rounds):
            _round(results, ordered, number, parsed)
    finally:
        for contender in contenders:
            contender.close()
    for dtype, peak in _peaks(parsed.threads).items():
        before = results.peaks[dtype]
        results.peaks[dtype] = None if before is None or peak is None else (before + peak) / 2
    return results


def _round(
    results: SettingResults, contenders: list[Contender], number: int, parsed: argparse.Namespace
) -> None:
    for contender in contenders:
        name = contender.entry.name
        if name in results.problems:
            continue
        try:
            answer = contender.request(parsed.timeout_s, seconds=parsed.seconds)
        except WorkerError as error:
            results.problems[name] = str(error)
            continue
        step_s = statistics.median(answer["step_s"])
        results.turns.append(Turn(name, number, step_s, answer["loss"], answer["peak_bytes"]))
        speed = SETTINGS[results.setting].tokens / step_s
        tell(
            f"{results.setting}: round {number + 1} of {parsed.rounds}, {name}: "
            f"{speed:,.0f} tokens/s, {(answer['peak_bytes'] or 0) / 1e6:,.0f} MB"
        )


def _peaks(threads: int) -> dict[str, float | None]:
    return {dtype: measure_peak(dtype, threads) for dtype in ("float32", "bfloat16")}


if __name__ == "__main__":
    sys.exit(main())
