"""Measure the speculative decoding of nanovllm and of its peers, each against itself without it.

Run: python benchmarks/speculation_peers.py --repeats-model MODEL --json speculation-peers.json
     --peer-python /path/to/main/bin/python --peer-python vllm=/path/to/vllm/bin/python

Models and prompts are those of benchmarks/speculation.py. Each system runs without drafts and with
those of each method, each in its own process while the others are stopped, by turns within a round.
The time begins when every prompt has its first token. Outputs that drafts have changed are counted.
benchmarks/setup_peers.sh installs the peers. The last line of the report is JSON.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import groupby, product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.contenders import OURS, Contender, Entry, WorkerError
from benchmarks.options import find_pythons, finish, in_turns, new_parser, tell
from benchmarks.speculation import TEMPERATURES, Turn, figures_of, models_of, parse_options
from benchmarks.speculation_work import (
    Pair,
    Prompts,
    choose_prompts,
    make_params,
    make_prompts,
    pair_of,
)
from benchmarks.workload import Answer
from nanovllm.cli.argument_types import names_of
from nanovllm.engine.tokenizer import Tokenizer

PLAIN = "none"
METHODS = ("ngram", "draft")
MODULES = {OURS: "drafts_ours", "vllm": "drafts_vllm", "llamacpp": "drafts_llamacpp"}
"""{system: its module of benchmarks/peers}."""
_WARM_UP_TOKENS = 32

Key = tuple[str, str]
"""A system, and a method of drafting or PLAIN."""


@dataclass(frozen=True, slots=True)
class Case:
    """One workload with a number of streams and a temperature."""

    type: str
    workload: str
    streams: int
    temperature: float


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    names = ("scale", "ours", "classes", "rounds", "timeout-s", "peer-python")
    parser = new_parser(__doc__, *names, rounds=5, classes=["float32", "bfloat16"])
    parser.add_argument(
        "--systems",
        type=names_of(tuple(MODULES)),
        default=",".join(MODULES),
        help="what to measure (%(default)s)",
    )
    parsed = parse_options(
        parser, arguments, workloads=("prose", "repeats"), methods=METHODS, streams=[1, 4]
    )
    parsed.pythons = find_pythons(parser, parsed.peer_python)
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; return 1 if ours failed."""
    parsed = parse(arguments)
    workloads = sorted(parsed.workloads, key=pair_of)
    results: list[dict[str, Any]] = []
    problems: dict[str, str] = {}
    abouts: dict[str, Any] = {}
    with models_of(parsed) as pairs:
        for kind, (name, group) in product(parsed.classes, _groups(workloads)):
            with ExitStack() as stack:
                contenders = {}
                for key in product(parsed.systems, (PLAIN, *parsed.methods)):
                    contender = start(key, kind, pairs[name], parsed, problems)
                    if contender is not None:
                        stack.callback(contender.close)
                        contenders[key] = contender
                        abouts[key[0]] = contender.about
                for case in _cases(kind, group, parsed):
                    results += measure(contenders, case, pairs[name], parsed, problems)
        models = {name: pair.record() for name, pair in pairs.items()}
    record = {
        "benchmark": "speculation-peers",
        "rounds": parsed.rounds,
        "factors": parsed.factors,
        "models": models,
        "systems": abouts,
        "problems": problems,
        "results": results,
    }
    finish(record, parsed)
    return int(any(problem.startswith(OURS) for problem in problems))


