"""`nanovllm learn`: the course, and the judge of what its reader writes."""

import argparse
from pathlib import Path

from nanovllm.cli.argument_types import positive
from nanovllm.cli.parser import Run, add_commands, imported, set_up

_DESCRIPTION = """
Write GPT-2, its training and its server yourself, in twelve steps. Without a command this lists
them, with your progress.

  nanovllm learn start my-gpt
  cd my-gpt
  nanovllm learn show 3
  nanovllm learn check 3
"""


def define(parser: argparse.ArgumentParser) -> None:
    """Define the commands."""
    set_up(parser, _run("list"), "[COMMAND] [options]", _DESCRIPTION)
    _add_folder(parser)
    commands = {
        "start": ("make a folder with the files to write", _define_start),
        "show": ("print the page of a step, or its solution", _define_show),
        "check": ("judge steps", _define_check),
        "hint": ("print the next hint of a step", _define_hint),
        "diff": ("compare a step with the solution", _define_diff),
        "race": ("measure your engine beside the project's", _define_race),
    }
    add_commands(parser, "command", commands, is_required=False)


def _define_start(parser: argparse.ArgumentParser) -> None:
    set_up(parser, _run("start"), "DIR [--solutions]", "Make a reader's folder.")
    parser.add_argument("dir", type=Path, metavar="DIR", help="the folder")
    parser.add_argument(
        "--solutions", action="store_true", help="write the solutions instead of empty functions"
    )


def _define_show(parser: argparse.ArgumentParser) -> None:
    _define_step(parser, "show", "Print the page of a step.")
    parser.add_argument("--solution", action="store_true", help="print the solution instead")


def _define_check(parser: argparse.ArgumentParser) -> None:
    set_up(parser, _run("check"), "[STEP...] [options]", "Judge steps.")
    parser.add_argument(
        "steps",
        nargs="*",
        type=_number,
        metavar="STEP",
        help="numbers of the steps (default: all that are written)",
    )
    _add_folder(parser)


def _define_hint(parser: argparse.ArgumentParser) -> None:
    _define_step(parser, "hint", "Print the next hint of a step.")
    parser.add_argument("--all", action="store_true", help="print the hints shown before instead")


def _define_diff(parser: argparse.ArgumentParser) -> None:
    _define_step(parser, "diff", "Compare your code of a step with the solution.")


def _define_race(parser: argparse.ArgumentParser) -> None:
    run = imported("nanovllm.cli.race:run_race")
    text = (
        "Measure your engine beside backend numpy and numba on the bundled model, draw the rates "
        "as bars, and name the function to speed up next."
    )
    set_up(parser, run, "[options]", text)
    _add_folder(parser)
    parser.add_argument(
        "--rounds", type=positive, default=5, metavar="N", help="rounds; their median counts"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the last line, JSON, to this file too"
    )


def _define_step(parser: argparse.ArgumentParser, name: str, description: str) -> None:
    set_up(parser, _run(name), "STEP [options]", description)
    parser.add_argument("step", type=_number, metavar="STEP", help="number of the step")
    _add_folder(parser)


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text} must be the number of a step, such as 3")
    return int(text)


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--folder",
        type=Path,
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="the reader's folder (default: the current folder or one above it)",
    )


def _run(name: str) -> Run:
    return imported(f"nanovllm.cli.lessons:run_{name}")
