"""`nanovllm bench latency|throughput|threads|profile|serve`: measure speed."""

import argparse
from collections.abc import Collection

from nanovllm.checked_fields import checked_fields
from nanovllm.cli.bench.options import (
    LatencyOptions,
    LoadOptions,
    ProfileOptions,
    ThreadsOptions,
    ThroughputOptions,
)
from nanovllm.cli.environment import API_KEY_VARIABLE, ENGINE_VARIABLES
from nanovllm.cli.options import add_engine_options, add_model, add_options
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
_THREADS = (
    "Measure the tokens/s of decoding one sequence, of decoding a batch and of prefill with 1, 2, "
    "3, 4, 6, 8, 12, ... threads, beside the bandwidth of the memory, and name the best number. "
    f"The model is loaded for each number. {_PHASES}"
)
_PROFILE = (
    "Measure where the time of a step goes: by operation, with the fractions of the machine's "
    "limits that it reaches, and by thread, with the time that it waits for others. --svg draws it."
)
_SERVE = """
Send random prompts to a running server and measure latency as its clients see it: time to first
token (TTFT), time per output token after the first (TPOT), inter-token latency (ITL) and end-to-end
latency (E2EL). Works with any OpenAI-compatible server that takes token ids and reports usage in
streams. The exit code is 1 if a request failed.
"""


def define(parser: argparse.ArgumentParser) -> None:
    """Define the kinds."""
    parser.usage = "%(prog)s KIND [options]"
    parser.description = _DESCRIPTION
    kinds = {
        "latency": ("time of a batch", _define_latency),
        "throughput": ("tokens per second of many prompts at once", _define_throughput),
        "threads": ("speed by the number of threads", _define_threads),
        "profile": ("time of a step by operation and thread", _define_profile),
        "serve": ("latency and throughput of a running server", _define_serve),
    }
    add_commands(parser, "kind", kinds)


def _define_latency(parser: argparse.ArgumentParser) -> None:
    _define_offline(parser, "offline:run_latency", _LATENCY, LatencyOptions)


def _define_throughput(parser: argparse.ArgumentParser) -> None:
    _define_offline(parser, "offline:run_throughput", _THROUGHPUT, ThroughputOptions)


def _define_threads(parser: argparse.ArgumentParser) -> None:
    _define_offline(parser, "threads:run_threads", _THREADS, ThreadsOptions, ("num_threads",))


def _define_profile(parser: argparse.ArgumentParser) -> None:
    omitted = ("enable_prefix_caching", "speculative_config")
    _define_offline(parser, "profile:run_profile", _PROFILE, ProfileOptions, omitted)


def _define_offline(
    parser: argparse.ArgumentParser,
    function: str,
    description: str,
    options: type,
    omitted: Collection[str] = (),
) -> None:
    set_up(
        parser,
        imported(f"nanovllm.cli.bench.{function}"),
        "[MODEL] [options]",
        description,
        ENGINE_VARIABLES,
    )
    add_model(parser)
    _add_workload(parser, options, set())
    add_engine_options(parser, omitted, seed=0, enable_prefix_caching=False)


def _define_serve(parser: argparse.ArgumentParser) -> None:
    set_up(
        parser,
        imported("nanovllm.cli.bench.serve:run"),
        "[MODEL] [options]",
        _SERVE,
        (API_KEY_VARIABLE,),
    )
    add_model(parser, "name of the served model (default: the server's first)", default=None)
    server = parser.add_argument_group("server")
    add_options(server.add_mutually_exclusive_group(), LoadOptions, ("base_url", "port"))
    add_options(server, LoadOptions, ("api_key", "timeout_s"))
    _add_workload(parser, LoadOptions, {"base_url", "port", "api_key", "timeout_s"})


def _add_workload(parser: argparse.ArgumentParser, options: type, others: set[str]) -> None:
    """Add the options of the workload, which are all but `others`, and of files to write."""
    names = [name for name in checked_fields(options) if name not in {"model", *others}]
    outputs = [name for name in names if name in {"json", "svg"}]
    names = [name for name in names if name not in outputs]
    add_options(parser.add_argument_group("workload"), options, names)
    add_options(parser, options, outputs)
