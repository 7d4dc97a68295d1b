"""The parser of `nanovllm trace`."""

import argparse

from nanovllm.cli.argument_types import positive
from nanovllm.cli.environment import MODEL_VARIABLES
from nanovllm.cli.options import add_model_flag
from nanovllm.cli.parsers.parser import add_command

_DESCRIPTION = """
Print the forward pass of a prompt step by step: each operation with the shape, mean, standard
deviation, smallest and largest number of its result, and the mean norm of its rows; the heads with
the largest weights of a kind; and the most probable next tokens after each layer (logit lens).

  nanovllm trace "The old man said to the"
  nanovllm trace --model gpt2 "The capital of France is" --json
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `trace`."""
    parser = add_command(
        subparsers,
        "trace",
        "nanovllm.cli.trace:run",
        arguments="PROMPT [--model MODEL] [options]",
        summary="print the forward pass of a prompt step by step",
        description=_DESCRIPTION,
        variables=MODEL_VARIABLES,
    )
    parser.add_argument("prompt", metavar="PROMPT", help="text of at most 512 tokens")
    add_model_flag(parser)
    parser.add_argument(
        "--top", type=positive, default=4, metavar="N", help="tokens of each prediction, at most 20"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object (default: no)")
