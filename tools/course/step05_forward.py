"""A block between embedding and head, and gelu as a curve."""

import numpy as np

from nanovllm.cli.svg import picture, text
from nanovllm.learn.steps.step05_forward.solution import gelu

_STREAM = 96  # y of the residual stream


def draw() -> str:
    """Return the picture."""
    parts = [
        f'<path class="ours" d="M108 {_STREAM}H492"/>',
        '<rect class="bar" x="124" y="66" width="350" height="196" rx="8" opacity="0.18"/>',
        text(134, 56, "one block; GPT-2 has 12 in a row", "note"),
        *_box(20, _STREAM - 24, 88, "token +", "position"),
        *_branch(150, "attention", "between tokens"),
        *_branch(318, "feed-forward", "each token alone"),
        *_box(492, _STREAM - 24, 84, "layer norm", "final"),
        f'<path class="ours" d="M576 {_STREAM}H604"/>',
        *_box(604, _STREAM - 24, 96, "head", "logits"),
        text(20, 290, "The blue line is the residual stream, a row for each token.", "note"),
        text(20, 308, "Blocks read it through a layer norm and add to it.", "note"),
        *_curve(500, 160),
    ]
    return picture("From tokens to logits", 720, 324, parts)


def _branch(x: float, name: str, note: str) -> list[str]:
    """Return a way out of the stream, through two boxes, and back by an addition."""
    plus = x + 132
    cross = f"M{plus - 5} {_STREAM}H{plus + 5}M{plus} {_STREAM - 5}V{_STREAM + 5}"
    return [
        f'<path d="M{x + 20} {_STREAM}V128M{x + 20} 164V192M{x + 108} 216H{plus}V{_STREAM + 12}"/>',
        *_box(x - 10, 128, 108, "layer norm", None),
        *_box(x - 10, 192, 118, name, note),
        f'<circle class="bar ours" cx="{plus}" cy="{_STREAM}" r="11"/>',
        f'<path d="{cross}" style="stroke:#ffffff"/>',
    ]


def _box(x: float, y: float, width: float, name: str, note: str | None) -> list[str]:
    """Return a box with one or two lines of text."""
    height, middle = 48 if note else 36, x + width / 2
    size = f'width="{width}" height="{height}" rx="5" opacity="0.28"'
    parts = [
        f'<rect class="bar ours" x="{x}" y="{y}" {size}/>',
        text(middle, y + (20 if note else 22), name, "strong", "middle"),
    ]
    return [*parts, text(middle, y + 38, note, "note", "middle")] if note else parts


def _curve(left: float, top: float) -> list[str]:
    """Return gelu from -4 to 4 in a square of 25 pixels a unit, with its axes."""
    unit, zero_x, zero_y = 23, left + 106, top + 106
    values = np.linspace(-4, 4, 81, dtype=np.float32)
    points = " ".join(
        f"{zero_x + unit * x:.1f} {zero_y - unit * y:.1f}"
        for x, y in zip(values.tolist(), gelu(values).tolist(), strict=True)
    )
    ticks = [
        text(zero_x + unit * x, zero_y + 16, str(x), "note value", "middle") for x in (-3, 0, 3)
    ]
    return [
        text(left + 14, top + 18, "gelu, between the two", "strong"),
        text(left + 14, top + 34, "layers of feed-forward", "strong"),
        f'<line x1="{zero_x - 4 * unit}" y1="{zero_y}" x2="{zero_x + 4 * unit}" y2="{zero_y}"/>',
        f'<line x1="{zero_x}" y1="{zero_y}" x2="{zero_x}" y2="{top + 44}"/>',
        f'<path class="ours" d="M{points}"/>',
        *ticks,
    ]
