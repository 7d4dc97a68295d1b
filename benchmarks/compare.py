"""Compare nanovllm with the installed peers in one interleaved run.

Run: python benchmarks/compare.py --peers auto --peer-python /path/to/venv/bin/python
     --peer-python vllm=/path/to/other/venv/bin/python

All contenders of a class are loaded first. They take turns for several rounds, in a new order each
round, each in its own process while the others are stopped. Memory bandwidth is measured before and
after each run. Output tokens are counted, and greedy outputs compared with ours. The last line of
the report is JSON. docs/maintainers/measurements.md explains it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.contenders import OURS, PEERS, Contender, Entry, WorkerError, entries
from benchmarks.options import (
    MODEL,
    ensure_model,
    find_pythons,
    finish,
    in_turns,
    new_parser,
    tell,
)
from benchmarks.results import ClassResults, Sample, compare_outputs
from benchmarks.workload import WORKLOADS, Answer, Workload, make_workloads
from nanovllm.cli.argument_types import names_of, positive_number
from nanovllm.cli.bench.machine import MemoryReader, measure_peak, peak_type
from nanovllm.cli.bench.roofline import Costs
from nanovllm.model.families.registry import load_config

_READINGS = 2
_WARM_UP_TOKENS = 32  # of each answer: enough to touch the memory and to load what is loaded late
_LEAST_EQUAL_TOKENS = 0.5
"""Share of float32 answers before their first difference; less is another network."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser(__doc__, *MODEL, "classes", "rounds", "timeout-s", "peer-python")
    parser.add_argument(
        "--peers",
        type=_peers,
        default="auto",
        help=f"auto for all that are installed, none, or some of {','.join(PEERS)}",
    )
    parser.add_argument(
        "--workloads",
        type=names_of(WORKLOADS),
        default=",".join(WORKLOADS),
        help="what to run (%(default)s)",
    )
    parser.add_argument(
        "--slow-s",
        type=positive_number,
        default=20.0,
        help="who needs longer for a run takes part in one round only (%(default)s)",
    )
    parsed = parser.parse_args(arguments)
    parsed.pythons = find_pythons(parser, parsed.peer_python)
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare and report; return 1 if ours failed."""
    parsed = parse(arguments)
    model = ensure_model(parsed.model)
    workloads = {
        name: work
        for name, work in make_workloads(model.vocab, parsed.seed, parsed.scale).items()
        if name in parsed.workloads
    }
    reader = MemoryReader(parsed.threads)
    all_results = []
    for kind in parsed.classes:
        results = ClassResults(kind, None, Costs.of(model, kind, 0.0), workloads)
        run_class(results, parsed, reader)
        print("\n".join([kind, *results.notes()]) + "\n", flush=True)
        all_results.append(results)
    reader.close()
    classes = {results.kind: results.record() for results in all_results}
    finish(
        {
            "benchmark": "compare",
            "parameters": model.num_parameters,
            "rounds": parsed.rounds,
            "classes": classes,
        },
        parsed,
    )
    return int(any(OURS in results.problems for results in all_results))


def run_class(results: ClassResults, parsed: argparse.Namespace, reader: MemoryReader) -> None:
    """Start the contenders of a class, run the rounds, and stop them."""
    contenders: list[Contender] = []
    peaks = [measure_peak(results.kind, parsed.threads)]
    try:
        for entry in entries(results.kind, parsed.peers, parsed.pythons, parsed.ours):
            contender = start(entry, results, parsed)
            if contender is not None:
                contenders.append(contender)
        for number, ordered in in_turns(contenders, parsed.rounds):
            for workload in results.workloads.values():
                _round(results, ordered, workload, number, parsed, reader)
    finally:
        for contender in contenders:
            contender.close()
    peaks.append(measure_peak(results.kind, parsed.threads))
    known = [peak for peak in peaks if peak is not None]
    results.peak = sum(known) / len(known) if known else None
    results.peak_type = peak_type(results.kind)


def start(entry: Entry, results: ClassResults, parsed: argparse.Namespace) -> Contender | None:
    """Start and warm up a contender; on failure record the problem and return None."""
    tell(f"{results.kind}: starting {entry.name}")
    contender = None
    try:
        contender = Contender.start(entry, parsed.model, parsed.threads, parsed.timeout_s)
        for workload in results.workloads.values():
            contender.ask(
                workload.prompts,
                [min(_WARM_UP_TOKENS, length) for length in workload.lengths],
                parsed.timeout_s,
            )
    except WorkerError as error:
        results.problems[entry.name] = str(error)
        if contender is not None:
            contender.close()
        return None
    results.abouts[entry.name] = {"variant": entry.variant, **contender.about}
    if entry.name == OURS:
        results.costs = Costs.of(
            load_config(parsed.model), results.kind, contender.about["pair_bytes"]
        )
    return contender


def _round(
    results: ClassResults,
    contenders: list[Contender],
    workload: Workload,
    number: int,
    parsed: argparse.Namespace,
    reader: MemoryReader,
) -> None:
    """Run a workload once on every contender; slow ones skip later rounds."""
    answers: dict[str, Answer] = {}
    before = reader.bytes_per_s(_READINGS)
    for contender in contenders:
        name = contender.entry.name
        earlier = results.speed(name, workload.name)
        if name in results.problems or (
            earlier is not None and workload.tokens / earlier > parsed.slow_s
        ):
            continue
        tell(f"{results.kind}: round {number + 1} of {parsed.rounds}, {workload.name}, {name}")
        try:
            seconds, answers[name] = workload.run(
                lambda prompts, lengths, one=contender: one.ask(  # type: ignore[misc]
                    prompts, lengths, parsed.timeout_s
                )
            )
        except WorkerError as error:
            results.problems[name] = str(error)
            continue
        after = reader.bytes_per_s(_READINGS)
        speed, bandwidth = workload.tokens / max(seconds, 1e-9), (before + after) / 2
        results.samples.append(Sample(name, workload.name, number, speed, bandwidth))
        before = after
    if number == 0:
        _compare_answers(results, contenders, workload, answers, parsed.timeout_s)


def _compare_answers(
    results: ClassResults,
    contenders: list[Contender],
    workload: Workload,
    answers: dict[str, Answer],
    timeout_s: float,
) -> None:
    """Compare the peers' tokens with ours; an untimed run of ours gives the gaps."""
    ours = next((contender for contender in contenders if contender.entry.name == OURS), None)
    if ours is None or OURS in results.problems or len(answers) < 2:
        return
    checked = ours.ask(workload.prompts, workload.lengths, timeout_s, is_checked=True)
    for name, answer in answers.items():
        if name != OURS:
            agreement = compare_outputs(checked["token_ids"], answer["token_ids"], checked["gaps"])
            results.agreements.setdefault(name, {})[workload.name] = agreement
            if results.kind == "float32" and agreement.equal_tokens < _LEAST_EQUAL_TOKENS:
                results.problems[name] = (
                    f"only {agreement.equal_tokens:.0%} of its tokens in {workload.name} are ours: "
                    "it computes another model"
                )


def _peers(text: str) -> list[str]:
    """Parse --peers."""
    groups: dict[str, list[str]] = {"auto": list(PEERS), "none": []}
    return groups[text] if text in groups else names_of(tuple(PEERS))(text)


if __name__ == "__main__":
    sys.exit(main())
