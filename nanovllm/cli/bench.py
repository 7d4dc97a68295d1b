"""nanovllm bench latency|throughput|serve: how fast a model is on this machine. Every report ends in one line of JSON."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from nanovllm.cli import bench_offline, bench_serve
from nanovllm.cli.access import API_KEY_VARIABLE
from nanovllm.cli.bench_report import add_report_options
from nanovllm.cli.options import add_engine_options, add_model
from nanovllm.cli.values import not_negative, positive, positive_number

_PHASES = "A step that reads prompts counts as prefill, even where it decodes too; the others count as decode."
_LATENCY = (
    f"Time that one batch of random prompts takes; prefill and decode tokens per second. {_PHASES}"
)
_THROUGHPUT = f"Requests and tokens per second when all prompts are there from the start. {_PHASES}"
_SERVE = (
    "Send random prompts to a running server and measure what its clients feel: time to first token (TTFT), time per output token after the "
    "first (TPOT), time between two pieces of a stream (ITL) and time to the end (E2EL). Works with any OpenAI-compatible server that "
    "takes token ids and reports usage in streams. The exit code is 1 where a request failed."
)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Describe the subcommand and its three kinds."""
    parser = subparsers.add_parser("bench", help="measure speed", description=__doc__)
    kinds = parser.add_subparsers(title="kinds", required=True, metavar="KIND")
    _add_latency(kinds.add_parser("latency", help="time that a batch takes", description=_LATENCY))
    _add_throughput(
        kinds.add_parser(
            "throughput", help="tokens a second of many prompts at once", description=_THROUGHPUT
        )
    )
    _add_serve(
        kinds.add_parser("serve", help="what clients of a running server feel", description=_SERVE)
    )


def _add_latency(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    group = parser.add_argument_group("work")
    _add_count(group, "--input-len", 32, "tokens of each prompt")
    _add_count(group, "--output-len", 128, "tokens to generate for each")
    _add_count(group, "--batch-size", 8, "prompts at once")
    _add_count(group, "--num-iters", 10, "times to measure")
    group.add_argument(
        "--num-iters-warmup",
        type=not_negative,
        default=2,
        metavar="N",
        help="times to run before (%(default)s)",
    )
    limits = "measure the machine's memory and arithmetic before and after, and tell which share of them was reached"
    group.add_argument("--limits", action=argparse.BooleanOptionalAction, default=True, help=limits)
    _add_offline(parser, group, bench_offline.run_latency)


def _add_throughput(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    group = parser.add_argument_group("work")
    group.add_argument(
        "--num-prompts",
        type=positive,
        default=None,
        metavar="N",
        help="prompts (32, or all that a dataset has)",
    )
    _add_count(group, "--input-len", 128, "tokens of each random prompt")
    _add_count(
        group, "--output-len", 64, "tokens to generate for each, unless a dataset says otherwise"
    )
    group.add_argument(
        "--dataset",
        type=Path,
        default=None,
        metavar="FILE",
        help='lines of JSON, {"prompt": ..., "max_tokens": ...}, instead',
    )
    _add_offline(parser, group, bench_offline.run_throughput)


def _add_offline(
    parser: argparse.ArgumentParser,
    group: "argparse._ArgumentGroup",
    run: Callable[[argparse.Namespace], int],
) -> None:
    group.add_argument(
        "--temperature", type=float, default=0.0, help="0 for the most likely token (%(default)s)"
    )
    add_report_options(parser)
    add_engine_options(parser)
    parser.set_defaults(run=run, enable_prefix_caching=False, seed=0)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("server")
    server.add_argument(
        "--base-url",
        default="http://127.0.0.1:8000",
        metavar="URL",
        help="where it listens (%(default)s)",
    )
    server.add_argument(
        "--model", default=None, help="name of the model there (the first one it serves)"
    )
    server.add_argument(
        "--api-key",
        default=None,
        help=f"bearer token; better in the environment as {API_KEY_VARIABLE}",
    )
    server.add_argument(
        "--timeout-s",
        type=positive_number,
        default=600.0,
        metavar="S",
        help="a request fails after this long (%(default)s)",
    )
    work = parser.add_argument_group("work")
    _add_count(work, "--num-prompts", 32, "requests")
    _add_count(work, "--random-input-len", 128, "tokens of each prompt")
    _add_count(work, "--random-output-len", 64, "most tokens to generate for each")
    work.add_argument(
        "--request-rate",
        type=positive_number,
        default=math.inf,
        metavar="R",
        help="requests a second, Poisson arrivals; inf: all at once",
    )
    work.add_argument(
        "--max-concurrency",
        type=positive,
        default=None,
        metavar="N",
        help="most requests under way at once",
    )
    work.add_argument(
        "--ignore-eos",
        action="store_true",
        help="go on after the end of the text, so that all answers have full length",
    )
    work.add_argument(
        "--temperature", type=float, default=0.0, help="0 for the most likely token (%(default)s)"
    )
    work.add_argument(
        "--seed",
        type=not_negative,
        default=None,
        help="same prompts and arrivals each time; by default new ones, which no prefix cache has",
    )
    _add_count(
        work,
        "--vocab",
        256,
        "prompts have token ids below this: 256 are in every byte-level vocabulary",
    )
    add_report_options(parser)
    parser.set_defaults(run=bench_serve.run)


def _add_count(group: "argparse._ArgumentGroup", flag: str, default: int, text: str) -> None:
    group.add_argument(
        flag, type=positive, default=default, metavar="N", help=f"{text} (%(default)s)"
    )
