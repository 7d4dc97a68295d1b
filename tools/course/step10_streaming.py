"""Bytes and pieces of text as they arrive: what is released, and what waits."""

from collections.abc import Sequence

from nanovllm.cli.svg import picture, text
from nanovllm.learn.steps.step10_streaming.solution import (
    StopStrings,
    Utf8Stream,
    num_held,
    num_incomplete,
)

_BYTES = (b"caf", b"\xc3", b"\xa9 5\xe2", b"\x82\xac")
_TEXTS = ("a <", "/", "b> c", " <", "/s>")
_STOP = "</s>"
_CELL, _ROW, _TOP = 24, 34, 92


def draw() -> str:
    """Return the picture."""
    stream, stops = Utf8Stream(), StopStrings([_STOP])
    parts = [text(16, 60, "Tokens end within characters", "strong")]
    shown = [[f"{byte:02X}" for byte in data] for data in _BYTES]
    waiting = [num_incomplete(b"".join(_BYTES[: at + 1])) for at in range(len(_BYTES))]
    parts += _table(16, 262, shown, waiting, [_visible(stream.push(data)) for data in _BYTES])
    parts.append(text(370, 60, f"The stop string is {_STOP}", "strong"))
    released, waiting = [], []
    for at, piece in enumerate(_TEXTS):
        new, stop = stops.push(piece)
        released.append(_visible(new) if stop is None else "the end")
        waiting.append(len(_STOP) if stop else num_held("".join(_TEXTS[: at + 1]), [_STOP]))
    parts += _table(370, 694, [list(piece) for piece in _TEXTS], waiting, released)
    y = _TOP + len(_TEXTS) * _ROW + 24
    parts += [
        f'<rect class="bar ours" x="16" y="{y - 11}" width="14" height="14" opacity="0.45"/>',
        text(36, y, "released now"),
        f'<rect class="bar" x="136" y="{y - 11}" width="14" height="14" opacity="0.45"/>',
        text(156, y, "waits"),
    ]
    return picture("What can be shown now, and what waits", 780, y + 18, parts)


def _table(
    x: float,
    right: float,
    pieces: Sequence[Sequence[str]],
    waiting: Sequence[int],
    released: Sequence[str],
) -> list[str]:
    """Return a row for each piece: its cells, those that wait from before, what is released."""
    parts, arrived, rest = [text(right, 82, "released", "note")], 0, 0
    symbols = [symbol for piece in pieces for symbol in piece]
    for row, piece in enumerate(pieces):
        start, arrived = arrived - rest, arrived + len(piece)
        rest, top = waiting[row], _TOP + row * _ROW
        for column in range(start, arrived):
            kind = "bar" if column >= arrived - rest else "bar ours"
            left = x + column * _CELL
            parts.append(
                f'<rect class="{kind}" x="{left}" y="{top}" width="{_CELL - 2}" '
                f'height="{_ROW - 8}" opacity="0.45"/>'
            )
            symbol = _visible(symbols[column])
            parts.append(text(left + _CELL / 2 - 1, top + 18, symbol, "value", "middle"))
        parts.append(text(right, top + 18, released[row], "strong"))
    return parts


def _visible(content: str) -> str:
    """Return a text with marks for spaces; a minus for nothing."""
    return content.replace(" ", "\u2423") or "-"
