"""A tile of the matmul, and the speed of each version as it was measured for the page."""

import math
from collections.abc import Callable

from nanovllm.cli.svg import picture, text
from nanovllm.learn.steps.step12_fast.solution import TILE_COLUMNS, TILE_ROWS

MEASURED = {
    "plain": 0.006,
    "numba": 0.54,
    "reordered": 28.3,
    "tiled": 71.8,
    "parallel": 138,
    "@, one core": 90.6,
}
"""10^9 operations a second with 192 tokens, by `python step12_fast.py`, as on the page."""
_CELL, _STEPS, _ROWS, _COLUMNS = 18, 7, 5, 6
_LEFT, _TOP = 44, 196  # corner of the rows; the columns are above the result
_OUT = _LEFT + _STEPS * _CELL + 22
_CHART, _BAR, _DECADE = 420, 34, 60


def draw() -> str:
    """Return the picture."""
    columns_top = _TOP - 22 - _STEPS * _CELL
    parts = [
        text(_LEFT, _TOP - 12, "rows", "strong"),
        text(_OUT - 14, columns_top + 14, "columns of the weight", "strong", "end"),
        text(_OUT, _TOP + _ROWS * _CELL + 18, "result", "strong"),
        *_cells(_LEFT, _TOP, _ROWS, _STEPS, lambda row, step: row < TILE_ROWS, 3),
        *_cells(_OUT, columns_top, _STEPS, _COLUMNS, lambda step, at: at < TILE_COLUMNS, 3, 0),
        *_cells(_OUT, _TOP, _ROWS, _COLUMNS, lambda row, at: row < TILE_ROWS and at < TILE_COLUMNS),
        text(_LEFT, 330, "At each k (dark) 6 numbers are read, and 8 sums grow.", "note"),
        *_chart(),
    ]
    return picture("A tile of 2 rows and 4 columns, and what it gives", 800, 352, parts)


def _cells(
    x: float,
    y: float,
    rows: int,
    columns: int,
    is_used: Callable[[int, int], bool],
    dark: int | None = None,
    axis: int = 1,
) -> list[str]:
    """Return cells; `dark` is the index along an axis of those that are read now."""
    parts = []
    for row in range(rows):
        for column in range(columns):
            used = is_used(row, column)
            is_dark = used and (row, column)[axis] == dark
            opacity = 0.9 if is_dark else 0.4 if used else 0.25
            parts.append(
                f'<rect class="{"bar ours" if used else "bar"}" x="{x + column * _CELL}" '
                f'y="{y + row * _CELL}" width="{_CELL - 2}" height="{_CELL - 2}" '
                f'opacity="{opacity}"/>'
            )
    return parts


def _chart() -> list[str]:
    """Return bars on a logarithmic scale from 0.001 on."""
    parts = [text(_CHART, 58, "10^9 operations a second, 192 tokens", "strong")]
    bottom = 80 + len(MEASURED) * _BAR
    for power in range(-3, 3):
        x = _CHART + (power + 3) * _DECADE
        parts.append(f'<line x1="{x}" y1="66" x2="{x}" y2="{bottom - 12}" stroke-width="0.6"/>')
        parts.append(text(x, bottom + 6, f"{10.0**power:g}", "note", "middle"))
    for at, (name, value) in enumerate(MEASURED.items()):
        y = 80 + at * _BAR
        length = round((math.log10(value) + 3) * _DECADE, 1)
        kind = "bar" if name.startswith("@") else "bar ours"
        parts += [
            f'<rect class="{kind}" x="{_CHART}" y="{y}" width="{length}" height="12"/>',
            text(_CHART, y - 4, name),
            text(_CHART + length + 6, y + 10, f"{value:g}", "value"),
        ]
    return parts
