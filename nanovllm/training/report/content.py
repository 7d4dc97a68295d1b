"""What a report says of a run, as JSON of a bounded size; report/report.js shows it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from nanovllm.errors import counted
from nanovllm.training.commands import model_argument, resume_command
from nanovllm.training.metrics import Evaluation, Record, Update
from nanovllm.training.report.run import Run

_MISSING = "–"  # noqa: RUF001 - an en dash stands for a missing value
_MAX_EVALUATIONS = 400
_MAX_UPDATES = 1000
_MAX_SAMPLES = 50
_MAX_SAMPLE_CHARACTERS = 4000
_MAX_MESSAGE_CHARACTERS = 2000
_MAX_SETTINGS = 100  # of a group
_MAX_SETTING_CHARACTERS = 300
_MAX_ITEMS = 8
_BUCKET_ROWS = 5
_GROUPS = {"config": "Training", "model": "Model", "data": "Data"}
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
_RESUME_LABELS = {
    "running": "Continue this run if its process was killed",
    "stopped": "Continue this run",
    "failed": "Continue this run from its last checkpoint",
}
_T = TypeVar("_T")


def describe_run(run: Run, name: str) -> dict[str, Any]:
    """Return a run as JSON: its state, metrics, samples, settings and commands."""
    best = run.best
    # A finished run's message says that all steps were taken.
    is_told = not (run.state == "finished" and run.step == run.total_steps)
    layers, width = (run.number("model", key) for key in ("layers", "width"))
    listed = run.info.get("defaults")
    return {
        "name": name,
        "state": run.state,
        "message": _cut(run.message, _MAX_MESSAGE_CHARACTERS) if is_told else "",
        "notices": [*filter(None, [run.overfitting]), *run.notices],
        "step": run.step,
        "total_steps": run.total_steps,
        "best": None
        if best is None
        else {key: getattr(best, key) for key in ("step", "val_loss", "tokens", "elapsed_s")},
        "last": {key: run.last(key) for key in ("tokens", "tokens_per_s", "elapsed_s")},
        "tokens_per_s": run.tokens_per_s,
        "bits_per_byte": run.bits_per_byte,
        "bits_per_byte_factor": run.bits_per_byte_factor,
        "validation_bytes": run.number("data", "validation_bytes"),
        "parameters": run.number("model", "parameters"),
        "sizes": ""
        if layers is None or width is None
        else f"{counted(int(layers), 'layer')}, {width:g} wide",
        "evaluations": _columns(run.evaluations, Evaluation, _MAX_EVALUATIONS),
        "num_evaluations": len(run.evaluations),
        "updates": _columns(run.updates, Update, _MAX_UPDATES),
        "samples": [
            {
                "step": sample.step,
                "text": _cut(sample.text, _MAX_SAMPLE_CHARACTERS),
                "prompt": sample.prompt[:_MAX_SAMPLE_CHARACTERS],
            }
            for sample in _select(run.samples, _MAX_SAMPLES)
        ],
        "num_samples": len(run.samples),
        "settings": _settings(run),
        "defaults": [one for one in listed if isinstance(one, str)]
        if isinstance(listed, list)
        else [],
        "commands": _commands(run),
    }


def unique_names(runs: Sequence[Run]) -> list[str]:
    """Return the name of each run's folder, with as many parent folders as tell them apart."""
    paths = [run.folder.resolve().parts for run in runs]
    depth = 1
    while len({path[-depth:] for path in paths}) < len(set(paths)):
        depth += 1
    return ["/".join(path[-depth:]) for path in paths]


def downsample(values: Sequence[float | None], limit: int) -> set[int]:
    """Return the indices of at most `limit` values that draw nearly the same line.

    The values are divided into buckets of equal length. Each keeps its first, last, lowest and
    highest value, and its first gap, so that no extreme value disappears (M4: Jugel et al., "M4: A
    Visualization-Oriented Time Series Data Aggregation", VLDB 2014).
    """
    count = len(values)
    if count <= limit:
        return set(range(count))
    buckets = max(1, limit // _BUCKET_ROWS)
    kept: set[int] = set()
    for bucket in range(buckets):
        indices = range(bucket * count // buckets, (bucket + 1) * count // buckets)
        known = [(value, index) for index in indices if (value := values[index]) is not None]
        if known:
            kept |= {known[0][1], known[-1][1], min(known)[1], max(known)[1]}
        gap = next((index for index in indices if values[index] is None), None)
        kept |= set() if gap is None else {gap}
    return kept


def _columns(
    rows: Sequence[Record], kind: type[Record], limit: int
) -> dict[str, list[float | None]]:
    """Return the steps and the metrics of some rows: those that draw each of the lines."""
    columns = {one.name: [getattr(row, one.name) for row in rows] for one in fields(kind)}
    if kind is Update:
        del columns["tokens_per_s"]  # its means between evaluations are drawn
    drawn = columns.keys() - {"step", "tokens", "elapsed_s"}
    kept = sorted(set().union(*(downsample(columns[name], limit) for name in drawn)))
    return {name: [_rounded(values[index]) for index in kept] for name, values in columns.items()}


def _rounded(value: float | None) -> float | None:
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _select(items: Sequence[_T], limit: int) -> list[_T]:
    """Return at most `limit` items at equal distances, with the first and the last."""
    if len(items) <= limit:
        return list(items)
    return [items[index * (len(items) - 1) // (limit - 1)] for index in range(limit)]


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}…"


def _commands(run: Run) -> dict[str, str]:
    """Return the commands that use the checkpoint by what they do; none before there is one."""
    if run.best is None:
        return {}
    model = model_argument(run.folder)
    commands = {
        "Serve the best checkpoint over HTTP": f"nanovllm serve {model}",
        "Continue a prompt on the terminal": f"nanovllm generate --model {model}",
    }
    if run.info.get("is_gpt2") is False:  # it lacks a part
        commands.clear()
    if run.state in _RESUME_LABELS:
        commands[_RESUME_LABELS[run.state]] = resume_command(run.folder)
    return commands


def _settings(run: Run) -> dict[str, dict[str, str]]:
    """Return the settings in each group of run.json, and those outside of its groups, as text."""
    other = {
        name: value
        for name, value in run.info.items()
        if name not in {*_GROUPS, *_PROGRESS, "defaults"}
    }
    groups = {title: run.group(key) for key, title in _GROUPS.items()}
    return {title: _setting_texts(values) for title, values in {**groups, "Run": other}.items()}


def _setting_texts(settings: Mapping[str, Any]) -> dict[str, str]:
    shown = list(settings.items())[:_MAX_SETTINGS]
    texts = {name[:_MAX_SETTING_CHARACTERS]: _setting_text(value) for name, value in shown}
    if len(settings) > _MAX_SETTINGS:
        texts["and more"] = f"{len(settings) - _MAX_SETTINGS:,}"
    return texts


def _setting_text(value: Any) -> str:
    """Return a JSON value as text of a bounded length."""
    if value is None or value == "":
        return _MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if 10_000 <= abs(value) < 1e300 else str(value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        more = [f"and {len(value) - _MAX_ITEMS:,} more"] if len(value) > _MAX_ITEMS else []
        return ", ".join([*map(_setting_text, value[:_MAX_ITEMS]), *more]) or _MISSING
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return _cut(text, _MAX_SETTING_CHARACTERS)
