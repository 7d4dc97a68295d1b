"""Tables on standard output."""

from collections.abc import Mapping, Sequence


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
