"""The charts of a page: losses, learning rate, gradient norm and throughput."""

from collections.abc import Callable, Sequence
from functools import partial

from nanovllm.training.report.chart import Axis, Chart, Line, render_chart
from nanovllm.training.report.formatting import format_count, format_loss
from nanovllm.training.report.markup import Markup, element
from nanovllm.training.report.run import Evaluation, Run

_LOSS = Axis("nats per token", may_be_log=True)
_STEPS = Axis("step", from_zero=True)
_CHARTS = (
    ("lr", "Learning rate", Axis("learning rate", from_zero=True)),
    (
        "grad_norm",
        "Gradient norm",
        Axis("L2 norm before clipping", from_zero=True, may_be_log=True),
    ),
    ("tokens_per_s", "Throughput", Axis("tokens per second", from_zero=True)),
)


def render_run_curves(run: Run) -> Markup:
    """Return the charts of one run: both losses in one chart, then the others."""

    def loss_lines(x_name: str, unit: float) -> list[Line]:
        best = run.best
        mark = None
        if best is not None and best in run.evaluations and best.val_loss is not None:
            x = getattr(best, x_name)
            label = f"best: {format_loss(best.val_loss)} at step {format_count(best.step)}"
            mark = None if x is None else (x / unit, best.val_loss, label)
        return [
            Line("training", _points(run, x_name, "train_loss", unit), color=1, is_minor=True),
            Line("validation", _points(run, x_name, "val_loss", unit), mark=mark),
        ]

    note = ""
    if run.best is not None and run.best in run.evaluations:
        note = "The dot marks the lowest validation loss."
    loss = Chart("loss", "Loss", _LOSS, _loss_panels([run], loss_lines), note=note, is_large=True)
    others = [
        Chart(name, title, axis, [(_STEPS, [Line(title.lower(), _points(run, "step", name))])])
        for name, title, axis in _CHARTS
    ]
    return _render_grid([loss, *others])


def render_compared_curves(runs: Sequence[Run], names: Sequence[str]) -> Markup:
    """Return the charts of several runs, one line a run in each."""

    def lines(metric: str, x_name: str, unit: float = 1.0) -> list[Line]:
        return [
            Line(name, _points(run, x_name, metric, unit), color=index)
            for index, (run, name) in enumerate(zip(runs, names, strict=True))
        ]

    losses = [
        Chart(
            name,
            title,
            _LOSS,
            _loss_panels(runs, partial(lines, name)),
            is_large=True,
        )
        for name, title in (("val_loss", "Validation loss"), ("train_loss", "Training loss"))
    ]
    others = [
        Chart(name, title, axis, [(_STEPS, lines(name, "step"))]) for name, title, axis in _CHARTS
    ]
    return _render_grid([*losses, *others])


def _render_grid(charts: Sequence[Chart]) -> Markup:
    return element(
        "section",
        element("h2", "Curves"),
        element("div", *map(render_chart, charts), class_="charts"),
    )


def _loss_panels(
    runs: Sequence[Run], lines: Callable[[str, float], list[Line]]
) -> list[tuple[Axis, list[Line]]]:
    """Return the loss over steps, over tokens and over time."""
    longest_s = max((run.last("elapsed_s") or 0.0 for run in runs), default=0.0)
    unit_s, unit = 1.0, "seconds"
    if longest_s >= 180:
        unit_s, unit = (60.0, "minutes") if longest_s < 3 * 3600 else (3600.0, "hours")
    axes = (
        ("step", 1.0, _STEPS),
        ("tokens", 1.0, Axis("tokens", from_zero=True)),
        ("elapsed_s", unit_s, Axis(f"time ({unit})", from_zero=True)),
    )
    return [(axis, lines(x_name, unit_x)) for x_name, unit_x, axis in axes]


def _points(
    run: Run, x_name: str, y_name: str, unit: float = 1.0
) -> list[tuple[float, float | None]]:
    """Return a metric over another; an evaluation without an x is left out."""

    def point(one: Evaluation) -> tuple[float | None, float | None]:
        return getattr(one, x_name), getattr(one, y_name)

    return [(x / unit, y) for x, y in map(point, run.evaluations) if x is not None]
