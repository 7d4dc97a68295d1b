"""The worked example of step 2: hidden states, logits, probabilities, and what they cost."""

from math import log

import numpy as np

from nanovllm.cli.svg import picture, text
from nanovllm.learn.steps.step02_logits.solution import cross_entropy, embed, logits, softmax

_TOKENS = np.array([[1, 0], [0, 1], [1, 1]], dtype=np.float32)
_PLACES = np.array([[0, 0], [0.5, 0], [0, 0.5]], dtype=np.float32)
_IDS, _TARGETS = np.array([2, 0]), np.array([0, 2])
_CELL, _TOP = 52, 92
_LEFT, _BOTTOM, _SPAN, _NAT = 430, 268, 250, 48.0  # pixels of the curve: its corner, 1, and a nat


def draw() -> str:
    """Return the picture."""
    hidden = embed(_IDS, np.arange(2), _TOKENS, _PLACES)
    scores = logits(hidden, _TOKENS)
    chances = softmax(scores)
    parts = _table(16, _TOP, "hidden states", hidden, shades=hidden / 4)
    parts += _table(190, _TOP, "logits of three tokens", scores, shades=scores / 4)
    parts += _table(190, 240, "probabilities; target framed", chances, shades=chances)
    for row, target in enumerate(_TARGETS.tolist()):
        x, y = 190 + target * _CELL, 240 + row * _CELL
        frame = f"M{x} {y}h{_CELL - 3}v{_CELL - 3}h{3 - _CELL}z"
        parts.append(f'<path d="{frame}"/>')
    loss = cross_entropy(scores, _TARGETS)
    parts += [text(16, 262, "token 2, then 0", "note"), text(16, 282, "targets: 0, then 2", "note")]
    parts += _curve([float(chances[row, target]) for row, target in enumerate(_TARGETS)])
    parts.append(text(_LEFT, 320, f"loss: the mean of both, {loss:.3f} nats", "strong"))
    return picture("From hidden states to the loss", 720, 366, parts)


def _table(x: float, y: float, title: str, rows: np.ndarray, shades: np.ndarray) -> list[str]:
    """Return a table of numbers; a darker cell has a larger shade."""
    parts = [text(x, y - 12, title, "strong")]
    for at, row in enumerate(rows.tolist()):
        for column, value in enumerate(row):
            left, top = x + column * _CELL, y + at * _CELL
            opacity = 0.06 + 0.6 * float(shades[at, column])
            parts.append(
                f'<rect class="bar ours" x="{left}" y="{top}" width="{_CELL - 3}" '
                f'height="{_CELL - 3}" opacity="{opacity:.2f}"/>'
            )
            middle = left + _CELL / 2 - 1.5
            parts.append(text(middle, top + _CELL / 2 + 3, f"{value:.3g}", "value", "middle"))
    return parts


def _curve(chances: list[float]) -> list[str]:
    """Return the curve of -log p, with a point for each of these probabilities."""
    steps = [at / 100 for at in range(3, 101)]
    line = " ".join(f"{_LEFT + _SPAN * p:.1f},{_BOTTOM + _NAT * log(p):.1f}" for p in steps)
    parts = [
        text(_LEFT, _TOP - 12, "cost of a target: -log p", "strong"),
        f'<line x1="{_LEFT}" y1="{_BOTTOM}" x2="{_LEFT + _SPAN}" y2="{_BOTTOM}"/>',
        f'<line x1="{_LEFT}" y1="{_BOTTOM}" x2="{_LEFT}" y2="{_TOP}"/>',
        f'<path class="ours" d="M{line}"/>',
        text(_LEFT, _BOTTOM + 18, "p = 0", "note", "middle"),
        text(_LEFT + _SPAN, _BOTTOM + 18, "p = 1", "note", "middle"),
    ]
    for p in chances:
        x, y = _LEFT + _SPAN * p, _BOTTOM + _NAT * log(p)
        parts.append(f'<circle class="bar" cx="{x:.1f}" cy="{y:.1f}" r="5"/>')
        parts.append(text(x + 10, y - 6, f"p = {p:.3f} costs {-log(p):.3f}", "value"))
    return parts
