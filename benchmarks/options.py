"""Shared parts of the benchmarks: options, the model, and the report's beginning and end."""

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.contenders import ROOT
from benchmarks.make_model import make_model
from benchmarks.workload import DEFAULT_SEED, Answer, Run
from nanovllm.cli.argument_types import not_negative, positive
from nanovllm.cli.bench.report import describe_machine
from nanovllm.model.config import GPT2Config
from nanovllm.model.machine import default_threads


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of all benchmarks that load a checkpoint."""
    default_model = ROOT / "models" / "gpt2-random"
    parser.add_argument(
        "--model",
        type=Path,
        default=default_model,
        help="folder of a checkpoint; made with random weights where it is missing",
    )
    add_run_options(parser)
    parser.add_argument(
        "--scale",
        type=positive,
        default=1,
        help="divide all lengths by this, for trying things out",
    )
    parser.add_argument(
        "--ours",
        type=json.loads,
        default={},
        metavar="JSON",
        help='further options of LLM, such as {"kv_cache_dtype": "int8"}',
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of all benchmarks."""
    parser.add_argument(
        "--threads",
        type=positive,
        default=default_threads(),
        help="threads of each run (%(default)s)",
    )
    seed = os.environ.get("WORKLOAD_SEED", str(DEFAULT_SEED))
    parser.add_argument(
        "--seed",
        type=not_negative,
        default=seed,
        help="draws the tokens; also WORKLOAD_SEED (%(default)s)",
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=None,
        metavar="FILE",
        help="also write the figures to this file",
    )


def names_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Return the argument type of a comma-separated list of known names."""

    def names(text: str) -> list[str]:
        chosen = [part.strip() for part in text.split(",")]
        unknown = [part for part in chosen if part not in known]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"{', '.join(map(repr, unknown))} is not known; choose from {', '.join(known)}"
            )
        return chosen

    return names


def ensure_model(folder: Path, size: str = "gpt2") -> GPT2Config:
    """Return the config of a folder's model, made with random weights if missing."""
    if not (folder / "config.json").is_file():
        tell(f"Making a {size} with random weights in {folder}")
        make_model(folder, size)
    return GPT2Config.load(folder)


def heading(parsed: argparse.Namespace) -> str:
    """Return the first lines of a report: machine and run."""
    machine = describe_machine()
    now = datetime.datetime.now(datetime.timezone.utc)
    model = f", {parsed.model}" if "model" in parsed else ""
    return (
        f"machine    {machine['cpu']}, {machine['cores']} cores, {machine['os']}\n"
        f"run        {now:%Y-%m-%d %H:%M} UTC, {parsed.threads} threads, seed {parsed.seed}"
        f"{model}\n"
    )


def finish(record: Mapping[str, Any], parsed: argparse.Namespace) -> None:
    """Print the record, the settings and the machine as a line of JSON; write it to --json."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    names = ("model", "threads", "seed", "scale", "ours")
    about = {"date": now, **{name: getattr(parsed, name) for name in names if name in parsed}}
    machine = describe_machine()
    line = json.dumps({**record, **about, "machine": machine}, allow_nan=False, default=str)
    if parsed.json is not None:
        parsed.json.write_text(line + "\n", encoding="utf-8")
    print(line, flush=True)


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
