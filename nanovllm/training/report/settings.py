"""The tables of a run's settings, and the settings in which runs differ."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nanovllm.training.report.formatting import MISSING, format_count
from nanovllm.training.report.markup import Markup, element
from nanovllm.training.report.run import Run

_GROUPS = {"config": "Training", "model": "Model", "data": "Data"}
_OTHER = "Run"
_PROGRESS = {
    "state",
    "message",
    "step",
    "steps",
    "best_step",
    "best_val_loss",
    "elapsed_s",
    "written",
}
_NOT_COMPARED = {"output", "started"}
_MAX_ROWS = 100
_MAX_CHARACTERS = 300
_MAX_ITEMS = 8


def render_settings(run: Run) -> Markup:
    """Return a table for each group of run.json; empty if there is none."""
    listed = run.info.get("defaults")
    defaults = listed if isinstance(listed, list) else []
    tables = [
        _render_table(title, settings, defaults if title == _GROUPS["config"] else [])
        for title, settings in _groups(run).items()
        if settings
    ]
    if not tables:
        return Markup()
    return element("section", element("h2", "Settings"), element("div", *tables, class_="settings"))


def differing_settings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return the settings in which the runs differ: (name, value of each run)."""
    flat = [
        {
            name: format_setting(value)
            for key in ("config", "model", "data")
            for name, value in run.group(key).items()
        }
        | {name: format_setting(value) for name, value in _other(run).items()}
        for run in runs
    ]
    names = dict.fromkeys(name for settings in flat for name in settings)
    rows = [(name, [settings.get(name, MISSING) for settings in flat]) for name in names]
    return [
        (name, values)
        for name, values in rows
        if len(set(values)) > 1 and name not in _NOT_COMPARED
    ][:_MAX_ROWS]


def format_setting(value: Any) -> str:
    """Return a JSON value as text of a bounded length."""
    if value is None or value == "":
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return format_count(value) if abs(value) >= 10_000 and abs(value) < 1e300 else str(value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        more = [f"and {len(value) - _MAX_ITEMS:,} more"] if len(value) > _MAX_ITEMS else []
        return ", ".join([*map(format_setting, value[:_MAX_ITEMS]), *more]) or MISSING
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}…"


def _groups(run: Run) -> dict[str, Mapping[str, Any]]:
    groups = {title: run.group(key) for key, title in _GROUPS.items()}
    return {**groups, _OTHER: _other(run)}


def _other(run: Run) -> dict[str, Any]:
    """Return the settings that run.json has outside of its groups, such as the backend."""
    return {
        name: value
        for name, value in run.info.items()
        if name not in {*_GROUPS, *_PROGRESS, "defaults"}
    }


def _render_table(title: str, settings: Mapping[str, Any], defaults: Sequence[Any]) -> Markup:
    shown = list(settings.items())[:_MAX_ROWS]
    rows = [
        element(
            "tr",
            element("th", str(name)[:_MAX_CHARACTERS], scope="row"),
            element(
                "td",
                format_setting(value),
                element("span", " default", class_="note") if name in defaults else "",
            ),
        )
        for name, value in shown
    ]
    if len(settings) > _MAX_ROWS:
        rows.append(element("tr", element("td", f"{len(settings) - _MAX_ROWS:,} more", colspan=2)))
    return element(
        "table", element("caption", title), element("tbody", *rows), class_="card settings-table"
    )
