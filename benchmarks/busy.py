"""Measure nanovllm beside busy processes: all threads, one thread, llama.cpp and OpenVINO.

Run: python benchmarks/busy.py --peer-python /path/to/venv/bin/python

Busy processes, endless loops, take processor time. Every contender runs the same work beside 0, 1,
2 and 4 of them, in turns. "Two at once" runs two processes of one contender together. The bundled
model is small, so that the cost of waiting for a thread shows. The last line of the report is JSON.
docs/performance.md has the table.
"""

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.compare import find_pythons
from benchmarks.contenders import CLASSES, OURS, Contender, Entry, WorkerError, entries
from benchmarks.options import add_common_options, ensure_model, finish, heading, names_of, tell
from benchmarks.workload import Workload, make_workloads
from nanovllm.cli.argument_types import positive, positive_number
from nanovllm.hub import BUNDLED_MODEL, resolve_model
from nanovllm.model.config import GPT2Config

ONE_THREAD = "nanovllm, 1 thread"
WORKS = ("decode1", "serve32", "bundled", "two at once")
_PEERS = ("llamacpp", "openvino")
_BUNDLED_TOKENS = 384
_SETTLE_S = 0.5  # until the system has spread the busy processes over the cores


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_options(parser)
    parser.add_argument(
        "--peers", type=names_of(("none", *_PEERS)), default=",".join(_PEERS), help="(%(default)s)"
    )
    python_help = "interpreter that has the peers' packages, or NAME=PATH for one of them"
    parser.add_argument(
        "--peer-python", action="append", default=[], metavar="[NAME=]PATH", help=python_help
    )
    parser.add_argument(
        "--class", dest="kind", choices=CLASSES, default="float32", help="(%(default)s)"
    )
    parser.add_argument(
        "--busy", type=_counts, default="0,1,2,4", help="numbers of busy processes (%(default)s)"
    )
    parser.add_argument(
        "--works", type=names_of(WORKS), default=",".join(WORKS), help="(%(default)s)"
    )
    parser.add_argument("--rounds", type=positive, default=5, help="runs of each (%(default)s)")
    parser.add_argument(
        "--timeout-s", type=positive_number, default=600.0, help="for one run (%(default)s)"
    )
    parsed = parser.parse_args(arguments)
    parsed.peers = [peer for peer in parsed.peers if peer != "none"]
    parsed.pythons = find_pythons(parser, parsed.peer_python)
    return parsed


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [-1]
    if min(counts) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0,1,2,4")
    return counts


@dataclass(slots=True)
class Work:
    """A workload, its contenders, and their speeds in tokens per second."""

    name: str
    workload: Workload
    contenders: dict[str, list[Contender]]
    speeds: dict[int, dict[str, list[float]]] = field(default_factory=dict)

    def run(self, name: str, busy: int, timeout_s: float) -> None:
        """Run it once in all processes of a contender at the same time."""

        def run(contender: Contender) -> float:
            seconds, _ = self.workload.run(lambda p, n: contender.ask(p, n, timeout_s))
            return self.workload.tokens / max(seconds, 1e-9)

        processes = self.contenders[name]
        with ThreadPoolExecutor(len(processes)) as executor:
            speed = sum(executor.map(run, processes))
        speeds = self.speeds.setdefault(busy, {other: [] for other in self.contenders})
        speeds[name].append(speed)

    def medians(self, busy: int) -> dict[str, float]:
        """Return each contender's median speed beside this many busy processes."""
        return {name: statistics.median(all_) for name, all_ in self.speeds[busy].items()}

    def ratio(self, busy: int) -> float | None:
        """Return our speed divided by the better of one thread and OpenVINO."""
        medians = self.medians(busy)
        others = [
            speed
            for name, speed in medians.items()
            if name == ONE_THREAD or name.startswith("openvino")
        ]
        return medians[OURS] / max(others) if others else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; return the exit code."""
    parsed = parse(arguments)
    model = ensure_model(parsed.model)
    print(heading(parsed), flush=True)
    works = []
    for name in parsed.works:
        with contextlib.ExitStack() as stack:
            work = _prepare(name, model, parsed, stack)
            _measure(work, parsed)
        works.append(work)
    record = {
        "benchmark": "busy",
        "class": parsed.kind,
        "rounds": parsed.rounds,
        "works": {work.name: _record(work) for work in works},
    }
    finish(record, parsed)
    return 0


def _prepare(
    name: str, model: GPT2Config, parsed: argparse.Namespace, stack: contextlib.ExitStack
) -> Work:
    """Start the contenders of a workload and warm them up."""
    folder, found = parsed.model, entries(parsed.kind, parsed.peers, parsed.pythons, parsed.ours)
    workload = make_workloads(model.vocab, parsed.seed, parsed.scale)[
        "serve32" if name == "serve32" else "decode1"
    ]
    if name == "bundled":
        folder, found = resolve_model(BUNDLED_MODEL), found[:1]
        vocab = GPT2Config.load(folder).vocab
        prompt = make_workloads(vocab, parsed.seed)["decode1"].prompts
        workload = Workload("decode1", prompt, [_BUNDLED_TOKENS // parsed.scale + 1])
    one_thread = Entry(ONE_THREAD, found[0].module, found[0].variant, found[0].python)
    processes = 2 if name == "two at once" else 1
    contenders: dict[str, list[Contender]] = {}
    for entry in (found[0], one_thread, *found[1:]):
        threads = 1 if entry is one_thread else parsed.threads
        tell(f"{name}: starting {entry.name}")
        started = []
        try:
            for _ in range(processes):
                contender = Contender.start(entry, folder, threads, parsed.timeout_s)
                stack.callback(contender.close)
                contender.ask(workload.prompts, workload.lengths, parsed.timeout_s)
                started.append(contender)
        except WorkerError as error:
            print(f"{name}: {entry.name} cannot take part: {error}", flush=True)
            continue
        contenders[entry.name] = started
    return Work(name, workload, contenders)


def _measure(work: Work, parsed: argparse.Namespace) -> None:
    names = list(work.contenders)
    print(f"{work.name}, tok/s: median (range)\n  busy{''.join(f'{n:>24}' for n in names)}")
    for busy in parsed.busy:
        with busy_processes(busy):
            for number in range(parsed.rounds):
                first = number % len(names)
                for name in names[first:] + names[:first]:
                    tell(f"{work.name}, {busy} busy, round {number + 1}: {name}")
                    work.run(name, busy, parsed.timeout_s)
        print(_line(work, busy), flush=True)
    print(flush=True)


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Run busy processes meanwhile."""
    loop = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(loop) for _ in range(count)]
    try:
        time.sleep(_SETTLE_S if processes else 0)
        yield
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def _line(work: Work, busy: int) -> str:
    cells = [
        f"{statistics.median(speeds):.0f} ({min(speeds):.0f}-{max(speeds):.0f})"
        for speeds in work.speeds[busy].values()
    ]
    ratio = work.ratio(busy)
    shown = "" if ratio is None else f"   {ratio:.2f} of the better"
    return f"  {busy:4}{''.join(f'{cell:>24}' for cell in cells)}{shown}"


def _record(work: Work) -> dict[str, Any]:
    return {
        str(busy): {"tokens_per_s": speeds, "ratio": work.ratio(busy)}
        for busy, speeds in work.speeds.items()
    }


if __name__ == "__main__":
    sys.exit(main())
