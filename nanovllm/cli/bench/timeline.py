"""A picture of a step as SVG: a row for each thread, with a block for each operation."""

import math
from collections.abc import Iterable, Iterator

import numpy as np

from nanovllm.cli.bench.step_times import PYTHON, StepTimes
from nanovllm.cli.svg import picture, text

_WAITING, _OTHER = "waiting", "other operations"
_COLORS = {
    "qkv": "#24478f", "out": "#54aeff", "up": "#0969da", "down": "#8db4e2", "head": "#8250df",
    "attention": "#bc4c00", "store": "#e3b341", "layer norm": "#2da44e", "quantize": "#bf3989",
    PYTHON: "#ff8182", _WAITING: "#c4cbd2",
}  # fmt: skip
_OTHER_COLOR = "#1b7c83"
# Pixels: the picture, the rows of threads, the least width of a layer, and the legend's entries.
_WIDTH, _LEFT, _RIGHT, _TOP = 960, 84, 936, 72
_ROW, _GAP, _LAYER = 34, 8, 20
_ENTRY_WIDTH, _ENTRY_HEIGHT, _ENTRIES = 230, 22, 4
_STYLE = "  path.block { stroke: none; }\n"


def draw_timeline(step: StepTimes, title: str) -> str:
    """Return the picture of a step."""
    threads = step.moments.shape[1]
    bottom = _TOP + threads * (_ROW + _GAP)
    parts = [*_axis(step, bottom), *_layer_numbers(step)]
    for thread in range(threads):
        parts += _thread(step, thread)
    entries = list(_legend(step).items())
    for number, (name, label) in enumerate(entries):
        row, column = divmod(number, _ENTRIES)
        x, y = 16 + column * _ENTRY_WIDTH, bottom + 66 + row * _ENTRY_HEIGHT
        parts += [_block(name, f"M{x} {y - 11}h12v12h-12z"), text(x + 20, y, label)]
    height = bottom + 60 + _ENTRY_HEIGHT * math.ceil(len(entries) / _ENTRIES)
    return picture(title, _WIDTH, height, parts, _STYLE)


def _axis(step: StepTimes, bottom: int) -> Iterator[str]:
    """Yield the lines and the labels of the time axis."""
    total_ms = 1e3 * step.seconds
    power = 10.0 ** math.floor(math.log10(total_ms / 10))
    tick_ms = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= total_ms / 10)
    for number in range(math.floor(total_ms / tick_ms) + 1):
        x = f"{_LEFT + number * tick_ms / total_ms * (_RIGHT - _LEFT):.1f}"
        yield f'<line x1="{x}" y1="{_TOP - 4}" x2="{x}" y2="{bottom + 2}"/>'
        yield text(float(x), bottom + 18, f"{number * tick_ms:g}", "note", "middle")
    yield text((_LEFT + _RIGHT) / 2, bottom + 36, "time in ms", "", "middle")


def _layer_numbers(step: StepTimes) -> Iterator[str]:
    """Yield the number of each layer where its first matmul begins, if layers are wide enough."""
    began = [
        min(moment for moment in phase[:, 0] if moment)
        for name, phase in zip(step.operations, step.moments, strict=True)
        if name == "qkv"
    ]
    if (_RIGHT - _LEFT) / len(began) > _LAYER:
        yield text(16, _TOP - 10, "layer", "note")
        for number, x in enumerate(_places(step, np.array(began, dtype=np.int64))):
            yield text(round(x, 1), _TOP - 10, f"{number}", "note")


def _thread(step: StepTimes, thread: int) -> Iterator[str]:
    """Yield a thread's blocks, on what it does between operations: Python, or waiting."""
    y = _TOP + thread * (_ROW + _GAP)
    yield text(16, y + 22, f"thread {thread}")
    yield _block(_WAITING if thread else PYTHON, f"M{_LEFT} {y}H{_RIGHT}v{_ROW}H{_LEFT}z")
    began, ended, left = (_places(step, moments) for moments in step.moments[:, thread].T)
    yield _block(_WAITING, _rectangles(ended, left, y))
    names = np.array(step.operations)
    for name in dict.fromkeys(step.operations):
        chosen = names == name
        yield _block(name, _rectangles(began[chosen], ended[chosen], y))


def _places(step: StepTimes, moments: np.ndarray) -> np.ndarray:
    """Return the x of moments in ns; NaN where there is none."""
    shares = (moments - step.started_ns) / (step.ended_ns - step.started_ns)
    return np.where(moments > 0, _LEFT + shares * (_RIGHT - _LEFT), np.nan)


def _rectangles(starts: Iterable[float], ends: Iterable[float], y: int) -> str:
    """Return the path of the blocks of a row; one without a width or an end is left out."""
    return "".join(
        f"M{start:.2f} {y}h{end - start:.2f}v{_ROW}h{start - end:.2f}z"
        for start, end in zip(starts, ends, strict=True)
        if end - start >= 0.01
    )


def _block(name: str, path: str) -> str:
    color = _COLORS.get(name, _OTHER_COLOR)
    return f'<path class="block" style="fill:{color}" d="{path}"><title>{name}</title></path>'


def _legend(step: StepTimes) -> dict[str, str]:
    """Return the label of each colour, with the operation's time."""
    seconds: dict[str, float] = {}
    for name, (taken_s, _) in step.by_operation().items():
        own = name if name in _COLORS else _OTHER
        seconds[own] = seconds.get(own, 0.0) + taken_s
    labels = {
        name: f"{name}: {1e3 * taken_s:.2f} ms, {taken_s / step.seconds:.0%}"
        for name, taken_s in seconds.items()
    }
    return {**labels, _WAITING: "waiting for other threads"}
