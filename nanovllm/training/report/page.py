"""The page of a report and its file."""

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from nanovllm.errors import TrainingError
from nanovllm.pages import render_page
from nanovllm.training.atomic_files import write_atomically
from nanovllm.training.report.content import describe_run, unique_names
from nanovllm.training.report.run import Run, read_run

REPORT_FILE = "report.html"
MAX_RUNS = 24
_REFRESH_S = 5


def write_report(folder: Path) -> None:
    """Write the report of the run in a folder to its report.html.

    Raises TrainingError if the folder is not that of a run, or if the file cannot be written; the
    old report is then kept.
    """
    write_page(render_report([read_run(folder)]), Path(folder) / REPORT_FILE)


def render_report(runs: Sequence[Run]) -> str:
    """Return the page about one run, or the comparison of at most `MAX_RUNS`.

    The page about a running run reloads itself every five seconds.
    """
    if not 1 <= len(runs) <= MAX_RUNS:
        raise TrainingError(f"a report shows 1 to {MAX_RUNS} runs, not {len(runs)}")
    live = runs[0] if len(runs) == 1 and runs[0].state == "running" else None
    names = unique_names(runs) if len(runs) > 1 else [runs[0].name]
    return render_page(
        title=_title(runs),
        heading=f"{len(runs)} runs compared" if len(runs) > 1 else names[0],
        subtitle="nanovllm training report",
        script="report/report.js",
        styles=("charts/charts.css", "report/report.css"),
        data={
            "runs": [describe_run(run, name) for run, name in zip(runs, names, strict=True)],
            "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "silence_s": None if live is None else _longest_silence_s(live),
        },
        values=[(name, _summary(run)) for run, name in zip(runs, names, strict=True)],
        reload_s=None if live is None else _REFRESH_S,
    )


def write_page(page: str, path: Path) -> None:
    """Replace a file with the page atomically; `nanovllm train-report` may write it as well."""
    data = page.encode()
    write_atomically(path, lambda file: file.write_bytes(data), has_other_writers=True)


def _longest_silence_s(run: Run) -> float:
    """Return three intervals between evaluations, and a minute for an evaluation itself."""
    times = [one.elapsed_s for one in run.evaluations if one.elapsed_s]
    return 60 + 3 * (times[-1] / len(times) if times else 60)


def _title(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs compared"
    run = runs[0]
    share = ""
    if run.state == "running" and run.total_steps:
        share = f" {100 * run.step // run.total_steps} %"
    loss = "" if run.best is None else f" · loss {run.best.val_loss:.4g}"
    return f"{run.name} · {run.state}{share}{loss}"


def _summary(run: Run) -> str:
    """Return the last values of a run, for a page without its script."""
    parts = [run.state, f"step {run.step:,}"]
    if run.best is not None:
        parts.append(f"best validation loss {run.best.val_loss:.4f} at step {run.best.step:,}")
    if run.bits_per_byte is not None:
        parts.append(f"{run.bits_per_byte:.3f} bits per byte")
    if run.tokens_per_s is not None:
        parts.append(f"{run.tokens_per_s:,.0f} tokens per second")
    return ", ".join([*parts, *filter(None, [run.message])])
