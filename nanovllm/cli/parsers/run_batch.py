"""The parser of `nanovllm run-batch`."""

import argparse
from pathlib import Path

from nanovllm.cli.argument_types import positive
from nanovllm.cli.environment import ENGINE_VARIABLES, variables_help
from nanovllm.cli.options import add_chat_template, add_engine_options, add_model
from nanovllm.cli.parsers.parser import Command

_DESCRIPTION = """
Answer a file of requests in OpenAI's batch format, without a server.

Answers are appended as they come, in any order. After an interruption the same command answers what
is left. A request without a seed is drawn anew in every run; with --seed its draws follow from that
seed and its custom_id.

  nanovllm run-batch -i requests.jsonl -o answers.jsonl --model gpt2
  nanovllm run-batch -i - -o - < requests.jsonl > answers.jsonl
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Describe the subcommand."""
    parser = subparsers.add_parser(
        "run-batch",
        help="answer a file of requests",
        usage="%(prog)s -i FILE -o FILE [MODEL] [options]",
        description=_DESCRIPTION,
        epilog=variables_help(*ENGINE_VARIABLES),
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
        help="drop the answers that the output has (default: keep them and answer the others)",
    )
    parser.add_argument(
        "--served-model-name",
        action="append",
        metavar="NAME",
        help="name of the model in the requests; repeat for several (default: the folder's name)",
    )
    add_chat_template(parser)
    parser.add_argument(
        "--max-line-bytes",
        type=positive,
        default=4 << 20,
        metavar="BYTES",
        help="maximum length of an input line",
    )
    add_engine_options(parser)
    parser.set_defaults(run=Command("nanovllm.cli.run_batch:run"))
