"""The charts of a page: losses, learning rate, gradient norm and throughput."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from nanovllm.training.report.chart import MAX_MARKERS, Axis, Chart, Line, render_chart
from nanovllm.training.report.formatting import format_count, format_loss, format_number
from nanovllm.training.report.markup import Markup, element
from nanovllm.training.report.run import Run

_MEAN_NOTE = (
    "The training loss of an evaluation is the mean over the steps since the evaluation before, "
    "so it lags behind the loss of the current weights."
)
_SMOOTH_NOTE = "A point is the mean of up to a hundredth of the run's steps."
_SMOOTH_POINTS = 100
_UPDATE_METRICS = ("train_loss", "lr", "grad_norm")
_MAX_PEAK_RATIO = 50.0  # to the median run's, of a learning rate that is drawn
_STEPS = Axis("step", is_whole=True, from_zero=True)
_CHARTS = (
    ("lr", "Learning rate", Axis("learning rate", from_zero=True)),
    (
        "grad_norm",
        "Gradient norm",
        Axis("L2 norm before clipping", from_zero=True, may_be_log=True),
    ),
    ("tokens_per_s", "Throughput", Axis("tokens per second", from_zero=True)),
)


@dataclass(frozen=True, slots=True)
class _Position:
    """What an x axis shows: a metric, divided by `unit`."""

    metric: str
    axis: Axis
    unit: float = 1.0


def render_run_curves(run: Run) -> Markup:
    """Return the charts of one run: both losses in one chart, then the others."""
    best = run.best if run.best in run.evaluations else None
    panels = []
    for position in _positions([run]):
        mark = None
        x = None if best is None else getattr(best, position.metric)
        if best is not None and best.val_loss is not None and x is not None:
            label = f"best: {format_loss(best.val_loss)} at step {format_count(best.step)}"
            mark = (x / position.unit, best.val_loss, label)
        training = _points(run, position, "train_loss")
        validation = _points(run, position, "val_loss")
        is_line = not run.updates or len(training) > MAX_MARKERS
        mean = "training, mean since the last evaluation"
        lines = [
            Line("training, one step", _update_points(run, position, "train_loss"), 1, True),
            Line(mean, training, color=1, has_line=is_line, has_markers=True),
            Line("validation", validation, has_markers=True, mark=mark),
        ]
        panels.append((position.axis, lines))
    note = (
        _MEAN_NOTE if best is None else f"{_MEAN_NOTE} The large dot is the lowest validation loss."
    )
    axis = Axis("nats per token", may_be_log=True)
    loss = Chart("loss", "Loss", axis, panels, note=note, is_large=True)
    return _render_charts([loss], [run], [run.name])


def render_compared_curves(runs: Sequence[Run], names: Sequence[str]) -> Markup:
    """Return the charts of several runs, one line a run in each.

    Losses of different tokenizers are shown in bits per byte.
    """
    scales, unit = [1.0] * len(runs), "nats per token"
    factors = [factor for run in runs if (factor := run.bits_per_byte_factor) is not None]
    if has_different_tokens(runs) and len(factors) == len(runs):
        scales, unit = factors, "bits per byte"
    losses = [
        Chart(
            metric,
            title,
            Axis(unit, may_be_log=True),
            [
                (position.axis, _run_lines(runs, names, position, metric, scales))
                for position in _positions(runs)
            ],
            note=note,
            is_large=True,
        )
        for metric, title, note in (
            ("val_loss", "Validation loss", ""),
            ("train_loss", "Training loss", _SMOOTH_NOTE),
        )
    ]
    return _render_charts(losses, runs, names)


def has_different_tokens(runs: Sequence[Run]) -> bool:
    """Return whether the runs have a different number of tokens per byte of validation text."""
    return len({run.bits_per_byte_factor for run in runs}) > 1


def _render_charts(losses: Sequence[Chart], runs: Sequence[Run], names: Sequence[str]) -> Markup:
    """Return the charts of the losses, then those of the other metrics over steps."""
    steps, scales = _Position("step", _STEPS), [1.0] * len(runs)
    others = []
    for metric, title, axis in _CHARTS:
        lines, note = _run_lines(runs, names, steps, metric, scales), ""
        if metric == "lr":
            lines, note = _without_outliers(lines)
        others.append(Chart(metric, title, axis, [(_STEPS, lines)], note=note))
    charts = map(render_chart, [*losses, *others])
    return element("section", element("h2", "Curves"), element("div", *charts, class_="charts"))


def _run_lines(
    runs: Sequence[Run],
    names: Sequence[str],
    position: _Position,
    metric: str,
    scales: Sequence[float],
) -> list[Line]:
    """Return a metric of each run as a line, multiplied by the run's scale.

    The values are those of steps.jsonl, where it has them, or of the evaluations.
    """
    lines = []
    for index, (run, name, scale) in enumerate(zip(runs, names, scales, strict=True)):
        points = _update_points(run, position, metric, scale)
        if metric == "train_loss":
            points = _smooth(points)
        evaluations = _points(run, position, metric, scale)
        lines.append(Line(name, points or evaluations, color=index, has_markers=not points))
    return lines


def _without_outliers(lines: Sequence[Line]) -> tuple[list[Line], str]:
    """Return the lines without those that would flatten the others, and a note that names them."""
    peaks = [max((y for _, y in line.points if y is not None), default=0.0) for line in lines]
    known = sorted(peak for peak in peaks if peak > 0)
    limit = known[(len(known) - 1) // 2] * _MAX_PEAK_RATIO if known else math.inf
    named = [
        f"{line.name} (up to {format_number(peak)})"
        for line, peak in zip(lines, peaks, strict=True)
        if peak > limit
    ]
    kept = [line for line, peak in zip(lines, peaks, strict=True) if peak <= limit]
    return kept, f"Not drawn, far above the others: {', '.join(named)}." if named else ""


def _smooth(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """Return the means of at most `_SMOOTH_POINTS` groups of consecutive points."""
    known = [(x, y) for x, y in points if y is not None]
    size = math.ceil(len(known) / _SMOOTH_POINTS)
    groups = [known[first : first + size] for first in range(0, len(known), max(1, size))]
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
        for group in groups
    ]


def _positions(runs: Sequence[Run]) -> tuple[_Position, ...]:
    """Return the x axes of the losses: steps, tokens and time."""
    longest_s = max(run.last("elapsed_s") or 0.0 for run in runs)
    unit_s, unit = 1.0, "seconds"
    if longest_s >= 180:
        unit_s, unit = (60.0, "minutes") if longest_s < 3 * 3600 else (3600.0, "hours")
    return (
        _Position("step", _STEPS),
        _Position("tokens", Axis("tokens", is_whole=True, from_zero=True)),
        _Position("elapsed_s", Axis(f"time ({unit})", from_zero=True), unit_s),
    )


def _points(
    run: Run, position: _Position, metric: str, scale: float = 1.0
) -> list[tuple[float, float | None]]:
    """Return a metric over another; an evaluation without an x is left out."""
    pairs = ((getattr(one, position.metric), getattr(one, metric)) for one in run.evaluations)
    return [
        (x / position.unit, None if y is None else y * scale) for x, y in pairs if x is not None
    ]


def _update_points(
    run: Run, position: _Position, metric: str, scale: float = 1.0
) -> list[tuple[float, float | None]]:
    """Return a metric of steps.jsonl; tokens and time are interpolated between evaluations."""
    if metric not in _UPDATE_METRICS:
        return []
    values = ((one.step, getattr(one, metric)) for one in run.updates)
    pairs: list[tuple[float, float | None]] = [
        (step, None if y is None else y * scale) for step, y in values
    ]
    if position.metric == "step":
        return pairs
    knots = [
        (one.step, x / position.unit)
        for one in run.evaluations
        if (x := getattr(one, position.metric)) is not None
    ]
    steps = [step for step, _ in knots]
    points: list[tuple[float, float | None]] = []
    for step, y in pairs:
        after = bisect_left(steps, step)
        if after == len(knots) or (after == 0 and steps[0] != step):
            continue  # no evaluation before or after it
        (low, first), (high, last) = knots[max(0, after - 1)], knots[after]
        part = (step - low) / (high - low) if high > low else 0.0
        points.append((first + part * (last - first), y))
    return points
