"""Tables on standard output, and the figures of JSON objects."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows in aligned columns, two spaces apart; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())


def print_rows(rows: Mapping[str, str], width: int | None = None, indent: str = "") -> None:
    """Print labels and values, which begin after `width` columns and a space.

    By default they begin two columns after the longest label. An empty value is left out.
    """
    columns = max(map(len, rows)) + 1 if width is None else width
    for label, value in rows.items():
        if value:
            print(f"{indent}{label:{columns}} {value}")


def finite_or_null(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures, None for one that is not finite: JSON has neither NaN nor infinity."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in figures.items()
    }
