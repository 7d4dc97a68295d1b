"""Values of command-line options and of the files they name, checked."""

import argparse
import math
from pathlib import Path

from nanovllm.errors import printable

_LINE_CHARACTERS = 2000  # of a message, more than any of ours has


def positive(text: str) -> int:
    """An option's value that must be a whole number of at least 1."""
    return _whole(text, 1)


def not_negative(text: str) -> int:
    """An option's value that must be a whole number of at least 0."""
    return _whole(text, 0)


def positive_number(text: str) -> float:
    """An option's value that must be a number above 0; `inf` is one."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text} must be a number above 0")
    return number


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, each with its number; raises ValueError where it is not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from error
    return [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def printable_lines(text: str) -> str:
    """`text` as it may be shown on a terminal, whoever wrote parts of it; its line breaks stay."""
    return "\n".join(printable(line, _LINE_CHARACTERS) for line in text.split("\n"))


def _whole(text: str, low: int) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) < low:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number of at least {low}")
    return int(text)
