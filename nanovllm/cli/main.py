"""The `nanovllm` command: its parser, error messages and exit codes."""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

TYPE_CHECKING = False  # see nanovllm/__init__.py
if TYPE_CHECKING:
    import argparse


def build_parser() -> "argparse.ArgumentParser":
    """Build the command line's parser; parsed arguments carry the command as `run`."""
    # Imported here, under `_quiet_interrupts`.
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
    with _quiet_interrupts():
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


@contextmanager
def _quiet_interrupts() -> Iterator[None]:
    """Let Ctrl-C end the process at once while modules are imported.

    It would otherwise print the traceback of an import.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if __name__ == "__main__":
    sys.exit(main())
