"""`nanovllm bench latency|throughput|serve`: measure speed."""

import argparse
import math
from pathlib import Path

from nanovllm.cli.argument_types import not_negative, port_number, positive, positive_number
from nanovllm.cli.environment import API_KEY_VARIABLE, ENGINE_VARIABLES
from nanovllm.cli.options import add_engine_options, add_model
from nanovllm.cli.parser import add_commands, imported, set_up

_DESCRIPTION = "Measure how fast a model is on this machine. Every report ends in a line of JSON."
_PHASES = (
    "A step that computes prompt tokens counts as prefill, even if it also decodes; others count "
    "as decode."
)
_LATENCY = f"Measure the time of a batch of random prompts: prefill and decode tokens/s. {_PHASES}"
_THROUGHPUT = (
    f"Measure requests/s and tokens/s when all prompts are submitted at the start. {_PHASES}"
)
_SERVE = """
Send random prompts to a running server and measure latency as its clients see it: time to first
token (TTFT), time per output token after the first (TPOT), inter-token latency (ITL) and end-to-end
latency (E2EL). Works with any OpenAI-compatible server that takes token ids and reports usage in
streams. The exit code is 1 if a request failed.
"""


def define(parser: argparse.ArgumentParser) -> None:
    """Define the three kinds."""
    parser.usage = "%(prog)s KIND [options]"
    parser.description = _DESCRIPTION
    kinds = {
        "latency": ("time of a batch", _define_latency),
        "throughput": ("tokens per second of many prompts at once", _define_throughput),
        "serve": ("latency and throughput of a running server", _define_serve),
    }
    add_commands(parser, "kind", kinds)


def _define_latency(parser: argparse.ArgumentParser) -> None:
    set_up(
        parser,
        imported("nanovllm.cli.bench.offline:run_latency"),
        arguments="[MODEL] [options]",
        description=_LATENCY,
        variables=ENGINE_VARIABLES,
    )
    add_model(parser)
    group = parser.add_argument_group("workload")
    _add_lengths(parser, group, "", (32, 128))
    _add_count(group, "--batch-size", 8, "prompts in the batch")
    _add_count(group, "--num-iters", 10, "measured iterations")
    group.add_argument(
        "--num-iters-warmup",
        type=not_negative,
        default=2,
        metavar="N",
        help="warm-up iterations before them",
    )
    group.add_argument(
        "--limits",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure memory bandwidth and peak FLOPS before and after, and report the fraction "
        "of them that was reached",
    )
    _add_temperature(group)
    _add_json(parser)
    add_engine_options(parser, seed=0, enable_prefix_caching=False)


def _define_throughput(parser: argparse.ArgumentParser) -> None:
    set_up(
        parser,
        imported("nanovllm.cli.bench.offline:run_throughput"),
        arguments="[MODEL] [options]",
        description=_THROUGHPUT,
        variables=ENGINE_VARIABLES,
    )
    add_model(parser)
    group = parser.add_argument_group("workload")
    group.add_argument(
        "--num-prompts",
        type=positive,
        metavar="N",
        help="number of prompts (default: 32, or the whole dataset)",
    )
    _add_lengths(parser, group, "", (128, 64), unless=", unless the dataset says")
    group.add_argument(
        "--dataset",
        type=Path,
        metavar="FILE",
        help='JSON Lines file, {"prompt": ..., "max_tokens": ...} (default: random prompts)',
    )
    _add_temperature(group)
    _add_json(parser)
    add_engine_options(parser, seed=0, enable_prefix_caching=False)


def _define_serve(parser: argparse.ArgumentParser) -> None:
    set_up(
        parser,
        imported("nanovllm.cli.bench.serve:run"),
        arguments="[MODEL] [options]",
        description=_SERVE,
        variables=(API_KEY_VARIABLE,),
    )
    add_model(parser, "name of the served model (default: the server's first)", default=None)
    server = parser.add_argument_group("server")
    address = server.add_mutually_exclusive_group()
    address.add_argument(
        "--base-url", default="http://127.0.0.1:8000", metavar="URL", help="address of the server"
    )
    address.add_argument(
        "--port",
        type=port_number,
        help="port of a server on this machine (default: that of --base-url)",
    )
    server.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"bearer token, visible to other users of the machine (default: {API_KEY_VARIABLE})",
    )
    server.add_argument(
        "--timeout-s",
        type=positive_number,
        default=600.0,
        metavar="SECONDS",
        help="timeout of a request in seconds",
    )
    group = parser.add_argument_group("workload")
    _add_count(group, "--num-prompts", 32, "number of requests")
    _add_lengths(parser, group, "random-", (128, 64))
    group.add_argument(
        "--request-rate",
        type=positive_number,
        default=math.inf,
        metavar="RATE",
        help="requests per second with Poisson arrivals; inf submits all at once",
    )
    group.add_argument(
        "--max-concurrency",
        type=positive,
        metavar="N",
        help="maximum concurrent requests (default: no limit)",
    )
    group.add_argument(
        "--ignore-eos",
        action="store_true",
        help="generate past the end-of-text token, so that all outputs have full length "
        "(default: no)",
    )
    _add_temperature(group)
    group.add_argument(
        "--seed",
        type=not_negative,
        help="seed of prompts and arrivals (default: random, which misses every prefix cache)",
    )
    _add_count(
        group,
        "--vocab",
        256,
        "draw prompt token ids below this; every byte-level vocabulary has 256",
    )
    _add_json(parser)


def _add_lengths(
    parser: argparse.ArgumentParser,
    group: "argparse._ArgumentGroup",
    prefix: str,
    defaults: tuple[int, int],
    unless: str = "",
) -> None:
    """Add the options of both lengths, which are None if left out; see fit_lengths."""
    parser.set_defaults(default_lengths=defaults)
    for name, default, text in zip(
        ("input-len", "output-len"),
        defaults,
        ("tokens of each random prompt", f"tokens to generate for each prompt{unless}"),
        strict=True,
    ):
        group.add_argument(
            f"--{prefix}{name}",
            type=positive,
            metavar="N",
            help=f"{text} (default: {default}, fewer in a shorter context)",
        )


def _add_temperature(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--temperature", type=float, default=0.0, help="0 for greedy decoding")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="also write the JSON report to this file (default: none)",
    )


def _add_count(group: "argparse._ArgumentGroup", flag: str, default: int, text: str) -> None:
    group.add_argument(flag, type=positive, default=default, metavar="N", help=text)
