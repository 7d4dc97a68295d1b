"""The parser of `nanovllm verify`."""

import argparse
from pathlib import Path

from nanovllm.cli.argument_types import positive, positive_number
from nanovllm.cli.environment import ENGINE_VARIABLES
from nanovllm.cli.options import add_engine_options, add_model
from nanovllm.cli.parsers.parser import add_command

AGREES, DIFFERS, NOT_COMPARED = 0, 1, 2
"""Exit codes."""
_DESCRIPTION = f"""
Compare a checkpoint's log-probabilities, greedy tokens and tokenization with an installed
transformers.

The reference runs in float32 with eager attention. Greedy tokens must be equal up to the first step
where its top two tokens are closer than twice the tolerance (0.1 in bfloat16, 0.5 in int8): from
there on either token is right, and the texts may diverge.

exit codes: {AGREES} everything agrees; {DIFFERS} something differs; {NOT_COMPARED} nothing was
compared, because torch or transformers is missing, or the model cannot be loaded.
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `verify`."""
    parser = add_command(
        subparsers,
        "verify",
        "nanovllm.cli.verify:run",
        arguments="[MODEL] [options]",
        summary="compare a model with transformers",
        description=_DESCRIPTION,
        variables=ENGINE_VARIABLES,
    )
    add_model(parser)
    group = parser.add_argument_group("comparison")
    group.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="text file with one prompt a line (default: built-in prompts)",
    )
    group.add_argument(
        "--max-tokens",
        type=positive,
        default=32,
        metavar="TOKENS",
        help="greedy tokens to compare for each prompt",
    )
    group.add_argument(
        "--tolerance",
        type=positive_number,
        metavar="T",
        help="maximum difference of log-probabilities (default: float32 1e-4; bfloat16 and int8 "
        "mean KL of 5e-4 and 5e-3 nats)",
    )
    add_engine_options(parser)
