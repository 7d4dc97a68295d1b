"""The `nanovllm` command: one subcommand a file."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from nanovllm import __version__
from nanovllm.cli import bench, download, generate, run_batch, serve, verify
from nanovllm.cli.values import printable_lines
from nanovllm.errors import NanovllmError


class _Parser(argparse.ArgumentParser):
    """Takes flags by their whole names only; so do its subcommands."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)


def build_parser() -> argparse.ArgumentParser:
    """The command line; the parsed arguments carry the subcommand's `run`."""
    parser = _Parser(prog="nanovllm", description="GPT-2 inference on CPUs.")
    parser.add_argument("--version", action="version", version=f"nanovllm {__version__}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (serve, generate, run_batch, download, bench, verify):
        command.add_parser(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; people see messages, never a traceback, for what they can mend."""
    parsed = build_parser().parse_args(arguments)
    try:
        return int(parsed.run(parsed))
    except BrokenPipeError:  # whoever read the output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (NanovllmError, ValueError, OSError) as error:
        print(f"nanovllm: {printable_lines(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
