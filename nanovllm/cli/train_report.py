"""`nanovllm train-report`: the report of a training run, or a comparison of several."""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

from nanovllm.errors import TrainingError
from nanovllm.training.report import REPORT_FILE, is_run, read_run, render_report, write_page

_COMPARISON_FILE = Path("comparison.html")


def run(parsed: argparse.Namespace) -> int:
    """Write the page and print its path."""
    runs = [read_run(folder) for folder in dict.fromkeys(_find_runs(parsed.runs))]
    default = runs[0].folder / REPORT_FILE if len(runs) == 1 else _COMPARISON_FILE
    output: Path = parsed.output or default
    if output.is_dir():
        raise TrainingError(f"--output {output} is a folder; name a file, such as {REPORT_FILE}")
    if not output.parent.is_dir():
        raise TrainingError(f"--output {output}: there is no folder {output.parent}")
    write_page(render_report(runs), output)
    print(output)
    return 0


def _find_runs(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield the folders of runs; a folder of several stands for all of them, by name."""
    for path in paths:
        inside = [] if is_run(path) or not path.is_dir() else sorted(filter(is_run, path.iterdir()))
        yield from inside or [path]
