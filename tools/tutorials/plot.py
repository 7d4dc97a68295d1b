"""Line charts of the tutorials, with a linear or a logarithmic axis."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from nanovllm.cli.svg import picture, text
from tools.tutorials.drawing import STYLE

Points: TypeAlias = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 700, 340  # pixels: the picture, and the plot within it
_LEFT, _TOP, _RIGHT, _BOTTOM = 60, 62, 500, 292
_ROUND_STEPS = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a chart; `kind` is its class of colour and dash."""

    label: str
    points: Points
    kind: str


def chart(title: str, y_title: str, lines: Sequence[Line], *, is_log: bool = False) -> str:
    """Return a chart of lines over the steps of a run."""
    values = [_scaled(y, is_log) for line in lines for _, y in line.points]
    margin = 0.06 * (max(values) - min(values))
    low, high = min(values) - margin, max(values) + margin
    last = max(x for line in lines for x, _ in line.points)

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + x / last * (_RIGHT - _LEFT)
        up = (_scaled(y, is_log) - low) / (high - low)
        return across, _BOTTOM - up * (_BOTTOM - _TOP)

    parts = [
        text(_LEFT - 44, _TOP - 12, y_title),
        text((_LEFT + _RIGHT) / 2, _BOTTOM + 38, "step", "", "middle"),
    ]
    for tick in _ticks(low, high, is_log):
        y = place(0, tick)[1]
        parts.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_RIGHT}" y2="{y:.1f}"/>')
        parts.append(text(_LEFT - 8, round(y + 4, 1), f"{tick:g}", "note", "end"))
    parts += [
        text(round(place(tick, 1)[0], 1), _BOTTOM + 20, f"{tick:g}", "note", "middle")
        for tick in _ticks(0, last, is_log=False)
    ]
    for number, line in enumerate(lines):
        path = "L".join("{:.1f} {:.1f}".format(*place(x, y)) for x, y in line.points)
        parts.append(f'<path class="{line.kind}" d="M{path}"/>')
        top = _TOP + 10 + 22 * number
        parts.append(f'<path class="{line.kind}" d="M{_RIGHT + 14} {top - 4}h24"/>')
        parts.append(text(_RIGHT + 44, top, line.label))
    return picture(title, _WIDTH, _HEIGHT, parts, STYLE)


def _scaled(value: float, is_log: bool) -> float:
    return math.log10(value) if is_log else value


def _ticks(low: float, high: float, is_log: bool) -> list[float]:
    """Return round values between the bounds, which are logarithms if `is_log`."""
    if is_log:
        powers = range(math.floor(low), math.ceil(high) + 1)
        values = [factor * 10.0**power for power in powers for factor in (1, 3)]
        return [value for value in values if low <= math.log10(value) <= high]
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(one * power for one in _ROUND_STEPS if one * power >= (high - low) / 5)
    return [step * index for index in range(math.ceil(low / step), math.floor(high / step) + 1)]
