"""Four tokens at three temperatures, and the race by which one of them is drawn."""

import numpy as np

from nanovllm.cli.svg import picture, text
from nanovllm.learn.steps.step02_logits.solution import softmax
from nanovllm.learn.steps.step06_sampling.solution import draw as draw_token
from nanovllm.learn.steps.step06_sampling.solution import filter_top_p

_LOGITS = np.log(np.array([1, 4, 2, 1], dtype=np.float32) / 8)
_NOISE = np.array([0.1, 1.2, 0.5, 0.7])  # that of the page
_TOP, _HEIGHT, _BAR = 196, 130.0, 40  # pixels: the line of 0, a probability of 1, a bar
_LEFT = 30
_START, _SPEED, _LINE = 270, 60, 30  # pixels: the time 0, a time of 1, a token of the race


def draw() -> str:
    """Return the picture."""
    parts = []
    for index, temperature in enumerate((0.5, 1.0, 2.0)):
        x = _LEFT + 225 * index
        chances = softmax(_LOGITS[None] / np.float32(temperature))[0]
        parts += [text(x, 62, f"temperature {temperature:g}", "strong"), *_bars(x, chances)]
    parts += _race(264, "draw: the smallest noise / probability wins", _LOGITS)
    title = "after top-p 0.6, only tokens 1 and 2 are left"
    parts += _race(434, title, filter_top_p(_LOGITS, 0.6))
    return picture("Sampling from four tokens", 710, 500, parts)


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


def _race(y: float, title: str, logits: np.ndarray) -> list[str]:
    """Return the time of each token as a bar; the winner's is marked."""
    parts = [text(16, y - 14, title, "strong")]
    winner = draw_token(logits, _NOISE)
    for token, p in enumerate(softmax(logits[None])[0].tolist()):
        if p == 0:
            continue
        noise = float(_NOISE[token])
        width = _SPEED * noise / p
        label = f"token {token}: noise {noise:g} / {p:.3f} = {noise / p:.2f}"
        parts.append(text(_LEFT, y + 15, label, "value"))
        parts.append(
            f'<rect class="bar ours" x="{_START}" y="{y}" width="{width:.1f}" height="20" '
            f'opacity="{0.35 + 0.15 * token:.2f}"/>'
        )
        if token == winner:
            parts.append(text(_START + width + 8, y + 15, "is drawn", "strong"))
        y += _LINE
    return parts
