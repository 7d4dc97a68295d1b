"""The parser of `nanovllm verify`."""

import argparse
from pathlib import Path

from nanovllm.cli.argument_types import positive, positive_number
from nanovllm.cli.environment import ENGINE_VARIABLES, variables_help
from nanovllm.cli.options import add_engine_options, add_model
from nanovllm.cli.parsers.parser import Command

AGREES, DIFFERS, NOT_COMPARED = 0, 1, 2
_DESCRIPTION = """
Compare a checkpoint's log-probabilities, greedy tokens and tokenization with an installed
transformers.

The reference runs in float32 with eager attention. Greedy tokens must be equal up to the first step
where its two best are closer than twice the tolerance (0.1 in bfloat16, 0.5 in int8): from there on
either choice is right, and the texts may part.
"""
_EXIT_CODES = f"""
exit codes: {AGREES} everything agrees; {DIFFERS} something differs; {NOT_COMPARED} nothing was
compared, because torch or transformers is missing, or one of the two cannot load the model.
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Describe the subcommand."""
    parser = subparsers.add_parser(
        "verify",
        help="compare a model with transformers",
        usage="%(prog)s [MODEL] [options]",
        description=_DESCRIPTION,
        epilog=f"{_EXIT_CODES}\n{variables_help(*ENGINE_VARIABLES)}",
    )
    add_model(parser)
    group = parser.add_argument_group("comparison")
    group.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="file with one prompt a line (default: built-in prompts)",
    )
    group.add_argument(
        "--max-tokens",
        type=positive,
        default=32,
        metavar="N",
        help="greedy tokens to compare for each prompt",
    )
    group.add_argument(
        "--tolerance",
        type=positive_number,
        metavar="T",
        help="largest difference of log-probabilities (default: 1e-4 in float32; in bfloat16 and "
        "int8 a mean KL divergence of 5e-4 and 5e-3 nats per token)",
    )
    add_engine_options(parser)
    parser.set_defaults(run=Command("nanovllm.cli.verify:run"))
