"""Types of command-line arguments, text files that they name, and messages on standard error."""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from nanovllm.errors import printable

_LINE_CHARACTERS = 2000  # of a message; none of ours is longer


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    return _whole(text, 1)


def not_negative(text: str) -> int:
    """Parse an integer of at least 0."""
    return _whole(text, 0)


def positive_number(text: str) -> float:
    """Parse a number above 0, `inf` included."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text} must be a number above 0")
    return number


def names_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Return a function that parses some of these names, with commas between them, or "all"."""

    def parse(text: str) -> list[str]:
        names = known if text == "all" else [name.strip() for name in text.split(",")]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} must be {', '.join(known)} or all")
        return list(dict.fromkeys(names))

    return parse


def output_file(*endings: str) -> Callable[[str], Path]:
    """Return a function that parses the path of a file with one of these endings."""

    def parse(text: str) -> Path:
        path = Path(text)
        if path.suffix.lower() not in endings:
            listed = f"{', '.join(endings[:-1])} or {endings[-1]}"
            raise argparse.ArgumentTypeError(f"{text} must end with {listed}")
        return path

    return parse


def read_lines(path: Path) -> list[tuple[int, str]]:
    """Return the non-blank lines of a UTF-8 file with their numbers; raises ValueError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from error
    return [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def print_message(message: str, command: str = "nanovllm") -> None:
    """Print a message on standard error, after the command's name.

    Control characters are escaped, except line breaks: a message may quote text of any origin.
    """
    lines = [printable(line, _LINE_CHARACTERS) for line in message.split("\n")]
    print(f"{command}: " + "\n".join(lines), file=sys.stderr)


def _whole(text: str, low: int) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) < low:
        raise argparse.ArgumentTypeError(f"{text} must be an integer of at least {low}")
    return int(text)
