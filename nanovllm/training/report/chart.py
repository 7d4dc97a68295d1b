"""A line chart as HTML and SVG that fits any width.

The lines are drawn in a view box that is stretched to the width of the page, with strokes that keep
their width. The labels of the axes are in SVG elements without a view box and positioned by
percentages, so that text keeps its size and proportions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nanovllm.training.report.formatting import format_number, format_ticks
from nanovllm.training.report.markup import Markup, element, join
from nanovllm.training.report.scales import Scale, downsample, fit_scale

NUM_COLORS = 8
_NUM_DASHES = 3
_WIDTH, _HEIGHT = 1000, 500  # of the view box
_X_TICKS, _Y_TICKS = 5, 5
_MAX_POINTS_PER_LINE = 400
_MIN_POINTS_PER_LINE = 60
_MAX_POINTS_PER_CHART = 4000
MAX_MARKERS = 60


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart: points (x, y) by rising x; a y of None leaves a gap.

    `color` is an index; after `NUM_COLORS` they repeat with another dash. A `is_minor` line is
    thin and pale. `has_markers` draws the points as dots, if they are few; `has_line` draws lines
    between them. `mark` is a point to emphasize, with its label.
    """

    name: str
    points: Sequence[tuple[float, float | None]]
    color: int = 0
    is_minor: bool = False
    has_line: bool = True
    has_markers: bool = False
    mark: tuple[float, float, str] | None = None

    @property
    def is_dotted(self) -> bool:
        """Return whether each point is a dot."""
        return not self.has_line or (self.has_markers and len(self.points) <= MAX_MARKERS)

    @property
    def style(self) -> str:
        """Return the CSS classes of the line and of its key in the legend."""
        dash = self.color // NUM_COLORS % _NUM_DASHES
        minor = " minor" if self.is_minor else ""
        return f"line color-{self.color % NUM_COLORS} dash-{dash}{minor}"


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis: its title with the unit, and how its scale is chosen (see `fit_scale`).

    `is_whole` is for counts: their ticks are integers.
    """

    title: str
    is_whole: bool = False
    from_zero: bool = False
    may_be_log: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart of lines. The same lines may be shown over several x axes, one at a time.

    `name` is unique in the page.
    """

    name: str
    title: str
    y_axis: Axis
    panels: Sequence[tuple[Axis, Sequence[Line]]]
    note: str = ""
    is_large: bool = False


def render_chart(chart: Chart) -> Markup:
    """Return the chart as a <figure>."""
    panels = [(axis, _with_values(lines)) for axis, lines in chart.panels]
    panels = [(axis, lines) for axis, lines in panels if lines]
    head = [element("h3", chart.title)]
    if not panels:
        empty = element("p", "No values yet.", class_="empty")
        return element("figure", *head, empty, class_="card chart")
    y_values = [y for _, lines in panels for line in lines for _, y in line.points if y is not None]
    y_scale = fit_scale(
        y_values, from_zero=chart.y_axis.from_zero, may_be_log=chart.y_axis.may_be_log
    )
    suffix = ", logarithmic" if y_scale.is_log else ""
    head.append(element("p", chart.y_axis.title + suffix, class_="axis-title"))
    body = [
        element("div", _render_panel(chart, axis, lines, y_scale), class_=f"panel panel-{number}")
        for number, (axis, lines) in enumerate(panels)
    ]
    legend = _render_legend(panels[0][1]) if len(panels[0][1]) > 1 else ""
    size = " large" if chart.is_large else ""
    return element(
        "figure",
        *_render_switch(chart, [axis for axis, _ in panels]),
        element("figcaption", *head, legend),
        *body,
        element("p", chart.note, class_="note") if chart.note else "",
        class_=f"card chart{size}",
    )


def _with_values(lines: Sequence[Line]) -> list[Line]:
    return [line for line in lines if any(y is not None for _, y in line.points)]


def _render_switch(chart: Chart, axes: Sequence[Axis]) -> list[Markup]:
    """Return radio buttons that choose the x axis, if there are several; CSS applies them."""
    if len(axes) < 2:
        return []
    switch: list[Markup] = []
    for number, axis in enumerate(axes):
        identifier = f"{chart.name}-x-{number}"
        switch += [
            element(
                "input",
                type="radio",
                name=f"{chart.name}-x",
                id=identifier,
                class_=f"choice choice-{number}",
                checked=number == 0,
            ),
            element("label", axis.title, for_=identifier),
        ]
    return switch


def _render_legend(lines: Sequence[Line]) -> Markup:
    """Return each line's name beside a piece of it."""
    items = [
        element(
            "li",
            render_key(line),
            line.name,
        )
        for line in lines
    ]
    return element("ul", *items, class_="legend")


def render_key(line: Line) -> Markup:
    """Return the piece of a line, or the dot, that stands for it in a legend."""
    dot = element("path", d="M13 5h.01", class_=f"{line.style} single")
    return element(
        "svg",
        element("path", d="M1 5H25", class_=line.style) if line.has_line else "",
        dot if line.is_dotted else "",
        class_="key lines-key",
        aria_hidden="true",
        width=26,
        height=10,
    )


