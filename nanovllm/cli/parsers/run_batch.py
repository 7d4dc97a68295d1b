"""The parser of `nanovllm run-batch`."""

import argparse
from pathlib import Path

from nanovllm.cli.argument_types import positive
from nanovllm.cli.environment import ENGINE_VARIABLES
from nanovllm.cli.options import (
    add_chat_template,
    add_engine_options,
    add_model,
    add_served_model_name,
)
from nanovllm.cli.parsers.parser import add_command

_DESCRIPTION = """
Run a file of requests in OpenAI's batch format, without a server.

Responses are appended in the order of completion. If interrupted, rerun the same command to resume.
A request without a seed is sampled anew in every run; with --seed, its seed is derived from that
seed and its custom_id.

  nanovllm run-batch -i requests.jsonl -o answers.jsonl --model gpt2
  nanovllm run-batch -i - -o - < requests.jsonl > answers.jsonl
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `run-batch`."""
    parser = add_command(
        subparsers,
        "run-batch",
        "nanovllm.cli.run_batch:run",
        arguments="-i FILE -o FILE [MODEL] [options]",
        summary="run a file of requests",
        description=_DESCRIPTION,
        variables=ENGINE_VARIABLES,
    )
    add_model(parser)
    parser.add_argument(
        "-i",
        "--input",
        type=Path,
        required=True,
        metavar="FILE",
        help='lines {"custom_id", "method", "url", "body"}; - for standard input',
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help='lines {"id", "custom_id", "response", "error"}; - for standard output',
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="discard responses that the output file has (default: keep them and resume)",
    )
    add_served_model_name(parser)
    add_chat_template(parser)
    parser.add_argument(
        "--max-line-bytes",
        type=positive,
        default=4 << 20,
        metavar="BYTES",
        help="maximum length of an input line in bytes",
    )
    add_engine_options(parser)
