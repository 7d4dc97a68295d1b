"""The `nanovllm` command: its commands, error messages and exit codes."""

import os
import sys
from collections.abc import Collection, Sequence

from nanovllm.cli.interrupts import ended_by_interrupts

TYPE_CHECKING = False  # see nanovllm/__init__.py
if TYPE_CHECKING:
    import argparse

COMMANDS = {
    "serve": ("serve:define", "serve a model over HTTP"),
    "generate": ("generate:define", "continue a prompt on the terminal"),
    "run-batch": ("run_batch:define", "run a file of requests"),
    "train": ("train:define", "train or fine-tune a model on text"),
    "train-report": ("train_report:define", "write the report of training runs"),
    "download": ("download:define", "fetch a model from the Hugging Face hub"),
    "list": ("models:define_list", "list models and compiled kernels"),
    "show": ("models:define_show", "show a model"),
    "remove": ("models:define_remove", "remove models or kernels"),
    "env": ("env:define", "show versions and settings for a bug report"),
    "bench": ("bench.command:define", "measure speed"),
    "eval": ("eval:define", "measure loss, perplexity and bits per byte on text files"),
    "ablate": ("ablate:define", "measure what each head and block contributes"),
    "verify": ("verify:define", "compare a model with transformers"),
    "visualize": ("visualize:define", "draw attention, the logit lens or embeddings"),
    "learn": ("learn:define", "write GPT-2 yourself, step by step, with checks"),
    "trace": ("trace:define", "print the forward pass of a prompt step by step"),
}
"""The function that defines the parser of each command, in its module, and its summary."""


def build_parser(commands: Collection[str] = tuple(COMMANDS)) -> "argparse.ArgumentParser":
    """Build the parser, with the options of the named commands only.

    Their modules are imported, but nothing that takes long. Parsed arguments carry the function
    that runs the command as `run`.
    """
    # Imported here, under `ended_by_interrupts`.
    from pkgutil import resolve_name

    from nanovllm import __version__
    from nanovllm.cli.parser import CommandParser, add_commands

    parser = CommandParser(
        prog="nanovllm",
        usage="%(prog)s COMMAND [options]",
        description="GPT-2 inference and training on CPUs.",
        epilog="nanovllm COMMAND --help describes a command.",
    )
    parser.add_argument(
        "-V",
        "--version",
        action="version",
        version=f"nanovllm {__version__}",
        help="show the version and exit",
    )
    definitions = {
        name: (summary, resolve_name(f"nanovllm.cli.{target}") if name in commands else None)
        for name, (target, summary) in COMMANDS.items()
    }
    add_commands(parser, "command", definitions)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; an error is a message without traceback."""
    with ended_by_interrupts():
        from nanovllm.cli.argument_types import print_message
        from nanovllm.errors import NanovllmError

        expanded = _expand(sys.argv[1:] if arguments is None else list(arguments))
        parsed = build_parser(expanded[:1]).parse_args(expanded)
    try:
        return int(parsed.run(parsed))
    except BrokenPipeError:  # the reader of the output, such as `head`, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (NanovllmError, ValueError, OSError) as error:
        print_message(str(error))
        return 1
    except KeyboardInterrupt:
        return 130


def _expand(arguments: list[str]) -> list[str]:
    """Translate forms of other programs: no arguments, `help COMMAND`, `version`."""
    if not arguments:
        return ["--help"]
    if arguments[0] == "help":
        return [*arguments[1:], "--help"]
    return ["--version"] if arguments == ["version"] else arguments


if __name__ == "__main__":
    sys.exit(main())
