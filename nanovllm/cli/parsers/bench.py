"""The parsers of `nanovllm bench latency|throughput|serve`."""

import argparse
import math
from pathlib import Path

from nanovllm.cli.argument_types import not_negative, positive, positive_number
from nanovllm.cli.environment import API_KEY_VARIABLE, ENGINE_VARIABLES, variables_help
from nanovllm.cli.options import add_engine_options, add_model
from nanovllm.cli.parsers.parser import Command

_DESCRIPTION = "Measure how fast a model is on this machine. Every report ends in a line of JSON."
_PHASES = (
    "A step that reads prompts counts as prefill, even if it also decodes; others count as decode."
)
_LATENCY = f"Measure the time of a batch of random prompts: prefill and decode tokens/s. {_PHASES}"
_THROUGHPUT = f"Measure requests and tokens/s when all prompts are there at the start. {_PHASES}"
_SERVE = """
Send random prompts to a running server and measure what its clients see: time to first token
(TTFT), time per output token after the first (TPOT), time between two pieces of a stream (ITL) and
time to the end (E2EL). Works with any OpenAI-compatible server that takes token ids and reports
usage in streams. The exit code is 1 if a request failed.
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Describe the subcommand and its three kinds."""
    parser = subparsers.add_parser(
        "bench", help="measure speed", usage="%(prog)s KIND [options]", description=_DESCRIPTION
    )
    kinds = parser.add_subparsers(
        title="kinds", required=True, metavar="KIND", prog="nanovllm bench"
    )
    engine = variables_help(*ENGINE_VARIABLES)
    usage = "%(prog)s [MODEL] [options]"
    latency = kinds.add_parser(
        "latency",
        help="time of a batch",
        usage=usage,
        description=_LATENCY,
        epilog=engine,
    )
    _add_latency(latency)
    throughput = kinds.add_parser(
        "throughput",
        help="tokens per second of many prompts at once",
        usage=usage,
        description=_THROUGHPUT,
        epilog=engine,
    )
    _add_throughput(throughput)
    serve = kinds.add_parser(
        "serve",
        help="latency and throughput of a running server",
        usage=usage,
        description=_SERVE,
        epilog=variables_help(API_KEY_VARIABLE),
    )
    _add_serve(serve)


def _add_latency(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    group = parser.add_argument_group("work")
    _add_count(group, "--input-len", 32, "tokens of each prompt")
    _add_count(group, "--output-len", 128, "tokens to generate for each")
    _add_count(group, "--batch-size", 8, "prompts at once")
    _add_count(group, "--num-iters", 10, "runs that are measured")
    group.add_argument(
        "--num-iters-warmup", type=not_negative, default=2, metavar="N", help="runs before them"
    )
    group.add_argument(
        "--limits",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure the machine's memory and arithmetic before and after, and report the "
        "fraction of them that was reached",
    )
    _add_offline(parser, group, Command("nanovllm.cli.bench.offline:run_latency"))


def _add_throughput(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    group = parser.add_argument_group("work")
    group.add_argument(
        "--num-prompts",
        type=positive,
        metavar="N",
        help="prompts (default: 32, or all of the dataset)",
    )
    _add_count(group, "--input-len", 128, "tokens of each random prompt")
    _add_count(
        group, "--output-len", 64, "tokens to generate for each, unless a dataset says otherwise"
    )
    group.add_argument(
        "--dataset",
        type=Path,
        metavar="FILE",
        help='lines of JSON, {"prompt": ..., "max_tokens": ...} (default: random prompts)',
    )
    _add_offline(parser, group, Command("nanovllm.cli.bench.offline:run_throughput"))


def _add_offline(
    parser: argparse.ArgumentParser, group: "argparse._ArgumentGroup", run: Command
) -> None:
    group.add_argument(
        "--temperature", type=float, default=0.0, help="0 for the most probable token"
    )
    _add_report_options(parser)
    add_engine_options(parser, seed=0, prefix_caching=False)
    parser.set_defaults(run=run)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    add_model(parser, "name of the model there (default: the first one it serves)", default=None)
    server = parser.add_argument_group("server")
    server.add_argument(
        "--base-url", default="http://127.0.0.1:8000", metavar="URL", help="address of the server"
    )
    server.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"bearer token; other users of the machine can see it (default: {API_KEY_VARIABLE})",
    )
    server.add_argument(
        "--timeout-s",
        type=positive_number,
        default=600.0,
        metavar="S",
        help="a request fails after this time",
    )
    work = parser.add_argument_group("work")
    _add_count(work, "--num-prompts", 32, "requests")
    _add_count(work, "--random-input-len", 128, "tokens of each prompt")
    _add_count(work, "--random-output-len", 64, "maximum tokens to generate for each")
    work.add_argument(
        "--request-rate",
        type=positive_number,
        default=math.inf,
        metavar="R",
        help="requests per second, Poisson arrivals; inf: all at once",
    )
    work.add_argument(
        "--max-concurrency",
        type=positive,
        metavar="N",
        help="maximum requests under way at once (default: no limit)",
    )
    work.add_argument(
        "--ignore-eos",
        action="store_true",
        help="go on after the end-of-text token, so that all answers have full length "
        "(default: no)",
    )
    work.add_argument(
        "--temperature", type=float, default=0.0, help="0 for the most probable token"
    )
    work.add_argument(
        "--seed",
        type=not_negative,
        help="same prompts and arrivals each time (default: new ones, not in any prefix cache)",
    )
    _add_count(
        work,
        "--vocab",
        256,
        "prompts have token ids below this; every byte-level vocabulary has 256",
    )
    _add_report_options(parser)
    parser.set_defaults(run=Command("nanovllm.cli.bench.serve:run"))


def _add_report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="also write the figures to this file (default: none)",
    )


def _add_count(group: "argparse._ArgumentGroup", flag: str, default: int, text: str) -> None:
    group.add_argument(flag, type=positive, default=default, metavar="N", help=text)