def _groups(workloads: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return the names of the models, each with its workloads."""
    return [(name, list(group)) for name, group in groupby(workloads, pair_of)]


def _cases(kind: str, workloads: Sequence[str], parsed: argparse.Namespace) -> list[Case]:
    return [Case(kind, *rest) for rest in product(workloads, parsed.streams, TEMPERATURES)]


def start(
    key: Key, kind: str, pair: Pair, parsed: argparse.Namespace, problems: dict[str, str]
) -> Contender | None:
    """Start a system with a method's drafts; on failure record the problem and return None."""
    system, method = key
    options = {"type": kind, "method": method, "draft": str(pair.draft.resolve())}
    if system == OURS:
        options["ours"] = parsed.ours
    entry = Entry(" ".join(key), MODULES[system], json.dumps(options), parsed.pythons[system])
    tell(f"{kind}: starting {entry.name}")
    try:
        return Contender.start(entry, pair.target, parsed.threads, parsed.timeout_s)
    except WorkerError as error:
        problems[f"{entry.name}, {kind}"] = str(error)
        tell(f"{entry.name}: {error}")
        return None


def measure(
    contenders: dict[Key, Contender],
    case: Case,
    pair: Pair,
    parsed: argparse.Namespace,
    problems: dict[str, str],
) -> list[dict[str, Any]]:
    """Run a case on every contender that can; one that fails is closed and removed."""
    prompts = make_prompts(
        case.workload,
        Tokenizer.load(pair.target),
        seed=parsed.seed,
        scale=parsed.scale,
        file=parsed.repeats_prompts,
    )
    able = []
    for key, contender in contenders.items():
        if case.temperature and "greedy_only" in contender.about:
            problems[f"{key[0]}, temperature {case.temperature:g}"] = contender.about["greedy_only"]
        else:
            able.append(key)
    rounds: list[dict[Key, Answer]] = []
    for number, ordered in in_turns(able, parsed.rounds):
        chosen = choose_prompts(prompts, case.streams, number)
        rounds.append({})
        for key in ordered:
            if key not in contenders:
                continue
            try:
                if number == 0:
                    _ask(contenders[key], chosen, case, number, parsed, most=_WARM_UP_TOKENS)
                rounds[-1][key] = _ask(contenders[key], chosen, case, number, parsed)
            except WorkerError as error:
                problems[f"{' '.join(key)}, {case.type}"] = str(error)
                contenders.pop(key).close()
    return list(summarize(case, rounds))


def _ask(
    contender: Contender,
    prompts: Prompts,
    case: Case,
    number: int,
    parsed: argparse.Namespace,
    most: int | None = None,
) -> Answer:
    params = make_params(
        case.workload, case.temperature, seed=parsed.seed + number, scale=parsed.scale
    )
    assert params.max_tokens is not None
    length = params.max_tokens if most is None else min(most, params.max_tokens)
    return contender.ask(
        prompts,
        [length] * len(prompts),
        parsed.timeout_s,
        temperature=case.temperature,
        seed=params.seed,
    )


def summarize(case: Case, rounds: Sequence[Mapping[Key, Answer]]) -> Iterator[dict[str, Any]]:
    """Yield the figures of each system and method that answered in all rounds."""
    done = [key for key in rounds[0] if all(key in answers for answers in rounds)]
    for system, method in sorted(done, key=list(product(MODULES, (PLAIN, *METHODS))).index):
        plain = system, PLAIN
        if method == PLAIN or plain not in done:
            continue
        result = {**asdict(case), "system": system, "method": method}
        result |= figures_of(
            [
                {True: _turn(answers[system, method]), False: _turn(answers[plain])}
                for answers in rounds
            ]
        )
        result["outputs"] = len(rounds) * case.streams
        result["changed"] = _count_different(rounds, (system, method), plain)
        if (OURS, PLAIN) in done:
            result["plain_unlike_ours"] = _count_different(rounds, plain, (OURS, PLAIN))
        tell(_line(result))
        yield result


def _turn(answer: Answer) -> Turn:
    names = ("tokens", "seconds", "drafted", "accepted")
    return Turn(**{name: answer[name] for name in names})


def _count_different(rounds: Sequence[Mapping[Key, Answer]], one: Key, other: Key) -> int:
    """Count the outputs whose tokens differ between two contenders."""
    return sum(
        first != second
        for answers in rounds
        for first, second in zip(
            answers[one]["token_ids"], answers[other]["token_ids"], strict=True
        )
    )


def _line(result: Mapping[str, Any]) -> str:
    names = ("type", "workload", "streams", "temperature", "system", "method")
    return (
        f"{', '.join(str(result[name]) for name in names)}: {result['ratio']['median']:.2f} "
        f"({result['plain_tokens_per_s']:,.1f} to {result['tokens_per_s']:,.1f} tokens/s), "
        f"{result['accepted']:,} of {result['drafted']:,} drafted tokens accepted, "
        f"{result['changed']} of {result['outputs']} outputs changed"
    )


if __name__ == "__main__":
    sys.exit(main())
