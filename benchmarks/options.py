"""Shared parts of the benchmarks: options, the model, turns, and the end of a report."""

import argparse
import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.contenders import CLASSES, OURS, PEERS, ROOT
from benchmarks.make_model import make_model
from benchmarks.table import markdown
from benchmarks.workload import DEFAULT_SEED, Answer, Run
from nanovllm.cli.argument_types import names_of, not_negative, positive, positive_number
from nanovllm.cli.bench.report import describe_machine
from nanovllm.model.config import ModelConfig
from nanovllm.model.families.registry import load_config
from nanovllm.model.machine import default_threads

PYTHON_VARIABLE = "NANOVLLM_PEER_PYTHON"
MODEL = ("model", "scale", "ours")
"""Options of the benchmarks that load a checkpoint."""
_T = TypeVar("_T")


def new_parser(doc: str | None, *names: str, **defaults: Any) -> argparse.ArgumentParser:
    """Return a parser with --threads, --seed, --json and other options that benchmarks share.

    Args:
        doc: docstring of the program, which its help begins with.
        names: the other options: those of MODEL, classes, rounds, timeout-s, peer-python,
            torch-python.
        defaults: of the options, instead of the usual ones.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shared: dict[str, dict[str, Any]] = {
        "threads": {
            "type": positive,
            "default": default_threads(),
            "help": "threads of each run (%(default)s)",
        },
        "seed": {
            "type": not_negative,
            "default": os.environ.get("WORKLOAD_SEED", str(DEFAULT_SEED)),
            "help": "draws the tokens; also WORKLOAD_SEED (%(default)s)",
        },
        "json": {"type": Path, "metavar": "FILE", "help": "also write the figures to this file"},
        "model": {
            "type": Path,
            "default": ROOT / "models" / "gpt2-random",
            "help": "folder of a checkpoint; made with random weights where it is missing",
        },
        "scale": {
            "type": positive,
            "default": 1,
            "help": "divide all lengths by this, for trying things out",
        },
        "ours": {
            "type": json.loads,
            "default": {},
            "metavar": "JSON",
            "help": 'further options of LLM, such as {"kv_cache_dtype": "int8"}',
        },
        "classes": {
            "type": names_of(CLASSES),
            "default": ",".join(CLASSES),
            "help": "types of the weights (%(default)s)",
        },
        "rounds": {
            "type": positive,
            "default": 3,
            "help": "turns of each contender (%(default)s)",
        },
        "timeout-s": {
            "type": positive_number,
            "default": 900.0,
            "help": "give up on a contender after this long (%(default)s)",
        },
        "peer-python": {
            "action": "append",
            "metavar": "[NAME=]PATH",
            "help": "the peers' interpreter, or NAME=PATH for one of them; repeatable, or "
            f"comma-separated in {PYTHON_VARIABLE}",
        },
        "torch-python": {
            "default": os.environ.get(PYTHON_VARIABLE),
            "metavar": "PATH",
            "help": f"interpreter with torch; also {PYTHON_VARIABLE}. Without it ours runs alone",
        },
    }
    for name in ("threads", "seed", "json", *names):
        parser.add_argument(f"--{name}", **shared[name])
    parser.set_defaults(**defaults)
    return parser


def find_pythons(parser: argparse.ArgumentParser, values: Sequence[str] | None) -> dict[str, str]:
    """Return each contender's interpreter from the values of --peer-python, or the variable."""
    if not values:
        values = [part for part in os.environ.get(PYTHON_VARIABLE, "").split(",") if part]
    pythons = {OURS: sys.executable, **dict.fromkeys(PEERS, sys.executable)}
    for item in sorted(values, key=lambda item: "=" in item):  # defaults first
        name, _, path = item.rpartition("=")
        if name and name not in PEERS:
            parser.error(f"--peer-python names {name!r}, but peers are {', '.join(PEERS)}")
        pythons.update({name: path} if name else dict.fromkeys(PEERS, path))
    return pythons


def in_turns(contenders: Sequence[_T], rounds: int) -> Iterator[tuple[int, list[_T]]]:
    """Yield the number of each round, and the contenders in its order: another one begins."""
    for number in range(rounds):
        first = number % max(1, len(contenders))
        yield number, [*contenders[first:], *contenders[:first]]


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return the median, the quartiles, the extremes and all values."""
    several = values if len(values) > 1 else [*values, *values]
    low, median, high = statistics.quantiles(several, n=4, method="inclusive")
    return {
        "median": median,
        "p25": low,
        "p75": high,
        "min": min(values),
        "max": max(values),
        "all": list(values),
    }


def ensure_model(folder: Path, size: str = "gpt2") -> ModelConfig:
    """Return the config of a folder's model, made with random weights if missing."""
    if not (folder / "config.json").is_file():
        tell(f"Making a {size} with random weights in {folder}")
        make_model(folder, size)
    return load_config(folder)


def finish(record: Mapping[str, Any], parsed: argparse.Namespace) -> None:
    """Print the record as a table, and with settings and machine as JSON; write that to --json."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    names = ("model", "threads", "seed", "scale", "ours")
    about = {"date": now, **{name: getattr(parsed, name) for name in names if name in parsed}}
    machine = describe_machine()
    line = json.dumps({**record, **about, "machine": machine}, allow_nan=False, default=str)
    if parsed.json is not None:
        parsed.json.write_text(line + "\n", encoding="utf-8")
    print(f"{markdown(json.loads(line))}\n\n{line}", flush=True)


def in_process(generate: Callable[..., Any]) -> Run:
    """Return a `Run` of a model in this process; raises RuntimeError for cached tokens."""

    def run(prompts: list[list[int]], lengths: list[int]) -> Answer:
        started_s = time.perf_counter()
        token_ids, details = generate(prompts, lengths)
        seconds = time.perf_counter() - started_s
        if details["cached_tokens"]:
            raise RuntimeError(
                f"{details['cached_tokens']} tokens came from a cache, but all must be computed"
            )
        return {"seconds": seconds, "token_ids": token_ids}

    return run


def tell(text: str) -> None:
    """Print progress on standard error."""
    print(text, file=sys.stderr, flush=True)