def _render_panel(chart: Chart, axis: Axis, lines: Sequence[Line], y_scale: Scale) -> Markup:
    """Return the plot over one x axis: tick labels, grid and lines."""
    x_values = [x for line in lines for x, _ in line.points]
    x_low = min([0.0, *x_values] if axis.from_zero else x_values)
    x_high = max(x_values)
    if x_low == x_high:
        x_high = x_low + 1
    x_scale = Scale(x_low, x_high)
    limit = _MAX_POINTS_PER_CHART // len(lines)
    limit = min(_MAX_POINTS_PER_LINE, max(_MIN_POINTS_PER_LINE, limit))
    x_ticks = x_scale.ticks(_X_TICKS, min_step=1.0 if axis.is_whole else 0.0)
    y_ticks = y_scale.ticks(_Y_TICKS)
    drawn = join(_render_line(line, x_scale, y_scale, limit) for line in lines)
    grid = "".join(f"M0 {_y(y_scale, tick)}H{_WIDTH}" for tick in y_ticks)
    plot = element(
        "svg",
        element("path", d=grid, class_="grid"),
        drawn,
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        preserveAspectRatio="none",
        class_="lines",
        role="img",
        aria_label=_describe(chart, axis, lines),
    )
    area = element(
        "div",
        plot,
        class_="plot",
        data_x=f"{x_low:.10g} {x_high:.10g}",
        data_y=f"{y_scale.low:.10g} {y_scale.high:.10g} {int(y_scale.is_log)}",
        data_title=axis.title,
        tabindex="0",
    )
    return element(
        "div",
        _render_labels(y_scale, y_ticks, "y-ticks"),
        area,
        _render_labels(x_scale, x_ticks, "x-ticks"),
        element("p", axis.title, class_="axis-title x-title"),
        class_="axes",
    )


def _render_labels(scale: Scale, ticks: list[float], kind: str) -> Markup:
    """Return the tick labels of one axis, positioned by percentages."""
    labels = []
    # On a logarithmic axis each label has its own unit.
    shown = [format_ticks([tick])[0] for tick in ticks] if scale.is_log else format_ticks(ticks)
    for tick, label in zip(ticks, shown, strict=True):
        if kind == "x-ticks":
            position = {"x": f"{scale.fraction(tick) * 100:.2f}%", "y": "15", "dy": None}
        else:
            position = {"x": "100%", "y": f"{(1 - scale.fraction(tick)) * 100:.2f}%", "dy": ".32em"}
        labels.append(element("text", label, **position))
    return element("svg", *labels, class_=kind, aria_hidden="true")


def _render_line(line: Line, x_scale: Scale, y_scale: Scale, limit: int) -> Markup:
    """Return the path of a line, with its values for the read-out; points without neighbours and
    the marked point are dots, and markers.
    """
    points = [line.points[index] for index in downsample([y for _, y in line.points], limit)]
    pieces: list[list[str]] = [[]]
    for x, y in points:
        if y is None:
            pieces.append([])
        else:
            pieces[-1].append(f"{_x(x_scale, x)} {_y(y_scale, y)}")
    outline = "".join(f"M{'L'.join(piece)}" for piece in pieces if len(piece) > 1)
    drawn = element(
        "path",
        d=outline if line.has_line else "",
        class_=line.style,
        data_name=line.name,
        data_x=" ".join(f"{x:.7g}" for x, y in points if y is not None),
        data_y=" ".join(f"{y:.5g}" for _, y in points if y is not None),
    )
    parts = [drawn]
    dotted = [point for piece in pieces if line.is_dotted or len(piece) == 1 for point in piece]
    if dotted:
        # A short stroke with round ends is a dot, also in a stretched view box.
        dots = "".join(f"M{point}h.01" for point in dotted)
        parts.append(element("path", d=dots, class_=f"{line.style} single"))
    if line.mark is not None:
        x, y, label = line.mark
        dot = f"M{_x(x_scale, x)} {_y(y_scale, y)}h.01"
        parts.append(element("path", element("title", label), d=dot, class_=f"{line.style} marked"))
    return join(parts)


def _x(scale: Scale, value: float) -> str:
    return f"{scale.fraction(value) * _WIDTH:.1f}"


def _y(scale: Scale, value: float) -> str:
    return f"{(1 - scale.fraction(value)) * _HEIGHT:.1f}"


def _describe(chart: Chart, axis: Axis, lines: Sequence[Line]) -> str:
    """Return the chart in words, for screen readers."""
    described = []
    for line in lines[:NUM_COLORS]:
        known = [(x, y) for x, y in line.points if y is not None]
        (first_x, first_y), (last_x, last_y) = known[0], known[-1]
        described.append(
            f"{line.name}: {format_number(first_y)} at {format_number(first_x)}, "
            f"{format_number(last_y)} at {format_number(last_x)}"
        )
    return f"{chart.title} over {axis.title}. {'; '.join(described)}."
