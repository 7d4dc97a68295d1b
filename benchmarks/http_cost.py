"""Measure the cost of HTTP: serve32 by `LLM.generate`, by whole responses and by 32 streams.

Run: python benchmarks/http_cost.py --rounds 5

The three take turns in each round. The cost is the median loss against `LLM.generate` in the same
round. The client runs on the same cores, so its processor time is reported. All must give the same
tokens, which is checked first. The last line is JSON.
"""

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.contenders import OUR_OPTIONS, OURS, Contender, Entry
from benchmarks.options import MODEL, ensure_model, finish, in_turns, new_parser, tell
from benchmarks.server_process import ServerProcess
from benchmarks.workload import Workload, make_workloads

_TIMEOUT_S = 900.0
WHOLE, STREAMS = "whole answers", "32 streams"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report."""
    parser = new_parser(__doc__, *MODEL, "classes", "rounds", classes="float32", rounds=5)
    parsed = parser.parse_args(arguments)
    model = ensure_model(parsed.model)
    work = make_workloads(model.vocab, parsed.seed, parsed.scale)["serve32"]
    classes = {kind: measure(kind, work, parsed) for kind in parsed.classes}
    finish(
        {
            "benchmark": "http_cost",
            "rounds": parsed.rounds,
            "tokens": work.tokens,
            "classes": classes,
        },
        parsed,
    )
    return 0


def measure(kind: str, work: Workload, parsed: argparse.Namespace) -> dict[str, Any]:
    """Run all rounds of a type; return times, client times and costs; raises WorkerError."""
    options = {**OUR_OPTIONS[kind], **parsed.ours}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(
            ServerProcess(server_flags(parsed.model, options, parsed.threads))
        )
        url = f"http://127.0.0.1:{server.port}"
        variants = {
            OURS: json.dumps(options),
            **{way: json.dumps({"url": url, "stream": way == STREAMS}) for way in (WHOLE, STREAMS)},
        }
        ways = {}
        for way, variant in variants.items():
            entry = Entry(way, "ours" if way == OURS else "over_http", variant, sys.executable)
            ways[way] = Contender.start(entry, parsed.model, parsed.threads, _TIMEOUT_S)
            stack.callback(ways[way].close)
        answers = {
            way: contender.ask(work.prompts, work.lengths, _TIMEOUT_S, is_checked=True)["token_ids"]
            for way, contender in ways.items()
        }
        for way in (WHOLE, STREAMS):
            if answers[way] != answers[OURS]:
                raise RuntimeError(f"{way} over HTTP are other tokens than those of LLM.generate")
        rounds: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
        for number, order in in_turns(list(ways), parsed.rounds):
            for way in order:
                tell(f"{kind}: round {number + 1} of {parsed.rounds}, {way}")
                rounds[way].append(ways[way].ask(work.prompts, work.lengths, _TIMEOUT_S))
    return {way: figures_of(turns, rounds[OURS], work.tokens) for way, turns in rounds.items()}


def figures_of(
    turns: Sequence[Mapping[str, Any]], engine: Sequence[Mapping[str, Any]], tokens: int
) -> dict[str, Any]:
    """Return tokens/s, the cost, and the client's share of processor time, as medians."""
    costs = [1 - own["seconds"] / turn["seconds"] for own, turn in zip(engine, turns, strict=True)]
    return {
        "tokens_per_s": tokens / statistics.median(turn["seconds"] for turn in turns),
        "cost": statistics.median(costs),
        "costs": costs,
        "client_share": statistics.median(
            turn.get("client_seconds", 0.0) / turn["seconds"] for turn in turns
        ),
    }


def server_flags(model: Path, options: Mapping[str, Any], threads: int) -> list[str]:
    """Return the server's options, without prefix caching."""
    own = [
        part
        for name, value in options.items()
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    return [
        str(model),
        "--num-threads",
        str(threads),
        "--no-enable-prefix-caching",
        "--log-level",
        "warning",
        *own,
    ]


if __name__ == "__main__":
    raise SystemExit(main())
