"""Three rows before and after layer normalization, as bars."""

import numpy as np

from nanovllm.cli.svg import picture, text
from nanovllm.learn.steps.step03_layer_norm.solution import layer_norm

_ROWS = np.array(
    [[1, 2, 6, 3], [40, 60, 20, 80], [-3.1, -3.0, -2.8, -3.1]],
    dtype=np.float32,
)
_WIDTH, _HEIGHT = 690, 350
_BAR, _GAP, _UNIT = 30, 14, 38.0


def draw() -> str:
    """Return the picture."""
    ones, zeros = np.ones(4, dtype=np.float32), np.zeros(4, dtype=np.float32)
    normed = layer_norm(_ROWS, ones, zeros, 1e-5)
    parts = [text(16, 58, "before", "strong"), text(16, 208, "after", "strong")]
    for index, (row, result) in enumerate(zip(_ROWS, normed, strict=True)):
        x = 90 + 205 * index
        parts += _bars(x, 118, row, float(np.abs(row).max()) / 1.3, "bar")
        parts += _bars(x, 256, result, 1.0, "bar ours")
    parts.append(
        text(16, 336, "The numbers are the columns. The scale is gone, the pattern stays.", "note")
    )
    return picture("Layer normalization of three rows", _WIDTH, _HEIGHT, parts)


def _bars(x: float, zero: float, row: np.ndarray, scale: float, kind: str) -> list[str]:
    """Return a bar for each column of a row, above or below the line of zero, and its number."""
    parts = [f'<line x1="{x - 6}" y1="{zero}" x2="{x + 168}" y2="{zero}"/>']
    for index, value in enumerate(row.tolist()):
        left, height = x + index * (_BAR + _GAP), abs(value) / scale * _UNIT
        top = zero - height if value > 0 else zero
        parts.append(
            f'<rect class="{kind}" x="{left}" y="{top:.1f}" width="{_BAR}" height="{height:.1f}"/>'
        )
        label = zero + 15 if value > 0 else zero - 6
        parts.append(text(left + _BAR / 2, label, f"{value:.2g}", "value", "middle"))
    return parts
