"""The charts of a page: losses, learning rate, gradient norm and throughput."""

from collections.abc import Sequence
from dataclasses import dataclass

from nanovllm.training.report.chart import Axis, Chart, Line, render_chart
from nanovllm.training.report.formatting import format_count, format_loss
from nanovllm.training.report.markup import Markup, element
from nanovllm.training.report.run import Run

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
        lines = [
            Line("training", training, color=1, is_minor=True),
            Line("validation", validation, mark=mark),
        ]
        panels.append((position.axis, lines))
    note = "" if best is None else "The dot marks the lowest validation loss."
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
            is_large=True,
        )
        for metric, title in (("val_loss", "Validation loss"), ("train_loss", "Training loss"))
    ]
    return _render_charts(losses, runs, names)


def has_different_tokens(runs: Sequence[Run]) -> bool:
    """Return whether the runs have a different number of tokens per byte of validation text."""
    return len({run.bits_per_byte_factor for run in runs}) > 1


def _render_charts(losses: Sequence[Chart], runs: Sequence[Run], names: Sequence[str]) -> Markup:
    """Return the charts of the losses, then those of the other metrics over steps."""
    steps, scales = _Position("step", _STEPS), [1.0] * len(runs)
    others = [
        Chart(metric, title, axis, [(_STEPS, _run_lines(runs, names, steps, metric, scales))])
        for metric, title, axis in _CHARTS
    ]
    charts = map(render_chart, [*losses, *others])
    return element("section", element("h2", "Curves"), element("div", *charts, class_="charts"))


def _run_lines(
    runs: Sequence[Run],
    names: Sequence[str],
    position: _Position,
    metric: str,
    scales: Sequence[float],
) -> list[Line]:
    """Return a metric of each run as a line, multiplied by the run's scale."""
    return [
        Line(name, _points(run, position, metric, scale), color=index)
        for index, (run, name, scale) in enumerate(zip(runs, names, scales, strict=True))
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
