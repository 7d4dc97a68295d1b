"""The parser of `nanovllm generate`."""

import argparse

from nanovllm.cli.environment import ENGINE_VARIABLES, HISTORY_VARIABLE
from nanovllm.cli.options import (
    add_chat_template,
    add_engine_options,
    add_model_flag,
    add_sampling_options,
)
from nanovllm.cli.parsers.parser import add_command

_DESCRIPTION = """
Continue a prompt on the terminal. Without a prompt, read prompts from the terminal or from standard
input, one a line; on a terminal, /help lists the commands. With --chat, prompts are messages of a
conversation.

  nanovllm generate "She smiled and said"
  nanovllm generate --model gpt2 "She smiled and said"
  nanovllm generate gpt2 "She smiled and said"
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `generate`."""
    parser = add_command(
        subparsers,
        "generate",
        "nanovllm.cli.generate:run",
        arguments="[[MODEL] PROMPT] [options]",
        summary="continue a prompt on the terminal",
        description=_DESCRIPTION,
        variables=(HISTORY_VARIABLE, *ENGINE_VARIABLES),
    )
    parser.add_argument(
        "texts",
        nargs="*",
        metavar="PROMPT",
        help="text to continue, after the model if two are given (default: read prompts)",
    )
    add_model_flag(parser)
    group = parser.add_argument_group("chat")
    group.add_argument(
        "--chat",
        action="store_true",
        help="answer messages by the chat template (default: no, continue texts)",
    )
    add_chat_template(group, "; implies --chat")
    add_sampling_options(parser)
    add_engine_options(parser)
