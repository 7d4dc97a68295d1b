"""The worked example of attention: scores, mask, weights, and the mean of the values."""

import numpy as np

from nanovllm.cli.svg import picture, text
from nanovllm.learn.steps.step04_attention.solution import (
    attention,
    attention_weights,
    causal_mask,
)

_QUERIES = np.array([[[1, 0], [0, 2], [1, 1]]], dtype=np.float32)
_KEYS = np.array([[[1, 0], [0, 1], [1, 1]]], dtype=np.float32)
_VALUES = np.array([[[1, 0], [0, 1], [4, 4]]], dtype=np.float32)
_CELL, _TOP = 48, 92


def draw() -> str:
    """Return the picture."""
    scores = (_QUERIES @ _KEYS.transpose(0, 2, 1))[0] / np.sqrt(np.float32(2))
    masked = np.where(causal_mask(3, 3), -np.inf, scores)
    weights = attention_weights(_QUERIES, _KEYS)[0]
    output = attention(_QUERIES, _KEYS, _VALUES)[0]
    parts = _table(20, "scores / sqrt(2)", scores, shades=scores / 2)
    parts += _table(200, "a later key: -inf", masked, shades=np.where(masked < 0, 0, scores / 2))
    parts += _table(380, "weights: rows sum to 1", weights, shades=weights)
    parts += _table(575, "mean of the values", output, shades=np.zeros_like(output))
    parts += [
        text(x, _TOP + 1.5 * _CELL + 6, sign, "strong", "middle")
        for x, sign in ((182, "\u2192"), (362, "\u2192"), (550, "\u2192"))
    ]
    note = "A row is a query, a column a key. Row 2 of the weights: 0.196 and 0.804, nothing later."
    return picture("Attention of three tokens", 720, 290, [*parts, text(16, 272, note, "note")])


def _table(x: float, title: str, rows: np.ndarray, shades: np.ndarray) -> list[str]:
    """Return a table of numbers; a darker cell has a larger shade."""
    parts = [text(x, _TOP - 16, title, "strong")]
    for at, row in enumerate(rows.tolist()):
        for column, value in enumerate(row):
            left, top = x + column * _CELL, _TOP + at * _CELL
            opacity = 0.06 + 0.5 * float(shades[at, column])
            parts.append(
                f'<rect class="bar ours" x="{left}" y="{top}" width="{_CELL - 3}" '
                f'height="{_CELL - 3}" opacity="{opacity:.2f}"/>'
            )
            shown = "-inf" if value == -np.inf else f"{value:.3g}"
            parts.append(text(left + _CELL / 2 - 1, top + _CELL / 2 + 4, shown, "value", "middle"))
    return parts
