"""Four tokens at three temperatures, and the ruler on which one of them is drawn."""

import numpy as np

from nanovllm.learn.steps.step02_logits.solution import softmax
from nanovllm.learn.steps.step06_sampling.solution import draw as draw_token
from nanovllm.learn.steps.step06_sampling.solution import filter_top_p
from tools.svg import picture, text

_LOGITS = np.log(np.array([1, 4, 2, 1], dtype=np.float32) / 8)
_NUMBERS = (0.05, 0.3, 0.7, 0.9)
_TOP, _HEIGHT, _BAR = 196, 130.0, 40  # pixels: the line of 0, a probability of 1, a bar
_LEFT, _RULER = 30, 640


def draw() -> str:
    """Return the picture."""
    parts = []
    for index, temperature in enumerate((0.5, 1.0, 2.0)):
        x = _LEFT + 225 * index
        chances = softmax(_LOGITS[None] / np.float32(temperature))[0]
        parts += [text(x, 62, f"temperature {temperature:g}", "strong"), *_bars(x, chances)]
    parts += _ruler(276, "draw: a random number hits a token", _LOGITS)
    parts += _ruler(384, "after top-p 0.6 only tokens 1 and 2 are left", filter_top_p(_LOGITS, 0.6))
    note = (
        "The marks are the random numbers 0.05, 0.3, 0.7 and 0.9, with the token that each draws."
    )
    return picture("Sampling from four tokens", 710, 478, [*parts, text(16, 464, note, "note")])


def _bars(x: float, chances: np.ndarray) -> list[str]:
    """Return a bar for each token, with its probability and its id."""
    parts = [f'<line x1="{x}" y1="{_TOP}" x2="{x + 196}" y2="{_TOP}"/>']
    for token, p in enumerate(chances.tolist()):
        left, height = x + 8 + 46 * token, _HEIGHT * p
        parts.append(
            f'<rect class="bar ours" x="{left}" y="{_TOP - height:.1f}" width="{_BAR}" '
            f'height="{height:.1f}" opacity="{0.35 + 0.15 * token:.2f}"/>'
        )
        parts += [
            text(left + _BAR / 2, _TOP - height - 6, f"{p:.3f}", "value", "middle"),
            text(left + _BAR / 2, _TOP + 16, f"{token}", "note", "middle"),
        ]
    return parts


def _ruler(y: float, title: str, logits: np.ndarray) -> list[str]:
    """Return the probabilities side by side, and the tokens that some numbers draw."""
    parts = [text(16, y - 26, title, "strong")]
    start = 0.0
    for token, p in enumerate(softmax(logits[None])[0].tolist()):
        if p == 0:
            continue
        x, width = _LEFT + _RULER * start, _RULER * p
        parts.append(
            f'<rect class="bar ours" x="{x:.1f}" y="{y}" width="{width - 2:.1f}" height="30" '
            f'opacity="{0.35 + 0.15 * token:.2f}"/>'
        )
        parts.append(text(x + 8, y + 19, f"token {token}", "value"))
        start += p
    for number in _NUMBERS:
        x = _LEFT + _RULER * number
        parts.append(f'<path d="M{x:.1f} {y + 26}v12"/>')
        label = f"{number} draws {draw_token(logits, number)}"
        parts.append(text(x, y + 52, label, "note", "middle"))
    return parts
