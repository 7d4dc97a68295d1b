"""The parsers of `nanovllm list`, `show`, `remove` and `env`."""

import argparse

from nanovllm.cli.environment import ENGINE_VARIABLES, MODEL_VARIABLES, VARIABLES
from nanovllm.cli.options import add_model
from nanovllm.cli.parsers.parser import add_command

_LIST = """
List the models and the compiled kernels on this machine: the bundled model, the smaller draft
model beside it (for speculative decoding), downloads below ./models, GPT-2 models in the Hugging
Face cache, and the kernels.
"""
_SHOW = """
Show a model on this machine: its configuration, files and folder. `show kernels` lists the kernels.
"""
_REMOVE = """
Remove models from the Hugging Face cache, or the compiled kernels ("kernels"), after a question.
Nothing outside of these two folders is removed.
"""
_ENV = """
Show what a bug report needs: versions, processor, memory, folders and environment variables. Keys
and tokens are not shown.
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the four subcommands."""
    add_command(
        subparsers,
        "list",
        "nanovllm.cli.models:run_list",
        arguments="",
        summary="list models and compiled kernels",
        description=_LIST,
        variables=ENGINE_VARIABLES,
    )
    show = add_command(
        subparsers,
        "show",
        "nanovllm.cli.models:run_show",
        arguments="[MODEL]",
        summary="show a model",
        description=_SHOW,
        variables=ENGINE_VARIABLES,
    )
    add_model(show)
    remove = add_command(
        subparsers,
        "remove",
        "nanovllm.cli.models:run_remove",
        arguments="NAME... [--yes]",
        summary="remove models or kernels",
        description=_REMOVE,
        variables=("NANOVLLM_CACHE_DIR", *MODEL_VARIABLES[:2]),
    )
    remove.add_argument("names", nargs="+", metavar="NAME", help="name as in `nanovllm list`")
    remove.add_argument(
        "-y", "--yes", action="store_true", help="remove without asking (default: ask)"
    )
    add_command(
        subparsers,
        "env",
        "nanovllm.cli.env:run",
        arguments="",
        summary="show versions and settings for a bug report",
        description=_ENV,
        variables=tuple(VARIABLES),
    )
