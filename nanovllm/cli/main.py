"""The `nanovllm` command: its parser, error messages and exit codes."""

import os
import sys
from collections.abc import Sequence

from nanovllm.cli.interrupts import ended_by_interrupts

TYPE_CHECKING = False  # see nanovllm/__init__.py
if TYPE_CHECKING:
    import argparse


def build_parser() -> "argparse.ArgumentParser":
    """Build the command line's parser; parsed arguments carry the command as `run`."""
    # Imported here, under `ended_by_interrupts`.
    from nanovllm import __version__  # noqa: PLC0415
    from nanovllm.cli import download  # noqa: PLC0415
    from nanovllm.cli.parsers import (  # noqa: PLC0415
        bench,
        generate,
        models,
        run_batch,
        serve,
        trace,
        train,
        train_report,
        verify,
        visualize,
    )
    from nanovllm.cli.parsers import eval as evaluate  # noqa: PLC0415
    from nanovllm.cli.parsers.parser import CommandParser  # noqa: PLC0415

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
    subparsers = parser.add_subparsers(
        title="commands", required=True, metavar="COMMAND", prog="nanovllm"
    )
    for command in (
        serve,
        generate,
        run_batch,
        train,
        train_report,
        download,
        models,
        bench,
        evaluate,
        verify,
        visualize,
        trace,
    ):
        command.add_parser(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; an error is a message without traceback."""
    with ended_by_interrupts():
        from nanovllm.cli.argument_types import print_message  # noqa: PLC0415
        from nanovllm.errors import NanovllmError  # noqa: PLC0415

        expanded = _expand(sys.argv[1:] if arguments is None else list(arguments))
        parsed = build_parser().parse_args(expanded)
        run = parsed.run.load()
    try:
        return int(run(parsed))
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
