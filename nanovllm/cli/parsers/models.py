"""The parsers of `nanovllm list`, `show`, `remove` and `env`."""

import argparse

from nanovllm.cli.environment import ENGINE_VARIABLES, MODEL_VARIABLES, VARIABLES, variables_help
from nanovllm.cli.options import add_model
from nanovllm.cli.parsers.parser import Command

_LIST = """
List the models and the compiled kernels on this machine: the bundled model, downloads below
./models, GPT-2 models of the Hugging Face cache, and the kernels.
"""
_SHOW = (
    "Show a model on this machine: its network, files and folder. `show kernels` lists the kernels."
)
_REMOVE = """
Remove models of the Hugging Face cache, or the compiled kernels ("kernels"), after asking. Nothing
outside of these two folders is removed.
"""
_ENV = """
Show what a bug report needs: versions, processor, memory, folders and environment variables. The
values of keys and tokens are not shown.
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Describe the subcommands."""
    variables = variables_help(*ENGINE_VARIABLES)
    listing = subparsers.add_parser(
        "list",
        help="list models and compiled kernels",
        usage="%(prog)s",
        description=_LIST,
        epilog=variables,
    )
    listing.set_defaults(run=Command("nanovllm.cli.models:run_list"))
    show = subparsers.add_parser(
        "show",
        help="show a model",
        usage="%(prog)s [MODEL]",
        description=_SHOW,
        epilog=variables,
    )
    add_model(show)
    show.set_defaults(run=Command("nanovllm.cli.models:run_show"))
    remove = subparsers.add_parser(
        "remove",
        help="remove models or kernels",
        usage="%(prog)s NAME... [--yes]",
        description=_REMOVE,
        epilog=variables_help("NANOVLLM_CACHE_DIR", *MODEL_VARIABLES[:2]),
    )
    remove.add_argument("names", nargs="+", metavar="NAME", help="name as in `nanovllm list`")
    remove.add_argument(
        "-y", "--yes", action="store_true", help="remove without asking (default: ask)"
    )
    remove.set_defaults(run=Command("nanovllm.cli.models:run_remove"))
    env = subparsers.add_parser(
        "env",
        help="show versions and settings for a bug report",
        usage="%(prog)s",
        description=_ENV,
        epilog=variables_help(*VARIABLES),
    )
    env.set_defaults(run=Command("nanovllm.cli.env:run"))
