"""Draw docs/images/training-loss.svg from the results of nanogpt.py.

Run: python tools/loss_chart.py nanogpt.json
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.contenders import OURS, ROOT
from nanovllm.cli.svg import picture, text

Scale: TypeAlias = tuple[float, float]  # the values at both ends of an axis

CHART = ROOT / "docs" / "images" / "training-loss.svg"
TITLE = "Training on tinyshakespeare: loss by step, lower is better"
# Pixels: the picture, and the plot within it.
_WIDTH, HEIGHT = 720, 420
_LEFT, _TOP, RIGHT, _BOTTOM = 64, 60, 700, 364
_LOSSES = {"val_loss": "validation", "train_loss": "training"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the chart into a file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, help="results of nanogpt.py, written with --json")
    parser.add_argument("--output", type=Path, default=CHART, metavar="FILE")
    parsed = parser.parse_args(arguments)
    record = json.loads(parsed.file.read_text(encoding="utf-8"))
    parsed.output.write_text(draw(record["runs"]), encoding="utf-8")
    print(parsed.output)
    return 0


def draw(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return the chart of runs, each a sequence of evaluations, as SVG."""
    lines = {
        (name, loss): [(one["step"], one[loss]) for one in run if one[loss] is not None]
        for name, run in runs.items()
        for loss in _LOSSES
    }
    steps, values = zip(*(point for line in lines.values() for point in line), strict=True)
    x_scale = (0.0, float(max(steps)))
    margin = 0.05 * (max(values) - min(values))
    y_scale = (min(values) - margin, max(values) + margin)
    parts = [*axes(x_scale, y_scale)]
    for number, ((name, loss), points) in enumerate(lines.items()):
        kind = f"{'ours' if name == OURS else 'peer'} {_LOSSES[loss]}"
        path = "L".join(f"{x_of(x_scale, step)} {y_of(y_scale, value)}" for step, value in points)
        parts.append(f'<path class="{kind}" d="M{path}"/>')
        top = _TOP + 16 + 20 * number
        parts.append(f'<path class="{kind}" d="M{RIGHT - 230} {top - 4}h28"/>')
        label = f"{name}, {_LOSSES[loss]}: {points[-1][1]:.3f}"
        parts.append(text(RIGHT - 194, top, label, "value"))
    return picture(TITLE, _WIDTH, HEIGHT, parts)


def axes(x_scale: Scale, y_scale: Scale) -> list[str]:
    """Return titles, ticks and grid lines."""
    parts = [
        text((_LEFT + RIGHT) / 2, _BOTTOM + 40, "step", anchor="middle"),
        text(_LEFT - 40, _TOP - 10, "loss in nats per character"),
    ]
    parts += [
        text(x_of(x_scale, tick), _BOTTOM + 20, f"{tick:g}", "note", "middle")
        for tick in _ticks(*x_scale, 5)
    ]
    for tick in _ticks(*y_scale, 6):
        y, label = y_of(y_scale, tick), f"{tick:g}"
        parts.append(f'<line x1="{_LEFT}" y1="{y}" x2="{RIGHT}" y2="{y}"/>')
        parts.append(text(_LEFT - 8, y + 4, label, "note", "end"))
    return parts


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Return about `count` round values from `low` to `high`."""
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    steps = (power * nice for nice in (1, 2, 2.5, 5, 10))
    step = next(one for one in steps if one >= (high - low) / count)
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def x_of(scale: Scale, step: float) -> float:
    return round(_LEFT + _fraction(scale, step) * (RIGHT - _LEFT), 1)


def y_of(scale: Scale, value: float) -> float:
    return round(_BOTTOM - _fraction(scale, value) * (_BOTTOM - _TOP), 1)


def _fraction(scale: Scale, value: float) -> float:
    low, high = scale
    return (value - low) / (high - low)


if __name__ == "__main__":
    sys.exit(main())
