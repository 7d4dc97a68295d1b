"""The whole page, its security policy and its file."""

import base64
import hashlib
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

from nanovllm.errors import TrainingError
from nanovllm.training.atomic_files import write_atomically
from nanovllm.training.report.comparison import render_comparison
from nanovllm.training.report.formatting import format_loss
from nanovllm.training.report.markup import Markup, element, join
from nanovllm.training.report.run import Run, load_run
from nanovllm.training.report.summary import STATES, render_run

REPORT_FILE = "report.html"
MAX_RUNS = 24
_REFRESH_S = 5
_FOLDER = Path(__file__).parent


def write_report(folder: Path) -> None:
    """Write the report of the run in a folder to its report.html.

    Raises TrainingError if the folder is not that of a run, or if the file cannot be written; the
    old report is then kept.
    """
    write_page(render_report([load_run(folder)]), Path(folder) / REPORT_FILE)


def render_report(runs: Sequence[Run]) -> str:
    """Return the page about one run, or the comparison of at most `MAX_RUNS`.

    The page about a running run reloads itself every five seconds.
    """
    if not 1 <= len(runs) <= MAX_RUNS:
        raise TrainingError(f"a report shows 1 to {MAX_RUNS} runs, not {len(runs)}")
    is_live = len(runs) == 1 and runs[0].state == "running"
    content = render_run(runs[0]) if len(runs) == 1 else render_comparison(runs)
    script, style = _asset("page.js"), _asset("page.css")
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("meta", http_equiv="refresh", content=_REFRESH_S) if is_live else "",
        element("title", _title(runs)),
        element("style", style),
    )
    footer = _render_footer(runs[0] if is_live else None)
    body = element("body", element("main", content), footer, element("script", script))
    return join((Markup("<!DOCTYPE html>\n"), element("html", head, body, lang="en"), "\n"))


def write_page(page: str, path: Path) -> None:
    """Replace a file with the page atomically; `nanovllm train-report` may write it as well."""
    data = page.encode()
    write_atomically(path, lambda file: file.write_bytes(data), has_other_writers=True)


def _render_footer(live: Run | None) -> Markup:
    """Return when the page was written; the script warns if a live run stays silent for long."""
    written = datetime.now(timezone.utc)
    # Three intervals between evaluations, and a minute for an evaluation itself.
    times = [one.elapsed_s for one in live.evaluations if one.elapsed_s] if live else []
    silence_s = 60 + 3 * (times[-1] / len(times) if times else 60)
    time = element(
        "time",
        f"{written:%Y-%m-%d %H:%M:%S} UTC",
        datetime=written.isoformat(timespec="seconds"),
        data_silence_s=f"{silence_s:.0f}" if live else None,
    )
    live_note = " This page reloads itself while the run goes on." if live else ""
    return element("footer", "Written ", time, ".", live_note)


def _title(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs compared"
    run = runs[0]
    parts = [run.name, STATES[run.state].lower()]
    if run.state == "running" and run.total_steps:
        parts[1] += f" {100 * run.step // run.total_steps} %"
    if run.best is not None:
        parts.append(f"loss {format_loss(run.best.val_loss)}")
    return " · ".join(parts)


@cache
def _asset(name: str) -> Markup:
    """Return the style sheet or the script, with the line breaks that HTML parsers see."""
    return Markup((_FOLDER / name).read_text(encoding="utf-8"))


@cache
def _hash(text: str) -> str:
    """Return the hash of an inline script or style sheet for a Content-Security-Policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
